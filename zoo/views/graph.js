// A model as nested boxes. A box is as high as its text needs, and higher by its share: what a node is higher, times
// its width, is in proportion to its cost, so that nodes of narrow branches can be compared with the others.
const models = data.models, quantities = data.quantities;
const of = Object.fromEntries(quantities.map(q => [q.key, q])), has = key => key in of;
const sums = quantities.filter(q => q.together === "sum");
const WIDE = 560, LEAF = 24, PAD = 8, GAP = 7, HEAD = 20, SPARE = 620, GUTTER = 30, LONG = 1900, BACK = 16;
const RANGE = 4;  // a ratio of so much has the full colour
const lit = [];  // [model, path, element] of everything that stands for a node
let size = ["measured", "predicted", "flops", "params"].find(has) || quantities[0].key, hue = "kind";

function leaves(box) {
  return box.shape === "leaf" ? [box] : box.children.flatMap(leaves);
}

function value(box, key) {
  return box.shape === "leaf" ? box.values[key] || 0 : box.children.reduce((sum, child) => sum + value(child, key), 0);
}

function total(model, key) {
  return value(model.tree, key);
}

function light(owner, path, on) {
  for (const [who, where, mark] of lit) if (who === owner && where === path) mark.classList.toggle("lit", on);
}

// ------------------------------------------------------------------------------------------ places
function words(box) {
  const layers = box.layers ? `${/[-,]/.test(box.layers) ? "layers" : "layer"} ${box.layers}` : "";
  return [box.name === "layer" && layers ? "" : box.name, box.note, layers].filter(Boolean).join(" · ");
}

