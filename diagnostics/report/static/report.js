"use strict";
// Tables: filters, sorting, copying at full precision; long ones are built from packed columns.
// Links into folded parts open them, and a button switches between light and dark.
(() => {
  const SHOWN_AT_FIRST = 200; // rows of a long table until all are asked for
  const LEAST_P = 1e-4; // as in sentences: a bootstrap resolves no smaller p value
  const MOST_DECIMALS = 7;
  const models = new WeakMap();

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  const signs = (text) => text.replaceAll("-", "\u2212");

  function grouped(value, decimals) {
    return value.toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  }

  function significant(value, digits) {
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return signs(value.toExponential(digits - 1).replace("+", ""));
    const decimals = size === 0 ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
    return signs(grouped(value, decimals));
  }

  // The same rule as page_tables.shown: two digits of half the interval, else three of the number.
  function shown(value, name, half) {
    if (!Number.isFinite(value)) return value < 0 ? "\u2212\u221e" : "\u221e";
    if (name.startsWith("p_")) {
      if (value < LEAST_P) return "< .0001";
      return value.toFixed(value < 0.001 ? 4 : value < 0.1 ? 3 : 2).replace(/^0+/, "");
    }
    if (name === "budget") return `${Number((100 * value).toPrecision(6))} %`;
    if (!(Number.isFinite(half) && half > 0)) return Number.isInteger(value) ? signs(grouped(value, 0)) : significant(value, 3);
    const decimals = 1 - Math.floor(Math.log10(half));
    if (decimals > MOST_DECIMALS) return significant(value, 2);
    const text = grouped(value, Math.max(decimals, 0));
    return /[1-9]/.test(text) ? signs(text) : text.replace(/^-/, "");
  }

  // --- a table: its columns' heads, its rows' values, and an element for each row when it is needed
  function modelOf(details) {
    if (!models.has(details)) models.set(details, read(details));
    return models.get(details);
  }

  function read(details) {
    const heads = [...details.querySelectorAll("thead th")];
    const columns = heads.map((head) => ({
      name: head.dataset.name ?? head.textContent,
      number: head.classList.contains("number"),
      half: head.dataset.half ? head.dataset.half.split(",").map(Number) : null,
      filter: head.dataset.filter === "yes",
      opens: head.dataset.opens ?? "",
      up: head.dataset.first === "up",
    }));
    const packed = details.querySelector('script[type="application/json"]');
    const rows = packed ? unpacked(JSON.parse(packed.textContent), columns) : written(details, columns);
    packed?.remove();
    return { details, columns, rows, filters: new Map(), sorted: null, all: false, shown: rows };
  }

  function written(details, columns) {
    return [...details.querySelector("tbody").rows].map((element) => ({
      values: [...element.cells].map((cell, j) => (columns[j].number ? number(cell.dataset.v) : cell.dataset.v ?? cell.textContent)),
      element,
    }));
  }

  const number = (text) => (text === "" || text === null || text === undefined ? NaN : Number(text));

  function unpacked(packed, columns) {
    const [first] = packed, count = first.count ?? (first.codes ?? first).length;
    const value = (column, i) => (Array.isArray(column) ? number(column[i]) : column.texts ? column.texts[column.codes[i]] : number(column.value));
    return Array.from({ length: count }, (_, i) => ({
      values: packed.map((column) => value(column, i)),
      element: null,
    }));
  }

  function built(row, columns) {
    if (row.element) return row.element;
    row.element = document.createElement("tr");
    for (const [j, column] of columns.entries()) {
      const cell = row.element.insertCell(), value = row.values[j];
      if (!column.number) {
        cell.textContent = value.replace(/(?<![\w.)\-])-(?=\.?\d)/g, "\u2212");
        if (value.length > 48) cell.className = "long";
        continue;
      }
      const half = column.half ? (row.values[column.half[1]] - row.values[column.half[0]]) / 2 : NaN;
      cell.className = "number";
      cell.dataset.v = Number.isNaN(value) ? "" : value;
      cell.textContent = Number.isNaN(value) ? "" : shown(value, column.name, half);
    }
    return row.element;
  }

  // --- what is shown of it
  function show(model) {
    let rows = model.rows.filter((row) => [...model.filters].every(([j, wanted]) => key(row.values[j]) === wanted));
    if (model.sorted) rows = sorted(rows, model);
    model.shown = rows;
    const first = model.all ? rows : rows.slice(0, SHOWN_AT_FIRST);
    model.details.querySelector("tbody").replaceChildren(...first.map((row) => built(row, model.columns)));
    const every = rows.length === model.rows.length ? "" : ` of ${model.rows.length.toLocaleString("en")}`;
    const cut = first.length < rows.length ? `the first ${first.length} of ` : "";
    model.count.textContent = `${cut}${rows.length.toLocaleString("en")}${every} rows`;
    model.more.hidden = cut === "";
  }

  const key = (value) => String(value);

  // Undefined values and empty texts come last in both directions.
  function sorted(rows, { sorted: { column, up }, columns }) {
    const blank = (value) => value === "" || Number.isNaN(value);
    const order = columns[column].number ? (a, b) => a - b || 0 : (a, b) => a.localeCompare(b, "en", { numeric: true });
    return rows.map((row, at) => [row, at]).sort(([a, i], [b, j]) => {
      const [x, y] = [a.values[column], b.values[column]];
      if (blank(x) || blank(y)) return blank(x) - blank(y) || i - j;
      return (up ? order(x, y) : order(y, x)) || i - j;
    }).map(([row]) => row);
  }

  function open(details) {
    if (!details.matches("details.table") || details.querySelector(".filters")) return;
    const model = modelOf(details), bar = make("div", { className: "filters" });
    for (const [j, column] of model.columns.entries()) if (column.filter) bar.append(filter(model, j));
    model.count = make("span", { className: "quiet count" });
    model.count.setAttribute("aria-live", "polite");
    model.more = make("button", { type: "button", className: "more" }, "show all");
    model.more.addEventListener("click", () => { model.all = true; show(model); });
    bar.append(model.count, model.more);
    details.querySelector(".scroll").before(bar);
    show(model);
  }

  function filter(model, j) {
    const column = model.columns[j], counts = new Map();
    for (const row of model.rows) counts.set(key(row.values[j]), row.values[j]);
    const values = [...counts].filter(([text]) => text !== "" && text !== "NaN");
    if (column.number) values.sort((a, b) => a[1] - b[1]);
    const select = make("select", {}, make("option", { value: "" }, "all"),
      ...values.map(([text, value]) => make("option", { value: text }, column.number ? shown(value, column.name, NaN) : text)));
    select.dataset.column = column.name;
    if (column.opens) {
      select.value = column.opens;
      model.filters.set(j, column.opens);
    }
    select.addEventListener("change", () => {
      select.value === "" ? model.filters.delete(j) : model.filters.set(j, select.value);
      model.all = false;
      show(model);
    });
    return make("label", {}, column.name, select);
  }

  function sort(head) {
    const details = head.closest("details"), model = modelOf(details), column = head.cellIndex;
    const before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : model.columns[column].up;
    head.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    model.sorted = { column, up };
    show(model);
  }

  // --- copying
  const quoted = (text) => (/[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);

  function csv({ columns, shown: rows }) {
    const text = (value) => quoted(Number.isNaN(value) ? "" : String(value));
    const lines = [columns.map((column) => quoted(column.name)), ...rows.map((row) => row.values.map(text))];
    return lines.map((line) => line.join(",")).join("\n") + "\n";
  }

  async function copy(button) {
    const text = csv(modelOf(button.closest("details")));
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.body.appendChild(document.createElement("textarea"));
      area.value = text;
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const label = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  }

  // --- the page
  const root = document.documentElement;
  const dark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

  function relabel() {
    document.querySelectorAll("button.theme").forEach((button) => { button.textContent = dark() ? "light" : "dark"; });
  }

  function reveal() {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  }

  document.addEventListener("toggle", (event) => { if (event.target.open) open(event.target); }, true);
  document.addEventListener("click", (event) => {
    const head = event.target.closest("details.table th button");
    if (head) sort(head.parentElement);
    if (event.target.matches("button.copy")) copy(event.target);
    if (event.target.matches("button.theme")) {
      root.dataset.theme = dark() ? "light" : "dark";
      relabel();
    }
    if (event.target.closest('a[href^="#"]')) setTimeout(reveal);
  });
  addEventListener("hashchange", reveal);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", relabel);
  relabel();
  reveal();
})();
