"use strict";
// Tables: a click on a column's head sorts, a button copies what is shown as CSV at full precision.
(() => {
  const value = (cell) => cell.dataset.v ?? cell.textContent;
  const number = (text) => (text.trim() === "" ? NaN : Number(text));

  function compare(a, b) {
    const [x, y] = [number(a), number(b)];
    if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
    if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
    return a.localeCompare(b);
  }

  function sort(head) {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows].sort((a, b) => compare(value(a.cells[column]), value(b.cells[column])));
    if (down) rows.reverse();
    table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  }

  const quoted = (text) => (/[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);

  function csv(table) {
    return [...table.rows].map((row) => [...row.cells].map((cell) => quoted(value(cell))).join(",")).join("\n") + "\n";
  }

  async function copy(button) {
    const text = csv(button.closest("details").querySelector("table"));
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

  // Long tables come packed by column and are built when they are first opened.
  function shown(number) {
    if (typeof number === "string") return number.replace("-", "\u2212").replace("Infinity", "\u221e");
    if (Number.isInteger(number)) return number.toLocaleString("en");
    const size = Math.abs(number);
    const text = size < 1e-4 || size >= 1e6 ? number.toExponential(3) : number.toPrecision(4);
    return text.replace("-", "\u2212");
  }

  const least = 1e-4; // as in sentences: a bootstrap resolves no smaller p value

  function build(details) {
    const packed = details.querySelector('script[type="application/json"]');
    if (!packed) return;
    const columns = JSON.parse(packed.textContent), body = details.querySelector("tbody");
    packed.remove();
    const count = Array.isArray(columns[0]) ? columns[0].length : columns[0].codes.length;
    const heads = [...details.querySelectorAll("thead th")].map((head) => head.textContent);
    for (let i = 0; i < count; i++) {
      const row = body.insertRow();
      for (const [j, column] of columns.entries()) {
        const cell = row.insertCell();
        if (!Array.isArray(column)) {
          cell.textContent = column.texts[column.codes[i]];
          continue;
        }
        const number = column[i];
        cell.className = "number";
        cell.dataset.v = number ?? "";
        const tiny = number !== null && heads[j].startsWith("p_") && number < least;
        cell.textContent = number === null ? "" : tiny ? "< .0001" : shown(number);
      }
    }
  }

  document.addEventListener("toggle", (event) => { if (event.target.open) build(event.target); }, true);

  document.addEventListener("click", (event) => {
    const head = event.target.closest("th button");
    if (head) sort(head.parentElement);
    if (event.target.matches("button.copy")) copy(event.target);
  });
})();
