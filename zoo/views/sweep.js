const timed = data.points.every(p => p.time !== null);
const AXES = {  // name, unit, base of the axis, whether less is better
  [timed ? "time" : "flops"]: [timed ? "predicted time" : "FLOPs", timed ? "ms" : "flops", 10, true],
  memory: ["memory", "bytes", 2, true],
  params: ["parameters", "count", 10, data.prefer === "fewer"],
};
const names = Object.keys(AXES), FEW = 30;  // so many points can be named
let across = names[0], up = "params", hue = data.keys[0];

function settings(point) {
  return Object.entries(point.settings).filter(([key]) => data.keys.includes(key));
}

function said(point) {
  return settings(point).map(s => s.join("=")).join(" ");
}

// the best that can be had along the first axis of the second one, as a staircase
function stairs(points) {
  const sign = key => AXES[key][3] ? 1 : -1;
  const order = [...points].sort((a, b) => sign(across) * (a[across] - b[across]) || sign(up) * (a[up] - b[up]));
  const found = [];
  for (const point of order) if (!found.length || sign(up) * (point[up] - found[found.length - 1][up]) < 0) found.push(point);
  return found;
}

function scatter() {
  const svg = canvas(`${AXES[up][0]} against ${AXES[across][0]}`), values = [...new Set(data.points.map(p => p.settings[hue]))];
  const x = axis(data.points.map(p => p[across]), AXES[across][2], LEFT, WIDTH - RIGHT);
  const y = axis(data.points.map(p => p[up]), AXES[up][2], HEIGHT - BOTTOM, TOP);
  axes(svg, x, y, [AXES[across][1], AXES[up][1]], AXES[across][0]);
  svg.append(...limited(up === "memory" ? data.memory : 0, y, data.points.map(p => [x.place(p[across]), y.place(p[up])]), "the memory"));
  const best = stairs(data.points);
  svg.append(element("path", { class: "link", id: "front", d: best.map((p, i) =>
    i ? `H${x.place(p[across]).toFixed(1)}V${y.place(p[up]).toFixed(1)}` : `M${x.place(p[across]).toFixed(1)} ${y.place(p[up]).toFixed(1)}`).join("") }));
  const others = data.keys.filter(key => key !== hue), dots = [], labels = [];
  for (const point of data.points) {
    const fill = colour(1 + values.indexOf(point.settings[hue]) % 10);
    const dot = element("circle", { cx: x.place(point[across]), cy: y.place(point[up]), r: point.front ? 6 : 4, fill,
      "fill-opacity": point.front ? 1 : 0.45, stroke: point.fits ? "none" : "var(--bad)", "stroke-width": 2,
      role: "img", "aria-label": said(point) });
    tip(dot, () => said(point), () => [
      ...names.map(key => [AXES[key][0], say(point[key], AXES[key][1])]), ["", point.fits ? "fits" : "does not fit"],
      ["", point.front ? "on the front" : "another is better in all"]], on => point.line.classList.toggle("lit", on));
    dots.push(dot);
    const label = others.map(key => point.settings[key]).join(", ");
    if (data.points.length <= FEW && label.length < 20)
      labels.push(element("text", { class: "over", x: x.place(point[across]) + 8, y: y.place(point[up]) + 13 }, label));
  }
  svg.append(...labels, ...dots);
  roving(dots);
  const keys = values.map((value, i) => key(`${hue}=${value}`, colour(1 + i % 10)));
  if (labels.length && others.length) keys.push(element("span", { class: "soft" }, `beside the dots: ${others.join(", ")}`));
  $("scatter").replaceChildren(element("figcaption", {}, `${AXES[up][0]} against ${AXES[across][0]}`, ...keys), svg);
}

function show() {
  const options = names.map(key => [key, AXES[key][0]]);
  const columns = [...data.keys.map(name => ({ name, text: true })), { name: "parameters", unit: "count" }, { name: "active", unit: "count" },
    { name: "FLOPs", unit: "flops" }, { name: "useful FLOPs", unit: "flops" }, { name: "predicted time", unit: "ms" },
    { name: "memory", unit: "bytes" }, { name: "fits", text: true }, { name: "front", text: true }];
  const rows = data.points.map(p => {
    const row = { mark: p.front ? "" : "back", cells: [...data.keys.map(key => p.settings[key]), p.params, p.active_params, p.flops,
      p.useful_flops, p.time, p.memory, p.fits ? "yes" : "no", p.front ? "★" : ""] };
    return [p, row];
  });
  const table = sortable(columns, rows.map(([, row]) => row));
  for (const [point, row] of rows) point.line = row.line;
  $("main").append(element("h1", {}, data.name), element("div", { class: "soft" }, data.title),
    element("h2", {}, "The front"), element("div", { class: "controls" },
      choice("across", options, across, key => { across = key; scatter(); }),
      choice("up", options, up, key => { up = key; scatter(); }),
      choice("colour", data.keys.map(key => [key, key]), hue, key => { hue = key; scatter(); })),
    element("figure", { id: "scatter" }),
    element("p", { class: "soft" }, `Full dots: no other model is as good in ${AXES[names[0]][0]}, memory and parameters (${data.prefer} of them being better) ` +
      "and better in one. The line: the best of the two axes alone. A red ring: it does not fit."),
    element("h2", {}, "All models"), table);
  if (data.refused.length) $("main").append(element("h2", {}, "Refused"), element("ul", {}, ...data.refused.map(r =>
    element("li", {}, `${said(r)}: ${r.reason}`))));
  if (data.points.length) scatter();
}

show();
