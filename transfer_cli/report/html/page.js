"use strict";
/* The pages of the report. Data comes from the JSON beside it and, a run at a time, from packed details; all text enters by
   textContent, never as markup. Charts are drawn for the width at hand and again when it changes; colours are CSS variables. */
(() => {
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse($("#data").textContent);
const runs = data.runs;
const byId = new Map(runs.map((run) => [run.id, run]));
const overview = $("#overview"), page = $("#page");

function element(make) {
  return (tag, attributes = {}, ...children) => {
    const node = make(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
    }
    for (const child of children.flat(3)) if (child !== null && child !== undefined && child !== false) node.append(child);
    return node;
  };
}
const h = element((tag) => document.createElement(tag));
const s = element((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));

/* ---------- words and numbers ---------- */
const PERCENT = new Set(["accuracy", "macro_f1", "coverage_50", "coverage_80", "coverage_95", "conformal_coverage", "unknown_accuracy",
  "os_star", "hos", "auroc", "fpr95", "epistemic_share", "conformal_unbounded"]);
const NAMES = { accuracy: "accuracy", macro_f1: "macro-F1", nll: "NLL", brier: "Brier", ece: "ECE", ece_equal_mass: "ECE, equal mass",
  rmse: "RMSE", mae: "MAE", r2: "R²", crps: "CRPS", aurc: "AURC", coverage_95: "95 % coverage", width_95: "95 % width",
  os_star: "OS*", hos: "HOS", nll_best_temperature: "NLL at best temperature" };
const FIRST = ["rmse", "r2", "nll", "crps", "coverage_95", "width_95"]; // of a wide table: coverage says nothing without the width
const HIGHER = new Set(["accuracy", "macro_f1", "r2", "os_star", "hos", "unknown_accuracy"]);
const LOWER = new Set(["nll", "brier", "ece", "ece_equal_mass", "rmse", "mae", "crps", "aurc"]);
const nameOf = (key) => NAMES[key] || key.replaceAll("_", " ");
const number = (value, digits = 4) => {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e6 || size < 1e-4)) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
};
const percent = (share, digits = 1) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(digits)} %`);
const shown = (key, value) => (value === null || value === undefined ? "–" : PERCENT.has(key) ? percent(value)
  : Math.abs(value) < 10 && Math.abs(value) >= 0.001 ? value.toFixed(3) : number(value));
const seconds = (value) => (value === null || value === undefined ? "" : value < 60 ? `${number(value, 2)} s`
  : value < 3600 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : `${number(value / 3600, 3)} h`);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const pairOf = (run) => run.pair.join(" → ");
const seedOf = (run) => (run.seed[1] ? `${run.seed[0]}, data ${run.seed[1]}` : String(run.seed[0] ?? "–"));
const figureOf = (run) => (run.figure === null ? "" : run.kind === "classification" ? percent(run.figure) : `RMSE ${number(run.figure)}`);
const fullName = (run) => [run.method, run.told].filter(Boolean).join(" ");
const link = (run, text) => h("a", { href: `#run/${encodeURIComponent(run.id)}` }, text ?? run.method);

/* ---------- theme ---------- */
const THEMES = ["auto", "light", "dark"];
const remembered = () => { try { return localStorage.getItem("transfer-theme"); } catch { return null; } };
function setTheme(theme, keep = true) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("#theme").textContent = `Theme: ${theme}`;
  if (keep) try { localStorage.setItem("transfer-theme", theme); } catch { /* a file that may keep nothing */ }
}
let theme = THEMES.includes(remembered()) ? remembered() : "auto";
setTheme(theme, false);
$("#theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; setTheme(theme); });

/* ---------- filters of the overview ---------- */
const FILTERS = { method: "Method", pair: "Pair", backbone: "Backbone", setting: "Setting", state: "State" };
const valueOf = { method: (r) => r.method, pair: pairOf, backbone: (r) => r.backbone, setting: (r) => r.setting,
  state: (r) => (r.warnings.length ? "warned" : r.state) };
const chosen = { text: "", method: "", pair: "", backbone: "", setting: "", state: "" };
const filters = $("#filters");
function drawFilters() {
  filters.append(h("label", {}, "Search", h("input", { type: "search", name: "text", placeholder: "word in a row or a run" })));
  for (const [key, title] of Object.entries(FILTERS)) {
    const values = [...new Set(runs.map(valueOf[key]))].filter(Boolean).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    filters.append(h("label", {}, title, h("select", { name: key, disabled: values.length < 2 },
      h("option", { value: "" }, values.length < 2 ? values[0] || "–" : `all ${values.length}`),
      values.map((value) => h("option", { value }, value)))));
  }
  filters.append(h("button", { type: "reset" }, "Clear"), h("output", { "aria-live": "polite" }));
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(applyFilters));
  filters.addEventListener("input", applyFilters);
}
const wanted = (text) => chosen.text.split(/\s+/).every((word) => text.includes(word));
const passes = (run, but = "") => Object.keys(FILTERS).every((key) => key === but || !chosen[key] || valueOf[key](run) === chosen[key]) && wanted(run.search);
function applyFilters() {
  for (const key of Object.keys(chosen)) chosen[key] = filters.elements[key].value;
  chosen.text = chosen.text.trim().toLowerCase();
  const kept = runs.filter((run) => passes(run));
  const visible = new Set(runs.filter((run) => passes(run, "pair")).map((run) => String(run.index))); // a bound stands in several pairs
  for (const table of $$("table.results")) {
    const filled = new Set(); // pairs that a row which is left has runs of
    for (const row of $$("tbody tr", table)) {
      const pairs = $$("td[data-runs]", row).filter((cell) => (!chosen.pair || cell.dataset.pair === chosen.pair)
        && cell.dataset.runs.split(" ").some((index) => visible.has(index))).map((cell) => cell.dataset.pair);
      pairs.forEach((pair) => filled.add(pair));
      row.hidden = pairs.length === 0;
    }
    const all = kept.length === runs.length;
    for (const cell of $$("th[data-pair], td[data-pair]", table)) cell.hidden = !all && !filled.has(cell.dataset.pair);
    const shownRows = $$("tbody tr", table).filter((row) => !row.hidden).length;
    table.closest("section").hidden = shownRows === 0;
  }
  $("output", filters).textContent = `${plural(kept.length, "run")} of ${runs.length.toLocaleString("en")}`;
  listing?.update(kept);
}

