"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with attributes and children; children that are text stay text. */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** What a reader has chosen, kept over a reload of this tab; without storage it lasts as long as the page. */
const memory = {
  key: "hedgemamba " + location.pathname,
  read() { try { return JSON.parse(sessionStorage.getItem(this.key)) || {}; } catch { return {}; } },
  write(change) { try { sessionStorage.setItem(this.key, JSON.stringify({ ...this.read(), ...change })); } catch { /* private mode */ } },
};

// --- records ------------------------------------------------------------------------------------------------

const records = D.records.rows.map((row) => Object.assign({}, D.records.constant,
  Object.fromEntries(row.map((value, i) => [D.records.columns[i], value]).filter(([, value]) => value !== null))));

function recordLink(ids, text, attributes) {
  return ids.length ? el("a", { href: "#record=" + ids.join(","), ...attributes }, text) : el("span", attributes, text);
}

function copyable(command) {
  const button = el("button", { type: "button", onclick: () => copy(command, button) }, "Copy");
  return el("div", { class: "command" }, el("code", {}, command), button);
}

async function copy(text, button) {
  let done = true;
  try { await navigator.clipboard.writeText(text); } catch {
    const area = el("textarea", { class: "sr" });
    area.value = text;
    (button.closest("dialog") || document.body).append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Select it";
  $("live").textContent = done ? "Command copied" : "Copying is not allowed here";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function pairs(record, prefix) {
  const found = Object.entries(record).filter(([name]) => name.startsWith(prefix));
  return found.length ? el("dl", { class: "kv" }, found.map(([name, value]) => [el("dt", {}, name.slice(prefix.length)), el("dd", {}, show(value))])) : null;
}

function show(value) {
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function recordDetail(record, open) {
  const group = (title, prefix, unfolded) => {
    const list = pairs(record, prefix);
    return list && el("details", { open: unfolded }, el("summary", {}, title), list);
  };
  return el("div", { class: "one" },
    el("h3", {}, `${record.study} / ${record.cell}`),
    el("p", { class: "muted" }, el("a", { href: record._href, class: "file" }, "record.json"), ` · key ${record.key}`,
      record["provenance.git_commit"] ? ` · commit ${record["provenance.git_commit"].slice(0, 12)}` : "",
      record["provenance.git_dirty"] ? " with changes" : "", record["provenance.device"] ? ` · ${record["provenance.device"]}` : ""),
    record["provenance.command"] ? [el("h4", {}, "Made by"), copyable(record["provenance.command"])] : null,
    group("Metrics", "metrics.", open), group("Settings", "settings.", false), group("Parameters and tokens", "params.", false),
    group("Time", "timing.", false), group("Provenance", "provenance.", false));
}

function openFromHash() {
  const match = /^#record=([\d,]+)$/.exec(location.hash);
  const dialog = $("detail");
  if (!match) { if (dialog.open) dialog.close(); return; }
  const found = match[1].split(",").map((id) => records[Number(id)]).filter(Boolean);
  const title = found.length === 1 ? "The record behind this number" : `The ${found.length} records behind this number`;
  dialog.replaceChildren(el("div", { class: "detail" },
    el("div", { class: "top" }, el("h2", { id: "detail-title" }, title), el("button", { type: "button", onclick: () => dialog.close() }, "Close")),
    found.map((record) => recordDetail(record, found.length === 1))));
  if (!dialog.open) dialog.showModal();
}

function closed() {
  if (location.hash.startsWith("#record=")) history.pushState(null, "", location.pathname + location.search);
}

// --- verdicts -----------------------------------------------------------------------------------------------

const SIGNS = { reproduced: "✓", "not reproduced": "✕", undecided: "?" };

function badge(verdict, extra) {
  return el("span", { class: "badge " + verdict.replace(" ", "-") }, el("span", { "aria-hidden": "true" }, SIGNS[verdict]), verdict + (extra || ""));
}

function verdicts() {
  for (const verdict of Object.keys(SIGNS)) {
    const count = D.claims.filter((claim) => claim.verdict === verdict).length;
    if (count) $("tally").append(badge(verdict, ` ${count}`));
  }
  for (const claim of D.claims) {
    const head = claim.findings.find((finding) => finding.where === claim.where) || claim.findings[0];
    $("claims").append(el("article", { class: `card claim is-${claim.verdict.replace(" ", "-")}`, id: claim.id },
      el("header", {}, el("span", { class: "id" }, claim.id), badge(claim.verdict)),
      el("h3", {}, claim.text),
      el("p", { class: "muted" }, `Paper: ${claim.paper}`),
      el("p", {}, `At ${claim.where}: ${head.why}.`),
      head.decide ? [el("p", { class: "muted" }, "This run would decide it:"), copyable(head.decide)] : null,
      el("details", {}, el("summary", {}, "Rule, evidence and controls"),
        el("h4", {}, "Rule, fixed before any record was judged"), el("p", {}, claim.rule), el("p", { class: "muted" }, claim.reason),
        [...claim.findings].reverse().map((finding) => el("div", { class: "place" },
          el("p", {}, badge(finding.verdict), ` ${finding.where}: ${finding.why}`),
          el("ul", {}, finding.evidence.map((line) => el("li", {}, line)),
            finding.controls.map((line) => el("li", {}, el("em", {}, "control: "), line))),
          finding.records.length ? recordLink(finding.records, `${finding.records.length} record${finding.records.length > 1 ? "s" : ""}`) : null,
          finding.decide && finding !== head ? copyable(finding.decide) : null)))));
  }
}

// --- tables -------------------------------------------------------------------------------------------------

const COLOURS = D.colours;
const dark = () => document.documentElement.dataset.theme === "dark";
const colour = (key) => (COLOURS[key] || COLOURS.other)[dark() ? 1 : 0];
const filter = { study: "", teacher: "", mixer: "", text: "" };

function sorter(compare) {
  return (event) => {
    const header = event.currentTarget.closest("th");
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const column = [...header.parentNode.children].indexOf(header);
    compare(column, descending ? -1 : 1);
    $("live").textContent = `Sorted by ${header.textContent}, ${descending ? "descending" : "ascending"}`;
  };
}

/** Missing values go last whichever way; numbers by size, texts as people count. */
function order(a, b, sign) {
  const missing = (v) => v === null || v === undefined || v === "";
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
}

function cellOf(row, column) {
  const cell = row.cells[column.key];
  const names = [column.key.startsWith("paper_") ? "paper" : "", cell ? cell.mark : ""].filter(Boolean).join(" ");
  if (!cell) return el("td", { class: names }, "–");
  const [value, spread] = cell.text.split(" ± ");
  const text = [value, spread === undefined ? null : el("span", { class: "spread" }, ` ± ${spread}`)];
  return el("td", { class: names }, column.key.startsWith("paper_") ? text : recordLink(row.records, text, { title: cell.mark || null }));
}

function block(table, name) {
  const columns = table.columns.filter((column) => column.block === name);
  const body = el("tbody");
  const fill = (rows) => body.replaceChildren(...rows.map((row) => {
    const head = el("th", { scope: "row" }, row.colour ? el("span", { class: "swatch", style: `background:${colour(row.colour)}` }) : null, row.label);
    const line = el("tr", {}, head, columns.map((column) => cellOf(row, column)));
    line.row = row;
    return line;
  }));
  const sort = sorter((index, sign) => {
    const value = (row) => (index === 0 ? row.label : (row.cells[columns[index - 1].key] || { value: null }).value);
    fill([...table.rows].sort((a, b) => order(value(a), value(b), sign)));
    apply();
  });
  const header = (label, scope) => el("th", { scope: "col" }, el("button", { type: "button", onclick: sort }, label));
  fill(table.rows);
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, header("row"), columns.map((c) => header(c.header)))), body));
}

