const models = data.models, quantities = data.quantities;
const unit = Object.fromEntries(quantities.map(q => [q.key, q.unit]));
const has = key => quantities.some(q => q.key === key);
const lit = [];  // [path, element] of everything that stands for a node
let size = ["predicted", "measured", "flops", "params"].find(has) || quantities[0].key, hue = "kind";

function leaves(box) {
  return box.shape === "leaf" ? [box] : box.children.flatMap(leaves);
}

function value(box, key) {
  return box.shape === "leaf" ? box.values[key] || 0 : box.children.reduce((sum, child) => sum + value(child, key), 0);
}

function light(owner, path, on) {
  for (const [who, where, mark] of lit) if (who === owner && where === path) mark.classList.toggle("lit", on);
}

// ------------------------------------------------------------------------------------------- graph
// A box is as high as its text needs, and higher by its share: what a node is higher, times its width, is in
// proportion to its cost, so that nodes of narrow branches can be compared with the others.
const WIDE = 560, LEAF = 24, PAD = 8, GAP = 7, HEAD = 20, SPARE = 620;

function headed(box) {
  return box.name || box.times > 1 || box.layers;
}

function place(box, x, y, width, whole) {
  box.at = { x, y, width };
  if (box.shape === "leaf") return box.at.height = LEAF + SPARE * WIDE / width * value(box, size) / whole;
  const first = y;
  const inner = width - 2 * PAD - (box.shape === "loop" ? 16 : 0);
  y += headed(box) ? HEAD + PAD / 2 : PAD;
  let rest = box.children;
  if (box.columns) {
    const own = (inner - GAP * (box.columns - 1)) / box.columns;
    const heights = rest.slice(0, box.columns).map((child, i) => place(child, x + PAD + i * (own + GAP), y + GAP, own, whole));
    y += Math.max(...heights) + 2 * GAP;
    rest = rest.slice(box.columns);
  }
  for (const child of rest) y += place(child, x + PAD, y, inner, whole) + GAP;
  return box.at.height = y - GAP + PAD - first;
}

function fitting(text, width, each) {
  const most = Math.max(0, Math.floor(width / each));
  return text.length <= most ? text : most > 3 ? text.slice(0, most - 1) + "…" : "";
}

function drawn(model, box, svg, whole, largest, depth) {
  const { x, y, width, height } = box.at;
  if (box.shape !== "leaf") return frame(model, box, svg, whole, largest, depth);
  const amount = value(box, hue === "kind" ? size : hue), strength = hue === "kind" ? 1 : Math.sqrt(amount / largest);
  const group = element("g", { class: "leaf" });
  group.append(element("rect", { x, y, width, height, rx: 5, fill: hue === "kind" ? colour(data.kinds.indexOf(box.kind)) : "var(--accent)",
    "fill-opacity": hue === "kind" ? 1 : (0.08 + 0.92 * strength).toFixed(3) }));
  const dark = strength < 0.55 ? " dark" : "";
  const part = percent(value(box, size), whole), times = box.times > 1 ? ` ×${box.times}` : "";
  const text = box.name + times + (box.note ? ` · ${box.note}` : "");
  group.append(element("text", { class: "label" + dark, x: x + 8, y: y + 16 }, fitting(text, width - 60, 7)));
  group.append(element("text", { class: "share" + dark, x: x + width - 7, y: y + 16, "text-anchor": "end" }, part));
  tip(group, () => box.name + times, () => [
    ["at", box.path], ...(box.layers ? [["layers", box.layers]] : []), ...(box.note ? [["", box.note]] : []), ["kind", box.kind],
    ...quantities.map(q => [q.name, `${say(box.values[q.key] || 0, q.unit)}  ${percent(box.values[q.key] || 0, total(model, q.key))}`])]);
  group.addEventListener("pointerenter", () => light(model, box.path, true));
  group.addEventListener("pointerleave", () => light(model, box.path, false));
  lit.push([model, box.path, group]);
  svg.append(group);
}

