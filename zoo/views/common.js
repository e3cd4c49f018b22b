"use strict";
const SVG = ["svg", "path", "line", "text", "g", "rect", "circle", "title"];
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);

// text goes in as text only, so a name can hold anything
function element(name, attributes = {}, ...inside) {
  const made = SVG.includes(name) ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  made.append(...inside.map(part => part instanceof Node ? part : String(part)));
  return made;
}

function digits(value) {
  return value.toLocaleString("en", { maximumSignificantDigits: 3 });
}

function scaled(value, base, names) {
  let i = 0;
  while (i < names.length - 1 && value >= 0.9995 * base) { value /= base; i++; }
  return digits(value) + names[i];
}

const UNITS = {
  count: v => scaled(v, 1e3, ["", "k", "M", "B", "T"]),
  flops: v => scaled(v, 1e3, ["", "k", "M", "G", "T", "P", "E"]),
  bytes: v => scaled(v, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"]),
  ms: v => v === 0 ? "0" : v < 0.9995 ? digits(v * 1e3) + " µs" : v < 999.5 ? digits(v) + " ms" : digits(v / 1e3) + " s",
  tokens: v => scaled(v, 1024, ["", "k", "M"]),
  ratio: v => digits(v) + "×",
  text: v => v,
};

function say(value, unit) {
  if (value === null || value === undefined) return "";
  return typeof value !== "number" ? String(value) : value < 0 ? "−" + say(-value, unit) : (UNITS[unit] || digits)(value);
}

function percent(part, whole) {
  return whole ? (100 * part / whole).toFixed(part / whole < 0.1 ? 1 : 0) + "%" : "";
}

// ------------------------------------------------------------------------------------------- hints
function tip(target, head, rows) {
  const show = event => {
    const table = element("table");
    table.append(...rows().map(([name, value]) => element("tr", {}, element("td", { class: "text soft" }, name), element("td", {}, value))));
    $("tip").replaceChildren(element("b", {}, head()), table);
    $("tip").hidden = false;
    const box = $("tip").getBoundingClientRect();
    $("tip").style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    $("tip").style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + "px";
  };
  target.addEventListener("pointermove", show);
  target.addEventListener("pointerleave", () => { $("tip").hidden = true; });
}

// found: [name, value, unit, good or bad]
function facts(found) {
  return element("dl", { class: "facts" }, ...found.map(([name, value, unit, mood]) =>
    element("div", {}, element("dt", {}, name), element("dd", { class: mood || "" }, say(value, unit)))));
}

function choice(label, options, chosen, act) {
  const select = element("select", { "aria-label": label });
  for (const [value, name] of options) select.append(element("option", { value }, name));
  select.value = chosen;
  select.addEventListener("change", () => act(select.value));
  return element("label", {}, label + " ", select);
}

// ------------------------------------------------------------------------------------------ tables
// columns: [{name, unit, text}]; rows: [{cells, mark}]; a click on a head sorts, largest first
function sortable(columns, rows, lit = () => {}) {
  const body = element("tbody"), heads = columns.map((column, i) => {
    const head = element("th", { class: column.text ? "text" : "", title: column.help }, element("button", { type: "button" }, column.name));
    head.addEventListener("click", () => sort(i));
    return head;
  });
  const made = rows.map(row => {
    const line = element("tr", { class: row.mark || "" });
    line.append(...row.cells.map((cell, i) => element("td", { class: columns[i].text ? "text" : "" }, say(cell, columns[i].unit))));
    line.addEventListener("pointerenter", () => lit(row, true));
    line.addEventListener("pointerleave", () => lit(row, false));
    row.line = line;
    return row;
  });
  function sort(i) {
    const down = heads[i].getAttribute("aria-sort") !== "descending";
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[i] ?? (columns[i].text ? "" : -Infinity);
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    body.append(...[...made].sort((a, b) => (down ? -1 : 1) * order(key(a), key(b))).map(row => row.line));
  }
  body.append(...made.map(row => row.line));
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}

// ------------------------------------------------------------------------------------------ charts
const WIDTH = 560, HEIGHT = 270, LEFT = 62, RIGHT = 14, TOP = 8, BOTTOM = 34;

// both axes are logarithmic, from a round number below all values to one above; of the round numbers a few are named
function axis(values, base, from, to) {
  const steps = base === 10 ? [1, 2, 5] : [1], low = Math.min(...values), high = Math.max(...values), ticks = [];
  for (let i = Math.floor(Math.log(low) / Math.log(base)) - 1; ticks.length < 2 || ticks[ticks.length - 1] < high * (1 - 1e-9); i++)
    for (const step of steps) {
      const tick = step * base ** i;
      if (tick <= low * (1 + 1e-9)) ticks.length = 0;
      if (ticks.length < 2 || ticks[ticks.length - 1] < high * (1 - 1e-9)) ticks.push(tick);
    }
  const first = Math.log(ticks[0]), last = Math.log(ticks[ticks.length - 1]);
  const place = v => from + (Math.log(v) - first) / (last - first) * (to - from);
  const powers = ticks.filter(tick => Math.abs(Math.log10(tick) - Math.round(Math.log10(tick))) < 1e-9);
  const named = base === 10 && ticks.length > 9 ? powers : ticks, every = Math.ceil(named.length / 9);
  return { place, ticks: named.filter((_, i) => i % every === 0) };
}

function axes(svg, x, y, units, labels) {
  for (const tick of y.ticks) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.place(tick), y2: y.place(tick) }));
    svg.append(element("text", { x: LEFT - 6, y: y.place(tick) + 4, "text-anchor": "end" }, say(tick, units[1])));
  }
  for (const tick of x.ticks)
    svg.append(element("text", { x: x.place(tick), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, say(tick, units[0])));
  svg.append(element("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, labels[0]));
}

function canvas(label) {
  return element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
}

function colour(i) {
  return `var(--k${i})`;
}