function tableCard(table) {
  const names = [...new Set(table.columns.map((column) => column.block))];
  const holder = el("div");
  const tabs = names.map((name, i) => el("button", { type: "button", "aria-pressed": String(i === 0), onclick: () => choose(name) }, name));
  const choose = (name) => {
    tabs.forEach((tab, i) => tab.setAttribute("aria-pressed", String(names[i] === name)));
    holder.replaceChildren(block(table, name));
    apply();
  };
  const card = el("article", { class: "card table" }, el("h3", {}, table.name), el("p", { class: "muted" }, table.caption),
    names.length > 1 ? el("div", { class: "tabs", role: "group", "aria-label": "Columns" }, tabs) : null, holder,
    table.notes.length ? el("details", { class: "muted notes" }, el("summary", {}, "Notes"), el("ul", {}, table.notes.map((note) => el("li", {}, note)))) : null);
  card.table = table;
  holder.replaceChildren(block(table, names[0]));
  return card;
}

/** Hide what the filters leave out. */
function apply() {
  const matches = (row) => (!filter.teacher || row.teachers.includes(filter.teacher)) && (!filter.mixer || row.mixers.includes(filter.mixer))
    && (!filter.text || row.search.includes(filter.text.toLowerCase()));
  let shown = 0;
  for (const card of document.querySelectorAll(".card.table")) {
    let any = false;
    for (const line of card.querySelectorAll("tbody tr")) {
      line.hidden = !matches(line.row);
      any = any || !line.hidden;
    }
    card.hidden = !any || Boolean(filter.study && card.table.study !== filter.study);
    shown += !card.hidden;
  }
  $("none").hidden = shown > 0;
  memory.write({ filter });
}

