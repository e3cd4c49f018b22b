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
  percent: v => digits(v) + "%",
};

function say(value, unit) {
  if (value === null || value === undefined) return "";
  return typeof value !== "number" ? String(value) : value < 0 ? "−" + say(-value, unit) : (UNITS[unit] || digits)(value);
}

function percent(part, whole) {
  const share = part / whole;
  return !whole ? "" : !part ? "0%" : share < 0.0005 ? "<0.1%" : (100 * share).toFixed(share < 0.0995 ? 1 : 0) + "%";
}

// ------------------------------------------------------------------------------------------- hints
// of `target`, under the pointer or beside it when it has the focus; `act` is told when it comes and goes
function tip(target, head, rows, act = () => {}) {
  const show = (x, y) => {
    const table = element("table");
    table.append(...rows().map(([name, value]) => element("tr", {}, element("td", { class: "text soft" }, name), element("td", {}, value))));
    $("tip").replaceChildren(element("b", {}, head()), table);
    $("tip").hidden = false;
    const box = $("tip").getBoundingClientRect();
    $("tip").style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 8)) + "px";
    $("tip").style.top = Math.max(4, Math.min(y + 14, innerHeight - box.height - 8)) + "px";
    act(true);
  };
  const hide = () => { $("tip").hidden = true; act(false); };
  target.addEventListener("pointermove", event => show(event.clientX, event.clientY));
  target.addEventListener("pointerleave", hide);
  target.addEventListener("focus", () => {
    const box = target.getBoundingClientRect();
    if (target.matches(":focus-visible")) show(box.left + Math.min(box.width, 200), box.top);
  });
  target.addEventListener("blur", hide);
  target.addEventListener("keydown", event => { if (event.key === "Escape") hide(); });
}

// one stop of the tab key for all marks; arrows go from one to the next
function roving(marks) {
  marks.forEach((mark, i) => {
    mark.setAttribute("tabindex", i ? -1 : 0);
    mark.addEventListener("keydown", event => {
      const next = marks[i + ({ ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key] ?? NaN)];
      if (!next) return;
      event.preventDefault();
      mark.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus({ focusVisible: true });
    });
  });
}

// found: [name, value, unit, good or bad, [value, unit] of what is said below]
function facts(found) {
  return element("dl", { class: "facts" }, ...found.map(([name, value, unit, mood, more]) =>
    element("div", {}, element("dt", {}, name), element("dd", { class: mood }, say(value, unit)),
      element("dd", { class: "soft" }, more.map(([part, own]) => say(part, own)).join(" ")))));
}

function key(name, fill) {
  return element("span", { class: "key", style: `--color: ${fill}` }, name);
}

function choice(label, options, chosen, act) {
  const select = element("select", { "aria-label": label });
  for (const [value, name] of options) select.append(element("option", { value }, name));
  select.value = chosen;
  select.addEventListener("change", () => act(select.value));
  return element("label", {}, label, select);
}

// ------------------------------------------------------------------------------------------ tables
// columns: [{name, help, unit or draw, text, long}]; rows: [{cells, mark}]; a click on a head sorts, largest first
function sortable(columns, rows, lit = () => {}) {
  const body = element("tbody"), heads = columns.map((column, i) => {
    const head = element("th", { class: column.text ? "text" : "", title: column.help }, element("button", { type: "button" }, column.name));
    head.addEventListener("click", () => sort(i));
    return head;
  });
  const made = rows.map(row => {
    const line = element("tr", { class: row.mark || "" });
    line.append(...row.cells.map((cell, i) => element("td", { class: columns[i].long ? "text long" : columns[i].text ? "text" : "" },
      columns[i].draw ? columns[i].draw(cell) : say(cell, columns[i].unit))));
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
const WIDTH = 560, HEIGHT = 270, LEFT = 62, RIGHT = 26, TOP = 8, BOTTOM = 38;

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

function axes(svg, x, y, units, label) {
  const low = HEIGHT - BOTTOM;
  for (const tick of y.ticks) svg.append(
    element("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y.place(tick), y2: y.place(tick) }),
    element("text", { x: LEFT - 6, y: y.place(tick) + 4, "text-anchor": "end" }, say(tick, units[1])));
  for (const tick of x.ticks) svg.append(
    element("line", { class: "grid", x1: x.place(tick), x2: x.place(tick), y1: low, y2: low + 4 }),
    element("text", { x: x.place(tick), y: low + 18, "text-anchor": "middle" }, say(tick, units[0])));
  svg.append(element("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, label));
}

// a line at a limit of memory, named at the end that has more room
function limited(limit, y, points, name) {
  const at = limit ? y.place(limit) : 0;
  if (at <= TOP || at >= HEIGHT - BOTTOM) return [];
  const room = side => Math.min(...points.filter(p => side ? p[0] > WIDTH - 240 : p[0] < LEFT + 200).map(p => Math.abs(p[1] - at + 8)));
  const right = room(true) > room(false);
  return [element("line", { class: "limit", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
    element("text", { class: "over", x: right ? WIDTH - RIGHT - 4 : LEFT + 6, y: at - 5, "text-anchor": right ? "end" : "start" },
      `${name}: ${say(limit, "bytes")}`)];
}

function canvas(label) {
  return element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": label });
}

function colour(i) {
  return `var(--k${i})`;
}