function frame(model, box, svg, whole, largest, depth) {
  const { x, y, width, height } = box.at;
  if (depth) {
    svg.append(element("rect", { class: "frame" + (depth % 2 ? "" : " odd"), x, y, width, height, rx: 7 }));
    const layers = box.layers ? `${box.layers.includes("-") || box.layers.includes(",") ? "layers" : "layer"} ${box.layers}` : "";
    const words = [box.name === "layer" && layers ? "" : box.name, box.note, layers].filter(Boolean).join(" · ");
    const times = box.times > 1 ? `×${box.times}` : "";
    svg.append(element("text", { class: "title", x: x + PAD, y: y + 15 }, fitting(words, width - 50, 6.7)));
    svg.append(element("text", { class: "times", x: x + width - PAD, y: y + 15, "text-anchor": "end" }, times));
  }
  if (box.shape === "loop") {
    const right = x + width - 16, top = y + HEAD + 8, low = y + height - 14;
    svg.append(element("path", { class: "link", d: `M${right} ${low}h5q4 0 4-4V${top + 4}q0-4-4-4h-5m4-4l-4 4l4 4` }));
  }
  const stack = box.children.slice(box.columns), middle = x + PAD + (width - 2 * PAD - (box.shape === "loop" ? 16 : 0)) / 2;
  for (let i = 1; i < stack.length; i++)
    svg.append(element("path", { class: "link", d: `M${middle} ${stack[i].at.y - GAP}v${GAP}` }));
  const branches = box.children.slice(0, box.columns);
  if (branches.length) {
    const ends = branches.map(b => b.at.x + b.at.width / 2), top = branches[0].at.y - GAP, after = stack.length ? stack[0].at.y : y + height - PAD;
    svg.append(element("path", { class: "link", d: `M${ends[0]} ${top}H${ends[ends.length - 1]}` + branches.map((b, i) =>
      `M${ends[i]} ${top}v${GAP}M${ends[i]} ${b.at.y + b.at.height}V${after - GAP}`).join("") + `M${ends[0]} ${after - GAP}H${ends[ends.length - 1]}` +
      (stack.length ? `M${middle} ${after - GAP}v${GAP}` : "") }));
  }
  for (const child of box.children) drawn(model, child, svg, whole, largest, depth + 1);
}

function total(model, key) {
  return value(model.tree, key);
}

function graphs() {
  lit.length = 0;
  const whole = Math.max(...models.map(model => total(model, size)), 1e-30);  // two models share one scale
  const largest = Math.max(...models.flatMap(model => leaves(model.tree).map(leaf => value(leaf, hue === "kind" ? size : hue))), 1e-30);
  $("graphs").replaceChildren(...models.map(model => {
    const height = place(model.tree, 0, 0, WIDE + 2 * PAD, whole);
    const svg = element("svg", { viewBox: `0 0 ${WIDE + 2 * PAD} ${Math.ceil(height)}`, role: "img", "aria-label": `graph of ${model.name}` });
    drawn(model, model.tree, svg, whole, largest, 0);
    return element("figure", {}, element("figcaption", {}, model.name, element("span", { class: "soft" },
      `${say(total(model, size), unit[size])} in the nodes`)), svg);
  }), ...models.length === 1 ? [shares(models[0])] : []);
  for (const model of models) for (const [path, line] of model.lines_of) lit.push([model, path, line]);
}

// of every quantity, what each kind of node has of it; and the key of the colours
function shares(model) {
  const bars = element("div", { class: "bars" }), nodes = leaves(model.tree);
  const kinds = data.kinds.filter(kind => nodes.some(leaf => leaf.kind === kind));
  for (const q of quantities) {
    const bar = element("div", { class: "bar", role: "img", "aria-label": q.name }), sum = total(model, q.key);
    for (const kind of kinds) {
      const own = nodes.filter(leaf => leaf.kind === kind), part = own.reduce((s, leaf) => s + value(leaf, q.key), 0);
      if (!part || !sum) continue;
      const piece = element("i", { style: `width: ${100 * part / sum}%; background: ${colour(data.kinds.indexOf(kind))}` });
      tip(piece, () => `${q.name}: ${kind}`, () => [[percent(part, sum), say(part, q.unit)],
        ...[...new Set(own.map(leaf => leaf.name))].map(name => [name, say(own.filter(leaf => leaf.name === name).reduce((s, leaf) => s + value(leaf, q.key), 0), q.unit)])]);
      bar.append(piece);
    }
    bars.append(element("span", { title: q.help }, q.name), bar, element("span", { class: "soft" }, say(sum, q.unit)));
  }
  const keys = element("div", { class: "keys" }, ...kinds.map(kind =>
    element("span", { class: "key", style: `--color: ${colour(data.kinds.indexOf(kind))}` }, kind)));
  return element("figure", { class: "beside" }, element("figcaption", {}, "where it goes"), bars, keys);
}