function tables() {
  const list = $("table-list");
  list.append(...D.tables.map(tableCard), el("p", { id: "none", class: "card", hidden: true }, "No row fits these filters."));
  const options = (key, values) => {
    const select = $("f-" + key);
    select.append(el("option", { value: "" }, "all"), ...[...new Set(values)].sort().map((value) => el("option", { value }, value)));
    select.addEventListener("change", () => { filter[key] = select.value; apply(); });
    return select;
  };
  const rows = D.tables.flatMap((table) => table.rows);
  options("study", D.tables.map((table) => table.study));
  options("teacher", rows.flatMap((row) => row.teachers));
  options("mixer", rows.flatMap((row) => row.mixers));
  $("f-text").addEventListener("input", (event) => { filter.text = event.target.value; apply(); });
  const set = (values) => { for (const key of Object.keys(filter)) { filter[key] = values[key] || ""; $("f-" + key).value = filter[key]; } apply(); };
  $("f-clear").addEventListener("click", () => set({}));
  set(memory.read().filter || {});
}

// --- plots --------------------------------------------------------------------------------------------------

const SHAPES = { solid: "", dash: "/", dot: ".", dashdot: "x", longdash: "\\", longdashdot: "+" };

function traces(plot) {
  if (plot.heat) {
    const [x, y, z] = plot.heat;
    return [{ type: "heatmap", x, y, z, colorscale: "Viridis", zmax: 1, colorbar: { title: { text: "cosine" }, thickness: 12 },
      hovertemplate: "layer %{y}, %{x} tokens: %{z:.4f}<extra></extra>" }];
  }
  return plot.series.flatMap((series) => {
    const paint = colour(series.colour);
    const common = { x: series.x, y: series.y, name: plain(series.label), customdata: series.records, hovertext: series.hover.map(plain),
      hovertemplate: series.hover.length ? "%{hovertext}<extra></extra>" : "%{x}: %{y:.5g}<extra>%{fullData.name}</extra>" };
    const error = series.error && { type: "data", array: series.error, thickness: 1, width: 3, color: series.kind === "bar" ? (dark() ? "#ddd" : "#333") : paint };
    if (series.kind === "bar") return [{ ...common, type: "bar", showlegend: series.x.length > 1 || series.x[0] !== series.label, marker: { color: paint, pattern: { shape: SHAPES[series.dash] } }, error_y: error }];
    if (series.kind === "band") {
      const edge = { type: "scatter", mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      return [{ ...edge, x: series.x, y: series.y }, { ...edge, x: series.x, y: series.top, fill: "tonexty", fillcolor: paint + "2b" }];
    }
    const marks = { size: 7, color: series.colour === "paper" ? (dark() ? "#1c2024" : "#fff") : paint, line: { color: paint, width: 1.5 }, symbol: series.kind === "points" ? "diamond" : "circle" };
    const mode = series.kind === "points" ? "markers" : series.x.length > 30 ? "lines" : "lines+markers";
    return [{ ...common, type: "scatter", mode, line: { color: paint, width: 2, dash: series.dash }, marker: marks, error_y: error }];
  });
}

/** Plotly reads some tags in texts: they are to be seen, not obeyed. */
function plain(text) { return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;"); }

function layout(plot) {
  const ink = dark() ? "#c9d0d6" : "#3c444c", grid = dark() ? "#2c3238" : "#e8eaec";
  const axis = (label, log) => ({ title: { text: plain(label), standoff: 8 }, type: log ? "log" : undefined, dtick: log ? "D2" : undefined, gridcolor: grid, linecolor: grid, zerolinecolor: grid,
    automargin: true, exponentformat: "B" });
  const bars = plot.series.some((series) => series.kind === "bar");
  const single = plot.series.filter((s) => s.kind === "bar").every((s) => s.x.length === 1 && s.x[0] === s.label);
  return { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12, family: "system-ui, DejaVu Sans, sans-serif" },
    margin: { l: 56, r: 14, t: 10, b: 48 }, xaxis: { ...axis(plot.x_label, plot.log_x), type: bars ? "category" : plot.log_x ? "log" : "linear", tickangle: bars ? -30 : undefined }, yaxis: axis(plot.y_label, plot.log_y),
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } }, barmode: single ? "overlay" : "group", hovermode: "closest", modebar: { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: ink },
    hoverlabel: { bgcolor: dark() ? "#2a3036" : "#fff", font: { color: dark() ? "#e8eaed" : "#1d2126" } } };
}