/* ---------- another figure in the static tables ---------- */
function chooseFigure(table) {
  if (table.dataset.select) return; // its checkpoints are not those of the runs' final figures
  const some = runs.filter((run) => run.kind === table.dataset.kind && run.state === "finished");
  const head = table.dataset.kind === "classification" ? "accuracy" : "rmse";
  const keys = [...new Set(some.flatMap((run) => Object.keys(run.figures)))].filter((key) => key !== head);
  if (!keys.length) return;
  const cells = $$("td[data-runs]", table).map((cell) => ({ cell, content: [...cell.childNodes], value: cell.dataset.value, best: cell.classList.contains("best") }));
  const summaries = $$("tbody td:not([data-pair]), thead th:not([data-pair]):not(:first-child)", table);
  const choice = h("select", { onchange: () => {
    const key = choice.value, plain = key === head;
    for (const one of summaries) one.hidden = !plain;
    for (const { cell, content, value, best } of cells) {
      cell.classList.toggle("best", best && plain);
      if (plain) { cell.replaceChildren(...content); if (value !== undefined) cell.dataset.value = value; continue; }
      const numbers = cell.dataset.runs.split(" ").map((i) => runs[i].figures[key]).filter((v) => v !== null && v !== undefined);
      const mean = numbers.reduce((a, b) => a + b, 0) / numbers.length, std = Math.sqrt(numbers.reduce((a, b) => a + (b - mean) ** 2, 0) / (numbers.length - 1));
      cell.dataset.value = numbers.length ? mean : "";
      const write = (v) => (PERCENT.has(key) ? (100 * v).toFixed(1) : shown(key, v));
      cell.replaceChildren(h("a", { href: content.find((node) => node.href).getAttribute("href") }, numbers.length ? `${write(mean)}${numbers.length > 1 ? ` ± ${write(std)}` : ""} (${numbers.length})` : "–"));
    }
    table.dispatchEvent(new Event("figure"));
  } }, [head, ...keys].map((key) => h("option", { value: key }, nameOf(key) + (PERCENT.has(key) ? ", %" : ""))));
  table.closest("section").insertBefore(h("div", { class: "toolbar" }, h("label", { class: "field" }, "Figure", choice)), table.closest(".scroll"));
}

/* ---------- sorting of the static tables ---------- */
function makeSortable(table) {
  const body = $("tbody", table), first = $$("tr", body);
  $$("thead th", table).forEach((head, column) => {
    if (head.classList.contains("plain")) return;
    const button = h("button", { type: "button", title: "sort" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const start = head.dataset.start || "descending";
      const next = before === null ? start : before === start ? (start === "descending" ? "ascending" : "descending") : null;
      $$("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
      if (next === null) return void body.append(...first); // the third press: the order it had
      head.setAttribute("aria-sort", next);
      sortRows();
    });
    table.addEventListener("figure", () => { if (head.hasAttribute("aria-sort")) sortRows(); });
    function sortRows() {
      const sign = head.getAttribute("aria-sort") === "ascending" ? 1 : -1;
      const key = (row) => { const cell = row.children[column]; const v = cell.dataset.value;
        return v === undefined || v === "" ? (cell.matches("th") ? cell.textContent : null) : Number(v); };
      body.append(...[...first].sort((a, b) => compare(key(a), key(b), sign)));
    }
  });
}
function compare(a, b, sign) { // what is missing comes last
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : 1;
  if (b === null || b === undefined) return -1;
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
}

/* ---------- the list of runs ---------- */
const STEP = 200;
let listing = null;
const picked = [];
function listOfRuns(where, everything) {
  const columns = [
    ["compare", (r) => h("input", { type: "checkbox", "aria-label": `compare ${r.id}`, checked: picked.includes(r.id),
      onchange: (event) => pick(r.id, event.target) }), null, "pick plain"],
    ["run", (r) => [link(r), " ", r.oracle ? h("span", { class: "badge" }, "oracle") : null, r.warnings.length ? h("span", { class: "badge warned", title: r.warnings.join("\n") }, `⚠ ${r.warnings.length}`) : null,
      r.state === "finished" ? null : h("span", { class: `badge ${r.state}` }, r.state),
      r.told ? h("div", { class: "faint small" }, r.told) : null,
      r.error ? h("div", { class: "small bad" }, r.error) : null], fullName, "plain wide"],
    ["pair", pairOf, pairOf, "pair"],
    ["backbone", (r) => r.backbone, (r) => r.backbone, ""],
    ["seed", seedOf, (r) => r.seed[0] * 1e6 + r.seed[1], "n"],
    ["target test", figureOf, (r) => r.figure, "n"],
    ["NLL", (r) => (r.figures.nll === undefined ? "" : shown("nll", r.figures.nll)), (r) => r.figures.nll, "n"],
    ["ECE or 95 % coverage", (r) => (r.figures.ece === undefined ? (r.figures.coverage_95 === undefined ? "" : `${percent(r.figures.coverage_95)}, ${number(r.figures.width_95)} wide`) : shown("ece", r.figures.ece)),
      (r) => r.figures.ece ?? r.figures.coverage_95, "n"],
    ["fit", (r) => seconds(r.seconds), (r) => r.seconds, "n"],
  ];
  let order = null, sign = 1, limit = STEP, kept = everything;
  const body = h("tbody");
  const more = h("button", { type: "button", onclick: () => { limit = Infinity; draw(); } });
  const heads = columns.map(([title, , key, kind]) => {
    const head = h("th", { scope: "col", class: kind });
    if (!key) return h("th", { scope: "col", class: kind }, h("span", { title: "choose two runs" }, "⇄"));
    head.append(h("button", { type: "button", title: "sort", onclick: () => {
      const dir = head.getAttribute("aria-sort");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      sign = dir === "ascending" ? -1 : 1;
      order = dir === "descending" ? null : key;
      if (order) head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      draw();
    } }, title));
    return head;
  });
  function draw() {
    const sorted = order ? [...kept].sort((a, b) => compare(order(a), order(b), sign)) : kept;
    body.replaceChildren(...sorted.slice(0, limit).map((run) => h("tr", {}, columns.map(([title, show, , kind]) =>
      h("td", { class: kind, "data-label": title }, show(run))))));
    more.hidden = sorted.length <= limit;
    more.textContent = `Show all ${sorted.length.toLocaleString("en")} runs`;
    box.hidden = sorted.length === 0;
    none.hidden = sorted.length !== 0;
  }
  const box = h("div", { class: "scroll" }, h("table", { class: "runs" }, h("thead", {}, h("tr", {}, heads)), body));
  const none = h("p", { class: "empty" }, "No run passes these filters.");
  where.append(box, none, more);
  draw();
  return { update: (some) => { kept = some; limit = STEP; draw(); } };
}
const tray = h("div", { id: "chosen", hidden: true, role: "status" });
function pick(id, box) {
  if (box.checked) picked.push(id); else picked.splice(picked.indexOf(id), 1);
  if (picked.length > 2) { const dropped = picked.shift(); drawTray(); $$(`input[type=checkbox]`, overview).forEach((other) => {
    if (other.getAttribute("aria-label") === `compare ${dropped}` && other !== box) other.checked = false; }); }
  drawTray();
}
function drawTray() {
  tray.hidden = picked.length === 0;
  const names = picked.map((id) => `${byId.get(id).method} seed ${seedOf(byId.get(id))}`);
  tray.replaceChildren(names.join(" and "), " ", picked.length === 2
    ? h("a", { href: `#diff/${picked.map(encodeURIComponent).join("/")}` }, "compare the two") : h("span", { class: "faint" }, "choose one more"));
}

/* ---------- charts ---------- */
const redraws = new Map();
const observer = new ResizeObserver((entries) => {
  for (const { target } of entries) { const draw = redraws.get(target);
    if (draw && Math.abs(draw.width - target.clientWidth) > 1) { draw.width = target.clientWidth; draw.call(); } }
});
function chart(draw) { // a box whose content `draw(width)` gives, now and at every other width
  const box = h("div", { class: "chart" });
  redraws.set(box, { width: 0, call: () => box.replaceChildren(...[draw(box.clientWidth)].flat()) });
  observer.observe(box);
  return box;
}
function ticksOf(low, high, most) {
  if (!(high > low)) return [low];
  const raw = (high - low) / Math.max(1, most), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((v) => v >= raw * 0.999);
  const out = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) out.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return out;
}
function logTicks(low, high) {
  const decades = Math.log10(high / low), out = [];
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5]) { const v = m * 10 ** p; if (v >= low && v <= high) out.push(v); }
  return out.length > 8 ? out.filter((_, i) => i % Math.ceil(out.length / 8) === 0) : out;
}
const span = (values) => { let low = Infinity, high = -Infinity; for (const v of values) if (v !== null) { if (v < low) low = v; if (v > high) high = v; } return [low, high]; };