function place(box, x, y, width, whole) {
  box.at = { x, y, width };
  if (box.shape === "leaf") return box.at.height = LEAF + SPARE * WIDE / width * value(box, size) / whole;
  const first = y, inner = width - 2 * PAD - (box.shape === "loop" ? BACK : 0);
  y += words(box) || box.times > 1 ? HEAD + PAD / 2 : PAD;
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

// the model's own parts, one below another; what is too long goes on in a second column where there is room for it
function placed(tree, whole, room) {
  const heights = tree.children.map(child => place(child, 0, 0, WIDE, whole) + GAP);
  const all = heights.reduce((sum, height) => sum + height, 0);
  let cut = heights.length, tall = all, above = 0;
  if (room && all > LONG) heights.forEach((height, i) => {
    above += height;
    if (Math.max(above, all - above) < tall) [cut, tall] = [i + 1, Math.max(above, all - above)];
  });
  let y = 0;
  tree.children.forEach((child, i) => {
    if (i === cut) y = 0;
    y += place(child, 1 + (i < cut ? 0 : WIDE + GUTTER), 1 + y, WIDE, whole) + GAP;
  });
  return { width: 2 + (cut < heights.length ? 2 * WIDE + GUTTER : WIDE), height: tall + 2, folded: cut < heights.length };
}

// ----------------------------------------------------------------------------------------- drawing
function fitting(text, width, each) {
  const most = Math.max(0, Math.floor(width / each));
  return text.length <= most ? text : most > 3 ? text.slice(0, most - 1) + "…" : "";
}

// fill and its strength, of a node
function shade(box, largest) {
  if (hue === "kind") return [colour(data.kinds.indexOf(box.kind)), 1];
  const amount = box.values[hue];
  if (amount === undefined) return ["var(--soft)", 0.08];
  if (of[hue].together !== "ratio") return ["var(--accent)", 0.08 + 0.92 * Math.sqrt(amount / largest)];
  const part = Math.max(-1, Math.min(1, Math.log(amount) / Math.log(RANGE)));
  return [part < 0 ? "var(--slow)" : "var(--quick)", 0.08 + 0.92 * Math.abs(part)];
}

function leaf(model, box, whole, largest) {
  const { x, y, width, height } = box.at, [fill, strength] = shade(box, largest), dark = strength < 0.55 ? " dark" : "";
  const times = box.times > 1 ? ` ×${box.times}` : "", text = box.name + times + (box.note ? ` · ${box.note}` : "");
  const own = hue === "kind" || hue === size ? "" : say(box.values[hue], of[hue].unit);
  const part = of[size].together === "sum" && size in box.values ? percent(value(box, size), whole) : say(box.values[size], of[size].unit);
  const right = [own, width > 200 || !own ? part : ""].filter(Boolean).join(" · ");
  const group = element("g", { class: "leaf", role: "img", "aria-label": part ? `${text}: ${part} of ${of[size].name}` : text },
    element("rect", { x, y, width, height, rx: 5, fill, "fill-opacity": strength.toFixed(3) }),
    element("text", { class: "label" + dark, x: x + 8, y: y + 16 }, fitting(text, width - 24 - 6.5 * right.length, 7.6)),
    element("text", { class: "share" + dark, x: x + width - 7, y: y + 16, "text-anchor": "end" }, right));
  tip(group, () => box.name + times, () => [
    ["at", box.path], ...(box.layers ? [["layers", box.layers]] : []), ...(box.note ? [["", box.note]] : []), ["kind", box.kind],
    ...quantities.filter(q => q.key in box.values).map(q => [q.name,
      `${say(box.values[q.key], q.unit)}  ${q.together === "sum" ? percent(box.values[q.key], total(model, q.key)) : ""}`]),
    ...(box.kernels.length ? [["kernels", box.kernels.join(", ")]] : [])], on => light(model, box.path, on));
  lit.push([model, box.path, group]);
  return [group];
}

function link(d) {
  return element("path", { class: "link", d });
}

function drawn(model, box, whole, largest, depth = 0) {
  if (box.shape === "leaf") return leaf(model, box, whole, largest);
  const { x, y, width, height } = box.at || {}, made = [];
  if (depth) made.push(
    element("rect", { class: "frame" + (depth % 2 ? "" : " odd"), x, y, width, height, rx: 7 }),
    element("text", { class: "title", x: x + PAD, y: y + 15 }, fitting(words(box), width - 50, 7.4)),
    element("text", { class: "times", x: x + width - PAD, y: y + 15, "text-anchor": "end" }, box.times > 1 ? `×${box.times}` : ""));
  if (box.shape === "loop") {
    const right = x + width - BACK, top = y + HEAD + 8, low = y + height - 14;
    made.push(link(`M${right} ${low}h5q4 0 4-4V${top + 4}q0-4-4-4h-5m4-4l-4 4l4 4`));
  }
  const middle = at => at.x + at.width / 2, stack = box.children.slice(box.columns), branches = box.children.slice(0, box.columns);
  for (let i = 1; i < stack.length; i++) {
    const a = stack[i - 1].at, b = stack[i].at, turn = a.x + a.width + GUTTER / 2, low = a.y + a.height;
    made.push(link(b.y > a.y ? `M${middle(b)} ${b.y - GAP}v${GAP}` : `M${a.x + a.width} ${low - LEAF / 2}H${turn}V${b.y + LEAF / 2}H${b.x}m-5-4l5 4l-5 4`));
  }
  if (branches.length) {
    const ends = branches.map(b => middle(b.at)), last = ends[ends.length - 1], top = branches[0].at.y - GAP;
    const after = stack.length ? stack[0].at.y : y + height - PAD;
    made.push(link(`M${ends[0]} ${top}H${last}` + branches.map((b, i) =>
      `M${ends[i]} ${top}v${GAP}M${ends[i]} ${b.at.y + b.at.height}V${after - GAP}`).join("") + `M${ends[0]} ${after - GAP}H${last}` +
      (stack.length ? `M${middle(stack[0].at)} ${after - GAP}v${GAP}` : "")));
  }
  return [...made, ...box.children.flatMap(child => drawn(model, child, whole, largest, depth + 1))];
}

// a figure of every model, at one scale
function figures(room) {
  lit.length = 0;
  const whole = Math.max(...models.map(model => total(model, size)), 1e-30);
  const largest = Math.max(...models.flatMap(model => leaves(model.tree).map(box => box.values[hue] || 0)), 1e-30);
  return models.map(model => {
    const { width, height, folded } = placed(model.tree, whole, room && models.length === 1);
    const svg = element("svg", { viewBox: `0 0 ${width} ${Math.ceil(height)}`, role: "group", "aria-label": `graph of ${model.name}` },
      ...drawn(model, model.tree, whole, largest));
    roving([...svg.querySelectorAll(".leaf")]);
    const sum = of[size].together === "sum" ? `${say(total(model, size), of[size].unit)} in the nodes` : "";
    return element("figure", { class: folded ? "wide" : "" },
      element("figcaption", {}, model.name, element("span", { class: "soft" }, sum)), svg);
  });
}

// what the colours mean
function legend() {
  if (hue === "kind") {
    const nodes = models.flatMap(model => leaves(model.tree));
    return data.kinds.filter(kind => nodes.some(box => box.kind === kind)).map(kind => key(kind, colour(data.kinds.indexOf(kind))));
  }
  if (of[hue].together === "ratio")
    return ["slower than predicted", element("i", { class: "scale both" }), "quicker; the full colours: 4 times and more"];
  const largest = Math.max(...models.flatMap(model => leaves(model.tree).map(box => box.values[hue] || 0)));
  return ["0", element("i", { class: "scale" }), say(largest, of[hue].unit)];
}