function draw(card) {
  Plotly.react(card.chart, traces(card.plot), layout(card.plot), { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
  if (card.drawn) return;
  card.drawn = true;
  card.chart.on("plotly_click", (event) => {
    const ids = event.points[0].customdata;
    if (ids && ids.length) location.hash = "record=" + ids.join(",");
  });
}

function plots() {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "400px" });
  for (const plot of D.plots) {
    const rows = Math.ceil(plot.series.filter((s) => s.kind !== "band").length / (innerWidth < 640 ? 1.5 : 2.5));
    const chart = el("div", { class: "chart", style: `height:${290 + 19 * rows}px`, role: "img", "aria-label": `${plot.title}, ${plot.place}` });
    const card = el("article", { class: "card plot" }, el("h3", {}, plot.title), el("p", { class: "muted" }, plot.place), chart,
      plot.note ? el("p", { class: "muted" }, plot.note) : null);
    Object.assign(card, { plot, chart });
    $("plot-list").append(card);
    watcher.observe(card);
  }
  $("missing").append(...D.missing.map((line) => el("li", {}, line)));
}

// --- all records, the sweep's state, and what could not be read ----------------------------------------------

/** What was measured beyond perplexity, by which evaluations of one cell are told apart. */
function beyond(record) {
  const names = Object.keys(record).filter((key) => key.startsWith("metrics.")).map((key) => key.split(".")[1]);
  return [...new Set(names)].filter((name) => !["ppl", "ppl_start", "bits_per_byte"].includes(name)).sort().join(", ") || undefined;
}

