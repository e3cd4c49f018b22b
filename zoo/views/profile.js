// of every quantity, what each kind of node has of it
function shares(model) {
  const bars = element("div", { class: "bars" }), nodes = leaves(model.tree), pieces = [];
  const kinds = data.kinds.filter(kind => nodes.some(box => box.kind === kind));
  for (const q of sums) {
    const bar = element("div", { class: "bar", role: "group", "aria-label": q.name }), sum = total(model, q.key);
    for (const kind of kinds) {
      const own = nodes.filter(box => box.kind === kind), amount = found => found.reduce((s, box) => s + value(box, q.key), 0);
      const part = amount(own);
      if (!part || !sum) continue;
      const piece = element("i", { role: "img", "aria-label": `${kind}: ${percent(part, sum)} of ${q.name}`,
        style: `width: ${100 * part / sum}%; background: ${colour(data.kinds.indexOf(kind))}` });
      tip(piece, () => `${q.name}: ${kind}`, () => [[percent(part, sum), say(part, q.unit)],
        ...[...new Set(own.map(box => box.name))].map(name => [name, say(amount(own.filter(box => box.name === name)), q.unit)])]);
      bar.append(piece);
      pieces.push(piece);
    }
    bars.append(element("span", { title: q.help }, q.name), bar, element("span", { class: "soft" }, sum ? say(sum, q.unit) : "none"));
  }
  roving(pieces);
  const keys = kinds.map(kind => key(kind, colour(data.kinds.indexOf(kind))));
  return element("figure", {}, element("figcaption", {}, models.length > 1 ? `where it goes in ${model.name}` : "where it goes"), bars,
    element("div", { class: "keys" }, ...keys));
}

// ------------------------------------------------------------------------------------------ curves
function curve(title, along, which, units, limit) {
  const series = models.flatMap((model, m) => model.curves.filter(c => c.along === along).map(c => ({
    name: models.length > 1 ? `${model.name}: ${c.mode}` : c.mode, dash: m ? "6 4" : undefined, colour: colour([0, 6, 4][["train", "prefill", "decode"].indexOf(c.mode)]),
    measured: which === 1 && c.mode === model.at.mode && model.at.ms ? [model.at[along], model.at.ms] : null,
    points: c.points.map(p => [p[0], p[which]]).filter(p => p[1]) }))).filter(s => s.points.length);
  if (!series.length) return [];
  const rings = series.filter(s => s.measured), all = series.flatMap(s => s.points).concat(rings.map(s => s.measured));
  const what = along === "tokens" ? "tokens of a row" : "rows", asked = models[0].at[along];
  const x = axis(all.map(p => p[0]), 2, LEFT, WIDTH - RIGHT), y = axis(all.map(p => p[1]), units === "bytes" ? 2 : 10, HEIGHT - BOTTOM, TOP);
  const svg = canvas(title), marks = [], over = x.place(asked);
  axes(svg, x, y, [along === "tokens" ? "tokens" : "count", units], what);
  if (over >= LEFT && over <= WIDTH - RIGHT) svg.append(element("line", { class: "asked", x1: over, x2: over, y1: TOP, y2: HEIGHT - BOTTOM }));
  for (const s of series) {
    svg.append(element("path", { class: "curve", stroke: s.colour, "stroke-dasharray": s.dash,
      d: s.points.map((p, i) => `${i ? "L" : "M"}${x.place(p[0]).toFixed(1)} ${y.place(p[1]).toFixed(1)}`).join("") }));
    for (const [p, ring] of [...s.points.map(p => [p, false]), ...(s.measured ? [[s.measured, true]] : [])]) {
      const name = ring ? `${s.name}: measured` : s.name, dot = element("circle", { cx: x.place(p[0]), cy: y.place(p[1]), r: ring ? 6 : 4,
        fill: ring ? "transparent" : s.colour, stroke: ring ? s.colour : "none", "stroke-width": 2, role: "img",
        "aria-label": `${name}: ${say(p[1], units)} at ${p[0].toLocaleString("en")} ${what}` });
      tip(dot, () => name, () => [[what, p[0].toLocaleString("en")], [title.split(" against")[0], say(p[1], units)]]);
      marks.push(dot);
    }
  }
  svg.append(...limited(limit, y, series.flatMap(s => s.points.map(p => [x.place(p[0]), y.place(p[1])])), `memory of ${data.device}`), ...marks);
  roving(marks);
  const keys = series.map(s => key(s.name + (s.dash ? " (dashed)" : ""), s.colour));
  return [element("figure", {}, element("figcaption", {}, title, ...keys, ...(rings.length ? [element("span", { class: "key ring" }, "measured")] : [])), svg)];
}