// ------------------------------------------------------------------------------------------ curves
function curve(title, along, which, units, limit) {
  const series = models.flatMap((model, m) => model.curves.filter(c => c.along === along).map(c => ({
    name: models.length > 1 ? `${model.name}: ${c.mode}` : c.mode, dash: m ? "6 4" : undefined, colour: colour([0, 6, 4][["train", "prefill", "decode"].indexOf(c.mode)]),
    points: c.points.map(p => [p[0], p[which]]).filter(p => p[1]) }))).filter(s => s.points.length);
  if (!series.length) return [];
  const all = series.flatMap(s => s.points);
  const x = axis(all.map(p => p[0]), 2, LEFT, WIDTH - RIGHT), y = axis(all.map(p => p[1]), units === "bytes" ? 2 : 10, HEIGHT - BOTTOM, TOP);
  const svg = canvas(title);
  axes(svg, x, y, [along === "tokens" ? "tokens" : "count", units], [along === "tokens" ? "tokens of a row" : "rows"]);
  const at = limit ? y.place(limit) : 0;
  if (limit && at > TOP && at < HEIGHT - BOTTOM) {
    svg.append(element("line", { class: "limit", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    svg.append(element("text", { x: LEFT + 6, y: at - 5 }, `memory of ${data.device}: ${say(limit, "bytes")}`));
  }
  for (const s of series) {
    svg.append(element("path", { class: "curve", stroke: s.colour, "stroke-dasharray": s.dash,
      d: s.points.map((p, i) => `${i ? "L" : "M"}${x.place(p[0]).toFixed(1)} ${y.place(p[1]).toFixed(1)}`).join("") }));
    for (const p of s.points) {
      const dot = element("circle", { cx: x.place(p[0]), cy: y.place(p[1]), r: 4, fill: s.colour });
      tip(dot, () => s.name, () => [[along === "tokens" ? "tokens of a row" : "rows", p[0].toLocaleString("en")], [title.split(" against")[0], say(p[1], units)]]);
      svg.append(dot);
    }
  }
  const keys = series.map(s => element("span", { class: "key", style: `--color: ${s.colour}` }, s.name + (s.dash ? " (dashed)" : "")));
  return [element("figure", {}, element("figcaption", {}, title, ...keys), svg)];
}

// ------------------------------------------------------------------------------------------- page
function nodes(model) {
  const columns = [{ name: "at", text: true }, { name: "node", text: true }, { name: "kind", text: true }, { name: "×", unit: "count" },
    ...quantities.map(q => ({ name: q.name, unit: q.unit, help: q.help }))];
  const rows = [];
  const walk = (box, times) => {
    times *= box.times;
    if (box.shape === "leaf") rows.push({ path: box.path, cells: [box.path, box.name, box.kind, times, ...quantities.map(q => box.values[q.key] || 0)] });
    box.children.forEach(child => walk(child, times));
  };
  walk(model.tree, 1);
  const table = sortable(columns, rows, (row, on) => light(model, row.path, on));
  model.lines_of = rows.map(row => [row.path, row.line]);
  return table;
}

function section(title, ...inside) {
  return element("section", {}, element("h2", {}, title), ...inside);
}

function differences(found) {
  const names = models.map(model => model.name);
  const head = [{ name: "", text: true }, { name: names[0] }, { name: names[1] }, { name: "ratio", unit: "ratio" }];
  const totals = found.totals.map(t => ({ cells: [t.name, say(t.values[0], t.unit), say(t.values[1], t.unit), t.ratio] }));
  const made = [section("What differs", sortable(head, totals))];
  const columns = [{ name: "at", text: true }, { name: names[0], text: true }, { name: names[1], text: true }, { name: "×", unit: "count" },
    ...found.columns.map(q => ({ name: q.name, unit: q.unit, help: q.help }))];
  if (found.rows.length) made.push(section("Nodes that differ: by how much", sortable(columns, found.rows.map(r => ({
    cells: [r.at, r.blocks[0] ?? "none", r.blocks[1] ?? "none", r.times, ...found.columns.map(q => r.change[q.key])] })))));
  made.push(element("p", { class: "soft" }, found.equal));
  return made;
}

function show() {
  const main = $("main");
  main.append(element("h1", {}, models.map(model => model.name).join(" and ")), element("div", { class: "soft" }, data.title));
  if (models.length === 1) main.append(facts(models[0].facts));
  if (data.differences) main.append(...differences(data.differences));
  const options = quantities.map(q => [q.key, q.name]), graph = element("div", { class: "graphs", id: "graphs" });
  main.append(section("The graph", element("div", { class: "controls" },
    choice("size", options, size, key => { size = key; graphs(); }),
    choice("colour", [["kind", "kind of work"], ...options], hue, key => { hue = key; graphs(); })), graph));
  const curves = ["tokens", "rows"].flatMap(along => {
    const by = along === "tokens" ? "against length" : "against batch";
    return [...curve(`time ${by}`, along, 1, "ms"), ...curve(`memory ${by}`, along, 2, "bytes", data.memory)];
  });
  if (curves.length) main.append(section("What it would take", element("div", { class: "curves" }, ...curves), element("p", { class: "soft" }, data.note)));
  for (const model of models) main.append(section(models.length > 1 ? `Nodes of ${model.name}` : "Nodes", nodes(model)));
  const said = [...new Set(models.flatMap(model => model.lines))];
  if (said.length) main.append(section("Taken for granted", element("ul", {}, ...said.map(line => element("li", {}, line)))));
  graphs();
}

show();