function recordTable() {
  for (const record of records) record.beyond = beyond(record);
  const columns = [["study", "study"], ["cell", "cell"], ["teacher", "settings.teacher"], ["seed", "settings.seed"], ["budget", "settings.budget"],
    ["ppl", "metrics.ppl.value"], ["± error", "metrics.ppl.stderr"], ["params", "params.total"], ["tokens/s", "timing.student_tokens_per_second"], ["also measured", "beyond"], ["commit", "provenance.git_commit"]];
  const body = el("tbody");
  const more = el("button", { type: "button", onclick: () => { limit *= 4; fill(); } });
  let rows = records.map((record, id) => ({ record, id })), limit = 100;
  const fill = () => {
    body.replaceChildren(...rows.slice(0, limit).map(({ record, id }) => el("tr", {}, columns.map(([, key], i) => {
      const value = record[key];
      const text = value === undefined ? "–" : key.endsWith("commit") ? value.slice(0, 8) : Number.isInteger(value) ? value.toLocaleString("en") : show(value);
      return el(i ? "td" : "th", i ? { class: typeof value === "string" ? "text" : "" } : { scope: "row" }, recordLink([id], text));
    }))));
    more.hidden = rows.length <= limit;
    more.textContent = `Show more (${rows.length - limit} left)`;
  };
  const sort = sorter((index, sign) => { rows = [...rows].sort((a, b) => order(a.record[columns[index][1]], b.record[columns[index][1]], sign)); fill(); });
  fill();
  $("record-list").append(el("p", { class: "muted" }, `${records.length} records. Every number opens its record and the command that made it.`),
    el("div", { class: "scroll tall" }, el("table", {}, el("thead", {}, el("tr", {}, columns.map(([label]) => el("th", { scope: "col" }, el("button", { type: "button", onclick: sort }, label))))), body)), more);
  if (D.problems.length) {
    $("problems").append(el("h3", {}, `${D.problems.length} records could not be used`), el("ul", { class: "muted" }, D.problems.map(([file, reason]) => el("li", {}, `${file}: ${reason}`))));
  }
}

function sweepState() {
  const state = D.state;
  if (!state.open.length && !state.building.length) return;
  $("state").hidden = false;
  document.querySelector('nav a[href="#state"]').hidden = false;
  const all = state.done + state.open.length;
  $("state-body").append(el("div", { class: "card" },
    el("p", {}, el("progress", { max: all, value: state.done, "aria-label": "cells done" }), ` ${state.done} cells done, ${state.open.length} begun. This page loads itself again every ${state.refresh} s; the command with --watch makes it anew.`),
    el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["step", "tokens", "loss", "last sign of life"].map((t) => el("th", { style: "padding:.38rem .7rem" }, t)))),
      el("tbody", {}, state.building.map((step) => el("tr", {}, el("th", { scope: "row" }, `${step.kind} ${step.key}`), el("td", {}, step.tokens.toLocaleString("en")),
        el("td", {}, step.loss === null ? "–" : show(step.loss)), el("td", {}, step.alive === null ? "none: interrupted" : `${step.alive} s ago`)))))),
    el("details", {}, el("summary", {}, "Cells that were begun"), el("ul", {}, state.open.map((name) => el("li", {}, name))))));
  setTimeout(() => { memory.write({ scroll: scrollY }); location.reload(); }, 1000 * state.refresh);
}

// --- light and dark ------------------------------------------------------------------------------------------

function theme(name) {
  document.documentElement.dataset.theme = name;
  for (const card of document.querySelectorAll(".card.plot")) if (card.drawn) draw(card);
  for (const line of document.querySelectorAll(".card.table tbody tr")) if (line.row.colour) line.querySelector(".swatch").style.background = colour(line.row.colour);
}

const system = matchMedia("(prefers-color-scheme: dark)");
theme(memory.read().theme || (system.matches ? "dark" : "light"));
system.addEventListener("change", () => { if (!memory.read().theme) theme(system.matches ? "dark" : "light"); });
$("theme").addEventListener("click", () => { theme(dark() ? "light" : "dark"); memory.write({ theme: document.documentElement.dataset.theme }); });

$("title").textContent = D.title;
$("summary").textContent = D.summary;
$("footer").textContent = D.footer;
verdicts();
tables();
plots();
recordTable();
sweepState();
$("detail").addEventListener("close", closed);
$("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });
addEventListener("hashchange", openFromHash);
openFromHash();
if (memory.read().scroll && !location.hash) { scrollTo(0, memory.read().scroll); memory.write({ scroll: 0 }); }