// ------------------------------------------------------------------------------------------- tables
function nodes(model) {
  const ran = leaves(model.tree).some(box => box.kernels.length), rows = [];
  const columns = [{ name: "at", text: true }, { name: "node", text: true }, { name: "kind", text: true }, { name: "×", unit: "count" },
    ...quantities.map(q => ({ name: q.name, unit: q.unit, help: q.help })), ...(ran ? [{ name: "kernels", text: true, long: true }] : [])];
  const walk = (box, times) => {
    times *= box.times;
    if (box.shape === "leaf") rows.push({ path: box.path, cells: [box.path, box.name, box.kind, times,
      ...quantities.map(q => box.values[q.key]), ...(ran ? [box.kernels.join(", ")] : [])] });
    box.children.forEach(child => walk(child, times));
  };
  walk(model.tree, 1);
  const table = sortable(columns, rows, (row, on) => light(model, row.path, on));
  model.lines_of = rows.map(row => [row.path, row.line]);
  return table;
}

// a bar to the right of the middle where the second has more; the full width is 16 times as much
function balance(ratio) {
  const part = ratio ? Math.max(-1, Math.min(1, Math.log2(ratio) / 4)) : 0;
  return element("span", { class: "balance" }, element("i", { class: part < 0 ? "less" : "more",
    style: `width: ${50 * Math.abs(part)}%; left: ${50 + 50 * Math.min(0, part)}%` }));
}

function differences(found) {
  const names = models.map(model => model.name);
  const head = [{ name: "", text: true }, { name: names[0] }, { name: names[1] }, { name: "ratio", unit: "ratio" },
    { name: "less | more", text: true, draw: balance }];
  const totals = found.totals.map(t => ({ cells: [t.name, say(t.values[0], t.unit), say(t.values[1], t.unit), t.ratio, t.ratio] }));
  const made = totals.length ? [section(`What differs: ${names[1]} over ${names[0]}`, sortable(head, totals))] : [];
  const columns = [{ name: "at", text: true }, { name: names[0], text: true }, { name: names[1], text: true }, { name: "×", unit: "count" },
    ...found.columns.map(q => ({ name: q.name, help: q.help, draw: v => (v > 0 ? "+" : "") + say(v, q.unit) }))];
  if (found.rows.length) made.push(section(`Nodes that differ: how much more ${names[1]} has`, sortable(columns, found.rows.map(r => ({
    cells: [r.at, r.blocks[0] ?? "none", r.blocks[1] ?? "none", r.times, ...found.columns.map(q => r.change[q.key])] })))));
  made.push(element("p", { class: "soft" }, found.equal));
  return made;
}

// ------------------------------------------------------------------------------------------- page
function section(title, ...inside) {
  return element("section", {}, element("h2", {}, title), ...inside);
}

function show() {
  const main = $("main"), pictures = element("div", { class: "pictures" }), meaning = element("span", { class: "keys soft" });
  main.append(element("h1", {}, models.map(model => model.name).join(" and ")), element("div", { class: "soft" }, data.title));
  if (models.length === 1) main.append(facts(models[0].facts));
  if (data.differences) main.append(...differences(data.differences));
  const curves = ["tokens", "rows"].flatMap(along => {
    const by = along === "tokens" ? "against length" : "against batch";
    return [...curve(`time ${by}`, along, 1, "ms"), ...curve(`memory ${by}`, along, 2, "bytes", data.memory)];
  });
  const others = [...models.map(shares), ...curves], room = matchMedia("(min-width: 901px)");
  const draw = () => {
    const columns = [element("div", { class: "column" }), element("div", { class: "column" })];
    const drawn = figures(room.matches), wide = drawn.filter(figure => figure.classList.contains("wide"));
    pictures.replaceChildren(...wide, ...columns);
    // each goes below the shorter column
    for (const figure of [...drawn.filter(figure => !wide.includes(figure)), ...others])
      columns[room.matches && columns[1].offsetHeight < columns[0].offsetHeight ? 1 : 0].append(figure);
    meaning.replaceChildren(...legend());
    for (const model of models) for (const [path, line] of model.lines_of) lit.push([model, path, line]);
  };
  const tables = models.map(model => section(models.length > 1 ? `Nodes of ${model.name}` : "Nodes", nodes(model)));
  const named = found => found.map(q => [q.key, q.name]);
  main.append(section("The graph", element("div", { class: "controls" },
    choice("size", named(quantities.filter(q => q.together !== "ratio")), size, chosen => { size = chosen; draw(); }),
    choice("colour", [["kind", "kind of work"], ...named(quantities)], hue, chosen => { hue = chosen; draw(); }), meaning), pictures));
  if (curves.length) main.append(element("p", { class: "soft" }, data.note));
  main.append(...tables);
  const said = [...new Set(models.flatMap(model => model.lines))];
  if (said.length) main.append(section("What was assumed and measured", element("ul", {}, ...said.map(line => element("li", {}, line)))));
  room.addEventListener("change", draw);
  draw();
}

show();