/* series: {name, points: [[x, y, half?]], colour, width, dash, dots, line, bars}; options: x, y, xRange, yRange, log, marks, diagonal,
   zero, height, square, format, label */
function plot(series, options) {
  const usable = series.filter((one) => one.points.some((p) => p[1] !== null));
  return [legend(usable), chart((width) => {
    const w = Math.max(220, Math.min(width, options.square ? 420 : 4000)), left = 50, right = 20, top = 10, bottom = 36;
    const height = options.square ? w * 0.82 : options.height || Math.min(260, Math.max(180, w * 0.42));
    const xs = usable.flatMap((one) => one.points.map((p) => p[0]));
    const ys = usable.flatMap((one) => one.points.flatMap((p) => (p[1] === null ? [] : p[2] ? [p[1] - p[2], p[1] + p[2]] : [p[1]])));
    let [x0, x1] = options.xRange || span(xs), [y0, y1] = options.yRange || span(ys);
    if (options.zero) { y0 = Math.min(0, y0); y1 = Math.max(0, y1); }
    const log = options.log && y0 > 0 && y1 > 50 * y0;
    if (!(x1 > x0)) { x0 -= 0.5; x1 += 0.5; }
    if (!(y1 > y0)) { const pad = Math.abs(y0) * 0.1 || 0.5; y0 -= pad; y1 += pad; }
    if (!options.yRange) { if (log) { y0 /= 1.15; y1 *= 1.15; } else { const pad = (y1 - y0) * 0.05; if (!(options.zero && y0 === 0)) y0 -= pad; y1 += pad; } }
    const sx = (v) => left + ((v - x0) / (x1 - x0)) * (w - left - right);
    const sy = (v) => top + (1 - (log ? Math.log(v / y0) / Math.log(y1 / y0) : (v - y0) / (y1 - y0))) * (height - top - bottom);
    const svg = s("svg", { width: w, height, viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": options.label || `${options.y || ""} against ${options.x || ""}` });
    for (const v of log ? logTicks(y0, y1) : ticksOf(y0, y1, Math.max(2, Math.floor(height / 42))))
      svg.append(s("g", { class: "tick" }, s("line", { class: "gridline", x1: left, x2: w - right, y1: sy(v), y2: sy(v) }),
        s("text", { x: left - 6, y: sy(v) + 4, "text-anchor": "end" }, number(v, 3))));
    for (const v of ticksOf(x0, x1, Math.max(2, Math.floor(w / 90))))
      svg.append(s("g", { class: "tick" }, s("text", { x: sx(v), y: height - bottom + 16, "text-anchor": "middle" }, number(v, 6))));
    svg.append(s("line", { class: "gridline", x1: left, x2: w - right, y1: height - bottom, y2: height - bottom }));
    if (options.x) svg.append(s("text", { class: "label", x: (left + w - right) / 2, y: height - 4, "text-anchor": "middle" }, options.x));
    if (options.y) svg.append(s("text", { class: "label", x: 12, y: (top + height - bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(top + height - bottom) / 2})` }, options.y));
    if (options.diagonal) { const a = Math.max(x0, y0), b = Math.min(x1, y1); svg.append(s("line", { class: "mark", x1: sx(a), y1: sy(a), x2: sx(b), y2: sy(b) })); }
    if (options.zeroLine && y0 < 0 && y1 > 0) svg.append(s("line", { class: "mark", x1: left, x2: w - right, y1: sy(0), y2: sy(0) }));
    for (const mark of options.marks || []) if (mark.x >= x0 && mark.x <= x1) {
      svg.append(s("line", { class: mark.kind || "mark", x1: sx(mark.x), x2: sx(mark.x), y1: top, y2: height - bottom }));
    }
    for (const one of usable) {
      const points = one.points.filter((p) => p[1] !== null && (!log || p[1] > 0));
      if (one.bars) for (const [x, y, half] of points)
        svg.append(s("line", { x1: sx(x), x2: sx(x), y1: sy(y - half), y2: sy(y + half), style: `stroke:${one.colour};stroke-width:1;opacity:.3` }));
      if (one.line !== false) svg.append(s("path", { d: points.map(([x, y], i) => `${i ? "L" : "M"}${sx(x).toFixed(1)} ${sy(y).toFixed(1)}`).join(""),
        style: `fill:none;stroke:${one.colour};stroke-width:${one.width || 1.6};stroke-linejoin:round${one.dash ? `;stroke-dasharray:${one.dash}` : ""}` }));
      if (one.dots || points.length === 1) for (const [x, y, , radius] of points)
        svg.append(s("circle", { cx: sx(x).toFixed(1), cy: sy(y).toFixed(1), r: radius || (one.dots === true || !one.dots ? 2.6 : one.dots),
          style: `fill:${one.colour}${radius ? ";fill-opacity:.75" : ""}` }));
    }
    if (options.hover === false) return svg;
    const readout = h("div", { class: "readout" }), cursor = s("line", { class: "phase", y1: top, y2: height - bottom, visibility: "hidden" });
    svg.append(cursor);
    const all = [...new Set(xs)].sort((a, b) => a - b);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), at = x0 + (((event.clientX - box.left) * w / box.width - left) / (w - left - right)) * (x1 - x0);
      const x = all.reduce((best, v) => (Math.abs(v - at) < Math.abs(best - at) ? v : best), all[0]);
      cursor.setAttribute("x1", sx(x)); cursor.setAttribute("x2", sx(x)); cursor.setAttribute("visibility", "visible");
      const told = usable.map((one) => [one, one.points.find((p) => p[0] === x)]).filter(([, p]) => p && p[1] !== null);
      readout.textContent = `${options.xName || options.x || "x"} ${number(x, 6)}: ${told.map(([one, p]) => `${one.name} ${options.format ? options.format(p[1]) : number(p[1])}`).join(", ")}`;
    });
    svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
    return [svg, readout];
  })];
}
function legend(series) {
  return h("div", { class: "legend" }, series.filter((one) => one.name).map((one) => h("span", {},
    h("i", { class: [one.line === false ? "dot" : "", one.line === false ? "filled" : "", one.dash ? "dashed" : ""].join(" "), style: `color:${one.colour};border-color:${one.colour}` }), one.name)));
}
const palette = (i) => `var(--c${i % 7})`;
const hue = (i, k) => `hsl(${Math.round((360 * i) / k + (i % 2) * 8)} ${i % 2 ? 55 : 78}% var(--l))`;

/* ---------- a run's page ---------- */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}
const waiting = new Map();
window.transferRun = (id, packed) => waiting.get(id)?.(packed); // what a file of details calls
function packedDetails(run) {
  const inside = document.getElementById(`run:${run.id}`);
  if (inside) return Promise.resolve(inside.textContent);
  if (!data.folder) return Promise.resolve(null);
  return new Promise((resolve, reject) => {
    waiting.set(run.id, resolve);
    document.head.append(h("script", { src: `${data.folder}/${encodeURIComponent(run.id)}.js`, onerror: () => reject(new Error(`${data.folder}/${run.id}.js is not there`)) }));
  });
}
const section = (title, ...children) => h("section", {}, h("h2", {}, title), ...children);
const note = (...text) => h("p", { class: "faint small" }, ...text);

async function showRun(run) {
  const base = run.baseline === null ? null : runs[run.baseline];
  const head = [h("p", { class: "small" }, h("a", { href: "#runs" }, "← all runs")),
    h("h1", {}, `${run.method}, seed ${seedOf(run)}`), run.told ? h("p", { class: "faint small" }, run.told) : null,
    h("p", {}, pairOf(run), " ", h("span", { class: "faint" }, `· ${run.backbone} · ${run.setting} · ${run.path}`)),
    h("p", {}, h("span", { class: `badge ${run.state}` }, run.state), " ", h("span", { class: "faint small" }, [run.time, run.seconds === null ? "" : `fit in ${seconds(run.seconds)}`].filter(Boolean).join(" · "))),
    run.error ? h("div", { class: "box failed" }, h("strong", {}, "It failed. "), run.error) : null,
    !run.error && !["finished", "failed"].includes(run.state) ? h("div", { class: "box" }, run.state === "running" ? "It is running." : "It was interrupted: the same command goes on.") : null,
    run.oracle ? h("div", { class: "box" }, "Target test labels chose its checkpoint: an upper bound, not a result.") : null,
    run.warnings.length ? h("div", { class: "box" }, h("strong", {}, "Training went wrong: "), h("ul", {}, run.warnings.map((text) => h("li", {}, text)))) : null];
  const rest = h("div", {}, h("p", { class: "faint" }, "…"));
  page.replaceChildren(...head.filter(Boolean), rest);
  let d = null;
  try { const packed = await packedDetails(run); d = packed === null ? null : await unpack(packed); }
  catch (error) { rest.replaceChildren(h("p", { class: "box failed" }, `The details cannot be read: ${error.message}.`), ...repeat(run, null)); return; }
  if (!d) { rest.replaceChildren(h("p", { class: "box" }, "The details were left out of this file."), ...repeat(run, null)); return; }
  const parts = [...figures(run, base, d), ...learning(run, d), ...(run.kind === "regression" ? regression(d, base) : classification(run, base, d)),
    ...maps(run, base, d), ...extras(d), ...repeat(run, d)];
  rest.replaceChildren(...parts);
  page.dataset.ready = run.id;
}

function figures(run, base, d) {
  if (!d.metrics) return [];
  const rows = [["source test", d.metrics.source_test], ["target test", d.metrics.target_test], base ? [`target test, ${base.method}`, base.figures, base] : null].filter((row) => row && row[1]);
  const there = Object.keys(d.metrics.target_test), first = run.kind === "regression" ? FIRST.filter((key) => there.includes(key)) : [];
  const keys = [...first, ...there.filter((key) => !first.includes(key))];
  const table = h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), keys.map((key) => h("th", { scope: "col", class: "n" }, nameOf(key))))),
    h("tbody", {}, rows.map(([name, values, other]) => h("tr", {}, h("th", { scope: "row" }, other ? link(other, name) : name), keys.map((key) => h("td", { class: "n" }, shown(key, values[key])))))));
  if (base) $("tbody", table).append(h("tr", {}, h("th", { scope: "row" }, "gain"), keys.map((key) => {
    const a = d.metrics.target_test[key], b = base.figures[key];
    if (a === undefined || b === undefined || a === null || b === null) return h("td", { class: "n" }, "");
    const gain = a - b, better = HIGHER.has(key) ? gain > 0 : LOWER.has(key) ? gain < 0 : null;
    return h("td", { class: `n ${better === null || gain === 0 ? "" : better ? "good" : "bad"}` }, `${gain > 0 ? "+" : gain < 0 ? "−" : ""}${PERCENT.has(key) ? (100 * Math.abs(gain)).toFixed(1) : shown(key, Math.abs(gain))}`);
  })));
  const sel = d.selection, how = sel.candidates === 1 ? "with nothing to choose from" : sel.uses_target_labels ? `chosen by ${sel.validator} with target labels`
    : sel.validator === "last" ? "the last" : `chosen by ${sel.validator} without target labels`;
  const oracle = sel.candidates > 1 && sel.oracle && !sel.uses_target_labels && sel.oracle.step !== sel.step
    ? `; target labels would have chosen step ${sel.oracle.step.toLocaleString("en")} (${run.kind === "classification" ? percent(sel.oracle.score) : `RMSE ${number(-sel.oracle.score)}`})` : "";
  return [section("Figures", h("div", { class: "scroll" }, table),
    (d.verdict || []).map((line) => note(line)),
    note(`Checkpoint: step ${sel.step.toLocaleString("en")}, ${how}${oracle}.`),
    base ? note("Compared with ", link(base, `${base.method}, seed ${seedOf(base)}`), run.compared ? `, which differs also in ${run.compared}.` : ", the same setting and seed without transfer.", " ", h("a", { href: `#diff/${encodeURIComponent(base.id)}/${encodeURIComponent(run.id)}` }, "Config difference")) : null)];
}

function learning(run, d) {
  const PANELS = [["train", "Losses", "loss"], ["target_test", "Target test", ""], ["source_test", "Source test", ""], ["validators", "Validators", "score"], ["diagnostics", "Diagnostics", ""], ["health", "Health", ""]];
  const known = PANELS.map((panel) => panel[0]);
  for (const split of Object.keys(d.curves)) if (!known.includes(split)) PANELS.push([split, split, ""]);
  const drawn = [];
  const ends = d.phases.slice(0, -1).map(([, step]) => ({ x: step, kind: "phase" }));
  const kept = d.selection && d.selection.candidates > 1 ? [{ x: d.selection.step, kind: "mark" }] : [];
  for (const [split, title, y] of PANELS) {
    const names = Object.entries(d.curves[split] || {}).filter(([, [steps]]) => new Set(steps).size > 1);
    if (!names.length) continue;
    const groups = split === "target_test" || split === "source_test" ? inUnits(names) : split === "validators" ? bySize(names) : split === "health" || split === "diagnostics" ? byKind(names) : [["", names]];
    for (const [what, some] of groups) {
      const series = some.map(([name, [steps, values]], i) => ({ name: (split === "target_test" || split === "source_test" ? nameOf(name) : name.replaceAll("_", " ")) + (d.selection && name === d.selection.validator && split === "validators" ? " (chooses)" : ""),
        points: steps.map((step, j) => [step, values[j]]), colour: palette(i), width: d.selection && name === d.selection.validator ? 2.6 : 1.6, dash: i >= 7 ? "6 3" : null, dots: steps.length < 30 }));
      drawn.push(h("div", {}, h("h3", {}, title + (what ? `, ${what}` : "")), plot(series, { x: "step", y, log: split !== "target_test" && split !== "validators", marks: [...ends, ...kept], label: `${title} by step` })));
    }
  }
  if (!drawn.length) return d.log && d.log.length ? [section("Last lines of the log", h("pre", {}, d.log.join("\n")))] : [];
  const words = [kept.length ? "Dashed: the step that was kept." : "", d.phases.length > 1 ? `Dotted: the ends of the phases ${d.phases.map(([name]) => name).join(", ")}.` : "",
    d.curves.target_test ? "Figures on target test labels are for the record and chose nothing" + (d.selection && d.selection.uses_target_labels ? ", but here: selection by the oracle." : ".") : ""];
  return [section("Learning curves", note(words.filter(Boolean).join(" ")), h("div", { class: "grid" }, drawn)),
    d.log && d.log.length ? section("Last lines of the log", h("pre", {}, d.log.join("\n"))) : null].filter(Boolean);
}
const inUnits = (names) => [["accuracy", names.filter(([n]) => ["accuracy", "macro_f1", "hos", "os_star", "unknown_accuracy"].includes(n))],
  ["error", names.filter(([n]) => ["rmse", "mae", "crps"].includes(n))], ["NLL", names.filter(([n]) => n === "nll")],
  ["calibration", names.filter(([n]) => ["ece", "brier", "ece_equal_mass"].includes(n))], ["coverage", names.filter(([n]) => n.startsWith("coverage_") && !n.includes("error"))]].filter(([, some]) => some.length);
function bySize(names) { // scores of different scales apart, each readable
  const groups = [];
  for (const one of names) {
    const [low, high] = span(one[1][1]);
    const group = groups.find((g) => { const a = Math.min(g.low, low), b = Math.max(g.high, high); return b - a <= 4 * Math.max(Math.min(g.high - g.low, high - low), 1e-9); });
    if (group) { group.names.push(one); group.low = Math.min(group.low, low); group.high = Math.max(group.high, high); } else groups.push({ names: [one], low, high });
  }
  return groups.map((g) => [groups.length > 1 ? g.names.map(([n]) => n).slice(0, 3).join(", ") + (g.names.length > 3 ? ", …" : "") : "", g.names]);
}
function byKind(names) {
  const groups = new Map();
  for (const one of names) { const key = one[0].startsWith("gradient_norm") ? "gradient norms" : one[0].startsWith("feature_norm") ? "feature norms" : one[0].includes("accuracy") ? "accuracy" : one[0].endsWith("_classes") ? "effective classes" : one[0].replaceAll("_", " ");
    groups.set(key, [...(groups.get(key) || []), one]); }
  return [...groups];
}

/* ---------- classification ---------- */
function classification(run, base, d) {
  if (!d.per_class) return [];
  const name = (i) => (d.classes[i] ?? `class ${i}`);
  const out = [];
  const matrices = Object.keys(d.matrices);
  if (matrices.length) {
    const holder = h("div");
    const choice = h("select", { onchange: () => holder.replaceChildren(matrix(d.matrices[choice.value], name, base && choice.value.endsWith("baseline") ? base.method : "")) },
      matrices.map((key) => h("option", { value: key }, key.replace("baseline", base ? base.method : "baseline"))));
    holder.append(matrix(d.matrices[matrices[0]], name));
    out.push(section("Confusion matrix", h("div", { class: "toolbar" }, h("label", { class: "field" }, "Shown", choice)), holder,
      d.confused.length ? h("details", {}, h("summary", {}, "Commonest mistakes on the target"), confusedList(d, name)) : null));
  } else out.push(section("Commonest mistakes on the target", note(`${d.classes.length} classes: too many for a matrix.`), confusedList(d, name)));
  out.push(section("Reliability", h("div", { class: "grid" },
    h("div", {}, h("h3", {}, "Accuracy against confidence"), plot(d.reliability.map((one) => ({ name: `${one.name}, ECE ${shown("ece", one.ece)}`, points: one.bins.map(([c, a, share]) => [c, a, null, 2 + 9 * Math.sqrt(share)]),
      colour: one.domain === "target" ? palette(1) : palette(0), dash: one.before ? "2 3" : null, dots: 3 })), { x: "confidence", y: "accuracy", xRange: [0, 1], yRange: [0, 1], diagonal: true, square: true, hover: false, label: "Reliability diagram" })),
    h("div", {}, h("h3", {}, "Errors among the surest"), plot(d.reliability.filter((one) => !one.before).map((one) => ({ name: `${one.name}, AURC ${shown("aurc", one.aurc)}`, points: one.risk.map(([k, e]) => [100 * k, 100 * e]),
      colour: one.domain === "target" ? palette(1) : palette(0) })), { x: "samples kept, the surest first, %", y: "errors, %", zero: true, square: true, hover: false, label: "Risk and coverage" }))),
    note("On the diagonal, confidence is as often right as it says; below it, the model is too sure. The larger a dot, the more samples it stands for.")));
  out.push(...perClass(d, base, name));
  out.push(...changes(d, base, name));
  return out;
}
const confusedList = (d, name) => h("ol", { class: "small" }, d.confused.map(([a, b, n]) => h("li", {}, `${name(a)} taken for ${name(b)}: ${n}`)));
function matrix(counts, name) {
  return chart((width) => {
    const k = counts.length, longest = Math.max(...counts.map((_, i) => Math.min(14, name(i).length)));
    const left = 26 + Math.min(longest * 6.6, width * 0.3), cell = Math.max(4, Math.min(38, (width - left - 6) / k)), top = 22;
    const upright = longest * 7 < cell, bottom = upright ? 40 : 40 + longest * 6.8;
    const w = Math.max(left + cell * k + 6, Math.min(width, left + 170)), height = top + cell * k + bottom;
    const svg = s("svg", { width: w, height, viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": "Confusion matrix: rows are true classes, columns predicted ones" });
    const short = (i) => (name(i).length > 14 ? `${name(i).slice(0, 13)}…` : name(i));
    counts.forEach((row, i) => {
      const total = row.reduce((a, b) => a + b, 0);
      row.forEach((n, j) => {
        const share = total ? n / total : 0, x = left + j * cell, y = top + i * cell;
        svg.append(s("rect", { x, y, width: cell - 1, height: cell - 1, style: `fill:var(--c0);fill-opacity:${n ? (0.08 + 0.92 * share).toFixed(3) : 0.04}` }, s("title", {}, `${name(i)} taken for ${name(j)}: ${n} of ${total} (${percent(share)})`)));
        if (cell >= 24 && share >= 0.005) svg.append(s("text", { x: x + cell / 2 - 0.5, y: y + cell / 2 + 4, "text-anchor": "middle", "pointer-events": "none", style: `fill:${share > 0.55 ? "var(--bg)" : "var(--fg)"};font-size:${cell < 30 ? 10 : 11.5}px` }, (100 * share).toFixed(0)));
      });
      if (cell >= 9) {
        svg.append(s("text", { x: left - 5, y: top + i * cell + cell / 2 + 4, "text-anchor": "end" }, short(i)));
        const x = left + i * cell + cell / 2, y = top + k * cell + 12;
        svg.append(upright ? s("text", { x, y: y + 2, "text-anchor": "middle" }, short(i)) : s("text", { x: x + 4, y: y - 6, "text-anchor": "end", transform: `rotate(-90 ${x + 4} ${y - 6})` }, short(i)));
      }
    });
    svg.append(s("text", { class: "label", x: left, y: 12 }, "% of the true class (rows)"), s("text", { class: "label", x: left + (cell * k) / 2, y: height - 6, "text-anchor": "middle" }, "predicted class"));
    return svg;
  });
}
function perClass(d, base, name) {
  const compared = d.per_class.some((row) => row[3] !== null);
  const rows = compared ? [...d.per_class].sort((a, b) => (b[2] - b[3]) - (a[2] - a[3])) : [...d.per_class].sort((a, b) => b[2] - a[2]);
  const some = rows.length > 40 ? [...rows.slice(0, 20), ...rows.slice(-20)] : rows;
  const drawing = chart((width) => {
    const longest = Math.max(...some.map((row) => Math.min(16, name(row[0]).length)));
    const left = 14 + longest * 6.6, right = 62, row = 24, top = 6, w = Math.min(width, 760), height = top + row * some.length + 34;
    const sx = (v) => left + v * (w - left - right);
    const svg = s("svg", { width: w, height, viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": "Share found of each class" });
    for (const v of [0, 0.25, 0.5, 0.75, 1]) svg.append(s("g", { class: "tick" }, s("line", { class: "gridline", x1: sx(v), x2: sx(v), y1: top, y2: height - 30 }), s("text", { x: sx(v), y: height - 16, "text-anchor": "middle" }, `${100 * v}`)));
    svg.append(s("text", { class: "label", x: (left + w - right) / 2, y: height - 2, "text-anchor": "middle" }, "share of the class found, %"));
    some.forEach(([i, n, now, was], at) => {
      const y = top + at * row + row / 2, short = name(i).length > 16 ? `${name(i).slice(0, 15)}…` : name(i);
      svg.append(s("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, short, s("title", {}, `${name(i)}, ${plural(n, "sample")}`)));
      if (was !== null) {
        const better = now >= was, colour = now === was ? "var(--faint)" : better ? "var(--good)" : "var(--bad)";
        svg.append(s("line", { x1: sx(was), x2: sx(now), y1: y, y2: y, style: `stroke:${colour};stroke-width:3` }),
          s("circle", { cx: sx(was), cy: y, r: 4.5, style: "fill:var(--bg);stroke:var(--faint);stroke-width:2" }),
          s("text", { x: w - 4, y: y + 4, "text-anchor": "end", style: `fill:${colour}` }, `${now > was ? "+" : now < was ? "−" : "±"}${(100 * Math.abs(now - was)).toFixed(1)}`));
        svg.append(s("circle", { cx: sx(now), cy: y, r: 5, style: `fill:${colour}` }));
      } else svg.append(s("line", { x1: sx(0), x2: sx(now), y1: y, y2: y, style: "stroke:var(--c0);stroke-width:8" }), s("text", { x: w - 4, y: y + 4, "text-anchor": "end" }, percent(now)));
    });
    return svg;
  });
  return [section(compared ? "Gains and losses by class" : "By class", compared ? h("div", { class: "legend" }, h("span", {}, h("i", { class: "dot", style: "color:var(--faint)" }), base.method), h("span", {}, h("i", { class: "dot filled good" }), "this run, better"), h("span", {}, h("i", { class: "dot filled bad" }), "worse")) : null,
    rows.length > some.length ? note(`The first and the last 20 of ${rows.length} classes.`) : null, drawing)];
}
function changes(d, base, name) {
  if (!d.changes) return base && d.comparable === false ? [section("What changed", note(`The target test sets of this run and of ${base.method} are not the same, so that samples cannot be compared.`))] : [];
  const { counts } = d.changes, total = Object.values(counts).reduce((a, b) => a + b, 0);
  const kinds = [["both_right", "right in both", "var(--c6)", 0.35], ["gained", "wrong → right", "var(--good)", 1], ["lost", "right → wrong", "var(--bad)", 1], ["both_wrong", "wrong in both", "var(--c6)", 0.8]];
  const bar = h("div", { class: "split", role: "img", "aria-label": kinds.map(([key, word]) => `${word} ${counts[key]}`).join(", ") },
    kinds.map(([key, , colour, opacity]) => h("span", { style: `flex:${counts[key] / total} 0 0;background:${colour};opacity:${opacity}` })));
  const words = h("div", { class: "legend" }, kinds.map(([key, word, colour, opacity]) => h("span", {}, h("i", { class: "dot filled", style: `color:${colour};opacity:${opacity}` }), `${word}: ${counts[key].toLocaleString("en")} (${percent(counts[key] / total)})`)));
  const gallery = (key, title) => {
    const some = d.changes[key], all = counts[key];
    return h("div", {}, h("h3", { class: key === "gained" ? "good" : "bad" }, `${title} (${all.toLocaleString("en")})`),
      some.length ? h("ul", { class: "pictures" }, some.map((one) => h("li", {}, one.image ? h("img", { src: one.image, alt: `${one.id}: ${name(one.label)}` }) : h("code", {}, one.id),
        h("div", {}, h("strong", {}, name(one.label))), h("div", { class: "faint", title: one.id }, `${name(one.before[0])} ${percent(one.before[1], 0)} → ${name(one.after[0])} ${percent(one.after[1], 0)}`))))
        : note(all ? `None of them is among the ${d.changes.pictures} samples whose images are kept.` : "None."));
  };
  return [section(`Samples that changed against ${base.method}`, bar, words, note(`McNemar's exact test of as many gains as losses: p = ${number(d.changes.p, 2)}.`), gallery("gained", "Wrong → right"), gallery("lost", "Right → wrong"),
    note(d.changes.pictures ? `Examples among the ${d.changes.pictures} target test samples whose images a run keeps. ` : "", `In bold the true class; below it what ${base.method} said and what this run says, with their probabilities.`))];
}

/* ---------- regression ---------- */
function regression(d, base) {
  if (!d.outputs) return [];
  return d.outputs.map((o, t) => {
    const ends = span(o.points.flatMap(([a, b]) => [a, b])), said = d.outputs.length > 1 ? `, output ${t}` : "";
    return section(`Predictions${said}`, h("div", { class: "grid" },
      h("div", {}, h("h3", {}, "Predicted against true"), plot([{ name: "mean and 95 % interval", points: o.points, colour: palette(0), line: false, dots: 2.2, bars: true }], { x: "true", y: "predicted", xRange: ends, diagonal: true, hover: false, square: true })),
      h("div", {}, h("h3", {}, "Residuals"), plot([{ name: `true − predicted, mean ${number(o.bias, 3)}`, points: o.points.map(([a, b]) => [b, a - b]), colour: palette(1), line: false, dots: 2.2 }], { x: "predicted", y: "residual", zeroLine: true, zero: true, hover: false, square: true })),
      h("div", {}, h("h3", {}, "Intervals: coverage"), plot([{ name: "this run", points: o.coverage.map(([a, b]) => [100 * a, 100 * b]), colour: palette(0), dots: 2.4 },
        ...(o.base_coverage ? [{ name: base.method, points: o.base_coverage.map(([a, b]) => [100 * a, 100 * b]), colour: palette(6), dash: "4 3" }] : [])], { x: "stated level, %", y: "true values inside, %", xRange: [0, 100], yRange: [0, 100], diagonal: true, square: true, hover: false }))),
      note(`RMSE ${number(o.rmse)}${o.base_rmse === undefined ? "" : ` (${base.method}: ${number(o.base_rmse)}; nearer to the truth for ${percent(o.closer)} of the samples)`}. Mean width of 95 % intervals ${number(o.width)}; of the labels' own spread alone ${number(o.plain_width)}.`,
        o.conformal ? ` Conformal intervals hold ${percent(o.conformal[0])} at a mean width of ${number(o.conformal[1])}.` : "",
        d.samples > o.points.length ? ` ${o.points.length} of ${d.samples.toLocaleString("en")} samples are drawn.` : ""));
  });
}

/* ---------- feature maps ---------- */
function maps(run, base, d) {
  const found = [["before", base && base.id !== run.id ? `Before: features of ${base.method}` : "Before"], ["after", `After: features of ${run.method}`]].filter(([key]) => d.maps && d.maps[key]);
  if (!found.length) return [];
  const byClass = run.kind === "classification", holder = h("div", { class: "grid" });
  const values = found.flatMap(([key]) => d.maps[key].labels), most = Math.max(...values), least = Math.min(...values);
  const name = (i) => (d.classes && d.classes[i]) ?? `class ${i}`;
  const colourOf = (label) => (byClass ? hue(label, most + 1) : `hsl(${Math.round(260 - 230 * ((label - least) / (most - least || 1)))} 70% var(--l))`);
  const choice = h("select", { onchange: () => draw() }, h("option", { value: "both" }, byClass ? "class (colour), domain (shape)" : "label (colour), domain (shape)"), h("option", { value: "domain" }, "domain"));
  const only = h("select", { onchange: () => draw() }, h("option", { value: "" }, "both domains"), h("option", { value: "source" }, "source"), h("option", { value: "target" }, "target"));
  function draw() {
    holder.replaceChildren(...found.map(([key, title]) => {
      const m = d.maps[key], how = { pca: "PCA", tsne: "t-SNE", umap: "UMAP" }[m.how];
      return h("div", {}, h("h3", {}, title), chart((width) => {
        const w = Math.min(width, 520), wide = Math.max(...m.x, 1), high = Math.max(...m.y, 1), scale = (w - 16) / wide, height = Math.max(120, Math.min(w, high * scale + 16)), k = Math.min(scale, (height - 16) / high);
        const svg = s("svg", { width: w, height, viewBox: `0 0 ${w} ${height}`, role: "img", "aria-label": `${how} of the features, ${title}` });
        m.x.forEach((x, i) => {
          const source = i < m.source;
          if (only.value && only.value !== (source ? "source" : "target")) return;
          const colour = choice.value === "domain" ? (source ? "var(--c0)" : "var(--c1)") : colourOf(m.labels[i]);
          const cx = 8 + x * k, cy = height - 8 - m.y[i] * k, told = s("title", {}, `${source ? "source" : "target"}, ${byClass ? name(m.labels[i]) : number(m.labels[i])}`);
          svg.append(source ? s("circle", { cx, cy, r: 2.6, style: `fill:none;stroke:${colour};stroke-width:1.2;opacity:.75` }, told) : s("path", { d: `M${cx} ${cy - 4}l3.6 6.4h-7.2z`, style: `fill:${colour};opacity:.85` }, told));
        });
        return svg;
      }), note(m.explained ? `${how}: the two axes explain ${percent(m.explained[0] + m.explained[1], 0)} of the variance.` : `${how}: distances between groups mean little.`));
    }), h("div", { class: "legend", style: "grid-column:1/-1" }, h("span", {}, "○ source"), h("span", {}, "▲ target"),
      choice.value === "domain" ? [h("span", {}, h("i", { class: "dot filled", style: "color:var(--c0)" }), "source"), h("span", {}, h("i", { class: "dot filled", style: "color:var(--c1)" }), "target")]
        : byClass && most < 40 ? [...new Set(values)].sort((a, b) => a - b).map((i) => h("span", {}, h("i", { class: "dot filled", style: `color:${colourOf(i)}` }), name(i))) : byClass ? null : h("span", {}, `blue: ${number(least, 3)}, red: ${number(most, 3)}`)));
  }
  draw();
  const distance = d.health && d.health.proxy_a_distance;
  return [section("Feature map", h("div", { class: "toolbar" }, h("label", { class: "field" }, "Colour", choice), h("label", { class: "field" }, "Shown", only)), holder,
    note(distance === null || distance === undefined ? "" : `Proxy A-distance of this run's features: ${number(distance, 3)} (0: the domains look alike, 2: they are told apart without error). `,
      d.maps.before ? "" : "There is no run without transfer of this pair and seed to show the features before. ", "A method on frozen features is drawn before its own map."))];
}

/* ---------- the rest ---------- */
function extras(d) {
  const list = [["Validators, final scores", d.validators], ["Fit", d.fit], ["Calibration", d.calibration], ["Conformal", d.conformal], ["Out of distribution", d.metrics && d.metrics.ood]].filter(([, v]) => v && Object.keys(v).length);
  const flat = (value, prefix = "") => Object.entries(value).flatMap(([key, v]) => (v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${prefix}${key}.`) : [[prefix + key, v]]));
  return list.length ? [section("Further figures", list.map(([title, values]) => h("details", {}, h("summary", {}, title), h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, flat(values).map(([key, v]) => h("tr", {}, h("td", {}, key), h("td", { class: "n" }, typeof v === "number" ? number(v) : String(v)))))))))) ] : [];
}
function repeat(run, d) {
  const copy = h("button", { type: "button", onclick: async () => { try { await navigator.clipboard.writeText(run.command); copy.textContent = "Copied"; } catch { getSelection().selectAllChildren(command); copy.textContent = "Selected: copy it"; } } }, "Copy");
  const command = h("pre", { class: "command" }, run.command || "the command was not recorded");
  const where = d ? [["git", d.manifest.git], ["Python", d.manifest.python], ["platform", d.manifest.platform], ["device", [d.manifest.device, d.manifest.device_name].filter(Boolean).join(", ")], ["threads", d.manifest.threads], ...Object.entries(d.libraries)].filter(([, v]) => v !== null && v !== undefined && v !== "") : [];
  const siblings = runs.filter((other) => other !== run && other.cell !== null && other.cell === run.cell);
  const config = Object.entries(configOf(run));
  return [section("Repeat it", command, run.command ? copy : null, where.length ? h("details", {}, h("summary", {}, "Versions and machine"), h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, where.map(([k, v]) => h("tr", {}, h("td", {}, k), h("td", {}, String(v)))))))) : null,
      h("details", {}, h("summary", {}, `Configuration (${config.length} keys)`), h("pre", {}, config.map(([k, v]) => `${k}=${v}`).join("\n"))),
      h("p", {}, h("a", { href: `#diff/${encodeURIComponent(run.id)}` }, "Compare its configuration with another run's"))),
    siblings.length ? section("Other seeds of the same cell", h("ul", {}, siblings.slice(0, 50).map((other) => h("li", {}, link(other, `seed ${seedOf(other)}`), " ", h("span", { class: "faint" }, figureOf(other) || other.state))))) : null].filter(Boolean);
}

/* ---------- the difference of two runs ---------- */
const configOf = (run) => Object.fromEntries(run.config.map((number) => data.settings[number]).sort((a, b) => (a[0] < b[0] ? -1 : 1)));
function showDiff(first, second) {
  const option = (id) => runs.map((run) => h("option", { value: run.id, selected: run.id === id }, `${fullName(run)}, ${pairOf(run)}, seed ${seedOf(run)}${run.state === "finished" ? "" : ` (${run.state})`}`));
  const go = () => { location.hash = `#diff/${encodeURIComponent(a.value)}/${encodeURIComponent(b.value)}`; };
  const a = h("select", { id: "first", onchange: go }, h("option", { value: "" }, "choose a run"), option(first)), b = h("select", { id: "second", onchange: go }, h("option", { value: "" }, "choose a run"), option(second));
  const all = h("input", { type: "checkbox", id: "equal", onchange: () => draw() });
  const out = h("div");
  function draw() {
    const x = byId.get(first), y = byId.get(second);
    if (!x || !y) return void out.replaceChildren(note("Choose two runs."));
    const left = configOf(x), right = configOf(y), keys = [...new Set([...Object.keys(left), ...Object.keys(right)])].sort();
    const differ = keys.filter((key) => left[key] !== right[key]), some = all.checked ? keys : differ;
    const figureKeys = [...new Set([...Object.keys(x.figures), ...Object.keys(y.figures)])];
    const rows = (list) => h("div", { class: "scroll" }, h("table", { class: "diff" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), h("th", { scope: "col" }, link(x), ` seed ${seedOf(x)}`), h("th", { scope: "col" }, link(y), ` seed ${seedOf(y)}`))), h("tbody", {}, list)));
    out.replaceChildren(section(`Configuration: ${plural(differ.length, "difference")}`, some.length ? rows(some.map((key) => h("tr", { class: left[key] === right[key] ? "same" : "" }, h("th", { scope: "row" }, h("code", {}, key)), h("td", {}, left[key] ?? "–"), h("td", {}, right[key] ?? "–")))) : note("The configurations are the same.")),
      figureKeys.length ? section("Figures on the target test set", rows(figureKeys.map((key) => h("tr", {}, h("th", { scope: "row" }, nameOf(key)), h("td", {}, shown(key, x.figures[key])), h("td", {}, shown(key, y.figures[key])))))) : "",
      section("Commands", h("pre", {}, x.command || "–"), h("pre", {}, y.command || "–")));
  }
  page.replaceChildren(h("h1", {}, "Compare two runs"), h("div", { class: "toolbar" }, h("label", { class: "field" }, "First", a), h("label", { class: "field" }, "Second", b),
    h("button", { type: "button", onclick: () => { location.hash = `#diff/${encodeURIComponent(second || "")}/${encodeURIComponent(first || "")}`; } }, "Swap"),
    h("label", { class: "small" }, all, " equal keys too")), out);
  draw();
}

/* ---------- which page ---------- */
function route() {
  const [what, ...rest] = location.hash.slice(1).split("/").map(decodeURIComponent);
  redraws.clear(); observer.disconnect();
  delete page.dataset.ready;
  const inside = what === "run" || what === "diff" || what === "cell";
  overview.hidden = inside; page.hidden = !inside;
  for (const a of $$("header nav a")) { if ((a.getAttribute("href").slice(1).split("/")[0] || "") === (inside ? (what === "diff" ? "diff" : "runs") : what === "runs" ? "runs" : "")) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current"); }
  if (what === "run") {
    const run = byId.get(rest[0]);
    if (run) showRun(run); else page.replaceChildren(h("h1", {}, "There is no such run"), h("p", {}, h("a", { href: "#" }, "All runs")));
    document.title = run ? `${run.method}, seed ${seedOf(run)}` : data.title;
  } else if (what === "diff") { showDiff(rest[0], rest[1]); document.title = "Compare two runs"; }
  else if (what === "cell") {
    const some = runs.filter((run) => run.cell === rest[0]);
    page.replaceChildren(h("p", { class: "small" }, h("a", { href: "#" }, "← the table")), h("h1", {}, some.length ? `${some[0].method}: ${pairOf(some[0])}` : "No runs"), some.length && some[0].told ? h("p", { class: "faint small" }, some[0].told) : "");
    listOfRuns(page, some);
    page.append(tray);
  } else { document.title = data.title; overview.append(tray); }
  if (inside) scrollTo({ top: 0, behavior: "instant" });
  else if (what === "runs") $("#runs").scrollIntoView();
  else if (what === "") scrollTo({ top: 0, behavior: "instant" });
}
drawFilters();
$$(".results th small").forEach((told) => { told.title = told.textContent; told.addEventListener("click", () => told.classList.toggle("whole")); });
$$("table.results").forEach((table) => { makeSortable(table); chooseFigure(table); });
runs.forEach((run) => { run.search = [fullName(run), pairOf(run), run.backbone, run.setting, run.state, run.path, run.error || "", ...run.warnings].join(" ").toLowerCase(); });
const holder = h("section", { id: "runs" }, h("h2", {}, "Runs"));
overview.append(holder);
listing = listOfRuns(holder, runs);
applyFilters();
addEventListener("hashchange", route);
route();
})();
