"use strict";
// Draws token views. Every number was computed before; this looks up, colours and outlines.
(() => {
  const KINDS = { "<f4": Float32Array, "<u2": Uint16Array, "<u4": Uint32Array };

  function unpack(text, kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new KINDS[kind](bytes.buffer);
  }

  // Children are nodes or strings; strings become text, never markup.
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function shown(value) {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
    return text.replace("-", "−");
  }

  const label = (name) => name.replaceAll("_", " ").replace(/\bkl\b/, "KL");
  // White space and line breaks get a sign, so that no token is invisible.
  const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)));

  function view(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const measures = data.measures.map((m) => ({ ...m, values: unpack(m.data, "<f4"), ranks: m.ranks ? unpack(m.ranks, m.width) : null }));
    const criteria = measures.filter((m) => m.ranks);
    const tops = data.tops && { ...data.tops, student: lists(data.tops.student), teacher: lists(data.tops.teacher) };
    const gain = measures.find((m) => m.name === "gain") ?? measures[0];
    const spans = [], owner = [];
    let colour = measures.find((m) => m.name === data.color), outline = criteria[0], current = -1, afresh = true;

    function lists(part) {
      return { ids: unpack(part.ids, data.tops.width), p: unpack(part.p, "<u2") };
    }

    // --- controls
    const list = make("div", { className: "list" + (data.gapped ? " gapped" : "") });
    const panel = make("div", { className: "panel" });
    panel.setAttribute("aria-live", "polite");
    const choose = menu("colour by", measures, colour, (m) => { colour = m; paint(); detail(current); });
    const criterion = menu("outline", criteria, outline, (m) => { outline = m; select(); detail(current); });
    const slider = make("input", { type: "range", min: 0, max: data.budgets.length - 1, step: 1, value: data.budget });
    slider.setAttribute("aria-label", "budget");
    const budget = make("output");
    const search = make("input", { type: "search", placeholder: "find a token" });
    search.setAttribute("aria-label", "find a token");
    const found = make("span", { className: "hint found-count" });
    const order = make("select", { className: "order" }, make("option", { value: "high" }, "highest gain"), make("option", { value: "low" }, "lowest gain"));
    order.setAttribute("aria-label", "order of previous and next");
    const previous = make("button", { type: "button", className: "previous", title: "previous (p)" }, "◀ previous");
    const next = make("button", { type: "button", className: "next", title: "next (n)" }, "next ▶");
    const numbers = make("input", { type: "checkbox" });
    const scale = make("span", { className: "scale" });

    function menu(text, entries, chosen, change) {
      const select = make("select", {}, ...groups(entries));
      select.value = chosen ? chosen.name : "";
      select.addEventListener("change", () => change(entries.find((m) => m.name === select.value)));
      return make("label", {}, text, select);
    }

    function groups(entries) {
      return ["measurement", "criterion"].flatMap((kind) => {
        const options = entries.filter((m) => m.kind === kind).map((m) => make("option", { value: m.name }, label(m.name)));
        return options.length ? [make("optgroup", { label: kind === "criterion" ? "criteria" : "measurements" }, ...options)] : [];
      });
    }

    // --- contexts
    let position = 0;
    data.contexts.forEach((context, index) => {
      const response = make("p", { className: "response" });
      for (let t = 0; t < context.length; t++, position++) {
        const text = data.tokens[position], drawn = visible(text);
        const span = make("span", { className: "t", tabIndex: -1 }, drawn === text ? text : make("span", { className: "sign" }, drawn));
        span.dataset.i = position;
        spans.push(span);
        owner.push({ context: index, t });
        response.append(span);
        if (text.includes("\n")) response.append(make("br"));
      }
      const facts = `${context.id} · prompt ${context.prompt_id} · ${context.length} positions` + (context.finished ? "" : " · cut off");
      list.append(make("article", {}, make("header", {}, facts), make("p", { className: "prompt" }, context.prompt), response));
    });
    if (spans.length) spans[0].tabIndex = 0;

    // --- drawing
    function background(measure, value) {
      if (!Number.isFinite(value)) return "";
      const share = measure.signed ? value / measure.high : (value - measure.low) / (measure.high - measure.low);
      const strength = Math.min(1, Math.abs(measure.signed ? share : Math.max(0, share)));
      return `rgba(var(${share < 0 && measure.signed ? "--tv-low" : "--tv-high"}), calc(var(--tv-strength) * ${strength.toFixed(3)}))`;
    }

    function paint() {
      spans.forEach((span, i) => {
        const value = colour.values[i];
        span.style.backgroundColor = background(colour, value);
        span.classList.toggle("none", !Number.isFinite(value));
        span.dataset.n = shown(value);
      });
      const stops = [0, 0.25, 0.5, 0.75, 1].map((s) => background(colour, colour.low + s * (colour.high - colour.low)));
      const ramp = make("span", { className: "ramp" });
      ramp.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
      scale.replaceChildren(shown(colour.low), ramp, shown(colour.high), make("span", { className: "hint" }, colour.unit));
    }

    function select() {
      const [share, count] = data.budgets[Number(slider.value)];
      let here = 0;
      spans.forEach((span, i) => {
        const rank = outline ? outline.ranks[i] : 0, chosen = rank > 0 && rank <= count;
        span.classList.toggle("selected", chosen);
        here += chosen;
      });
      budget.value = `${Number((100 * share).toPrecision(3))}%: ${count.toLocaleString("en")} of ${data.total.toLocaleString("en")}, ${here.toLocaleString("en")} shown`;
      slider.setAttribute("aria-valuetext", budget.value);
    }

    function find() {
      const wanted = search.value.toLowerCase();
      const hits = spans.filter((span, i) => {
        const hit = wanted !== "" && data.tokens[i].toLowerCase().includes(wanted);
        span.classList.toggle("found", hit);
        return hit;
      });
      found.textContent = wanted === "" ? "" : `${hits.length} found`;
      return hits.map((span) => Number(span.dataset.i));
    }

    // --- the panel
    function table(rows) {
      return make("table", {}, make("tbody", {}, ...rows.map(([name, ...cells]) => make("tr", {}, make("th", {}, name), ...cells.map((cell) => make("td", {}, cell))))));
    }

    function detail(i) {
      if (i < 0) {
        panel.replaceChildren(make("p", { className: "hint" }, "Point at a token, or step with the arrow keys; n and p go by gain, / searches."));
        return;
      }
      const { context, t } = owner[i], facts = data.contexts[context];
      const measured = measures.filter((m) => m.kind === "measurement").map((m) => [label(m.name), `${shown(m.values[i])} ${m.unit}`]);
      const ranked = criteria.map((m) => [label(m.name), shown(m.values[i]), m.ranks[i] ? `rank ${m.ranks[i].toLocaleString("en")}` : "never"]);
      const title = make("h4", { className: "title" }, make("span", { className: "token" }, visible(data.tokens[i])), ` · position ${t} of ${facts.id}`);
      panel.replaceChildren(
        title,
        make("div", {}, table(measured)),
        make("div", { className: "criteria" }, make("h4", {}, "criteria"), table(ranked)),
        ...(tops ? ["student", "teacher"].map((role) => make("div", { className: role }, make("h4", {}, `${role}'s likeliest`), likeliest(role, i))) : []),
      );
    }

    function likeliest(role, i) {
      const rows = [];
      for (let j = 0; j < tops.k; j++) {
        const id = tops[role].ids[i * tops.k + j];
        if (id === 0) break;
        const word = tops.words[id - 1], sampled = word === data.tokens[i];
        rows.push([make("span", { className: sampled ? "token sampled" : "token" }, visible(word)), (tops[role].p[i * tops.k + j] / tops.steps).toFixed(3)]);
      }
      return rows.length ? table(rows) : make("span", { className: "hint" }, "not stored");
    }

    // --- moving
    function go(i, { focus = true } = {}) {
      if (i < 0 || i >= spans.length) return;
      if (current >= 0) spans[current].classList.remove("current");
      spans.forEach((span) => { if (span.tabIndex === 0) span.tabIndex = -1; });
      current = i;
      spans[i].classList.add("current");
      spans[i].tabIndex = 0;
      detail(i);
      if (focus) {
        spans[i].focus({ preventScroll: true });
        const inside = spans[i].getBoundingClientRect(), frame = list.getBoundingClientRect();
        if (inside.top < frame.top || inside.bottom > frame.bottom) list.scrollTop += inside.top - frame.top - frame.height / 3;
      }
    }

    const ascending = [...spans.keys()].filter((i) => Number.isFinite(gain.values[i])).sort((a, b) => gain.values[a] - gain.values[b] || a - b);

    function step(by) {
      const way = order.value === "low" ? ascending : [...ascending].reverse();
      const at = afresh ? -1 : way.indexOf(current);
      afresh = false;
      const to = at < 0 ? (by > 0 ? 0 : way.length - 1) : Math.min(way.length - 1, Math.max(0, at + by));
      if (way.length) go(way[to]);
    }

    function keys(event) {
      if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
      const moves = { ArrowRight: () => go(current + 1), ArrowLeft: () => go(current - 1), n: () => step(1), p: () => step(-1), "/": () => search.focus() };
      if (moves[event.key]) {
        event.preventDefault();
        moves[event.key]();
      }
    }

    // --- assembly
    list.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".t");
      if (span) detail(Number(span.dataset.i));
    });
    list.addEventListener("pointerleave", () => detail(current));
    list.addEventListener("click", (event) => {
      const span = event.target.closest(".t");
      if (span) go(Number(span.dataset.i));
    });
    list.addEventListener("focusin", (event) => {
      if (event.target.matches(".t") && Number(event.target.dataset.i) !== current) go(Number(event.target.dataset.i), { focus: false });
    });
    root.addEventListener("keydown", keys);
    slider.addEventListener("input", select);
    search.addEventListener("input", find);
    search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      const hits = find();
      if (hits.length) {
        go(hits.find((i) => i > current) ?? hits[0], { focus: false });
        spans[current].scrollIntoView({ block: "nearest" });
      }
    });
    previous.addEventListener("click", () => step(-1));
    next.addEventListener("click", () => step(1));
    order.addEventListener("change", () => { afresh = true; });
    numbers.addEventListener("change", () => list.classList.toggle("numbers", numbers.checked));
    const bar = make("div", { className: "bar" }, choose, scale,
      ...(criteria.length ? [make("span", { className: "group" }, criterion, slider, budget)] : []),
      make("span", { className: "group" }, previous, order, next), make("span", { className: "group" }, search, found), make("label", {}, numbers, "numbers"));
    root.append(bar, list, panel);
    paint();
    select();
    detail(-1);
  }

  document.querySelectorAll(".tokenview").forEach(view);
})();
