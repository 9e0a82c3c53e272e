"use strict";
// Draws token views. Every number was computed before; this looks up, orders, colours and outlines.
(() => {
  const KINDS = { "<f4": Float32Array, "<u2": Uint16Array, "<u4": Uint32Array };
  const LISTED = 12; // positions in the list of extremes
  const CHUNK = 7; // criteria in one column of the panel

  function unpack(text, kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    if (kind !== "upper") return new KINDS[kind](bytes.buffer);
    const halves = new Uint16Array(bytes.buffer); // the upper two bytes of 32-bit floats
    return new Float32Array(Uint32Array.from(halves, (half) => half * 65536).buffer);
  }

  // Children are nodes or strings; strings become text, never markup.
  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  function shown(value, digits = 3) {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(digits)));
    return text.replaceAll("-", "−").replace("+", "");
  }

  const label = (name) => name.replaceAll("_", " ").replace(/\bkl\b/, "KL");
  // White space and line breaks get a sign, so that no token is invisible.
  const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)));
  const count = (number) => number.toLocaleString("en");

  function view(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const measures = data.measures.map((m) => ({ ...m, values: unpack(m.data, m.packing), ranks: m.ranks ? unpack(m.ranks, m.width) : null }));
    const criteria = measures.filter((m) => m.ranks);
    const named = (name) => measures.find((m) => m.name === name && !m.ranks);
    const tops = data.tops && { ...data.tops, student: lists(data.tops.student), teacher: lists(data.tops.teacher) };
    const gain = named("gain") ?? measures[0], advantage = named("advantage"), divergence = named("forward_kl");
    const owner = [];
    const sides = [{ spans: [], lines: [] }, { spans: [], lines: [] }];
    const { spans } = sides[0];
    let colour = measures.find((m) => m.name === data.color), outline = criteria[0], second = null, current = -1, afresh = true;

    function lists(part) {
      return { ids: unpack(part.ids, data.tops.width), p: unpack(part.p, "<u2") };
    }

    // --- controls
    const list = make("div", { className: "list" + (data.gapped ? " gapped" : "") });
    const panel = make("div", { className: "panel" });
    panel.setAttribute("aria-live", "polite");
    const choose = menu("color by", measures, colour, (m) => { colour = m; paint(); detail(current); });
    const criterion = menu("outline", criteria, outline, (m) => { outline = m; refresh(); });
    const beside = menu("beside", criteria, second, (m) => { second = m; both(); refresh(); }, "nothing");
    const signs = make("input", { type: "checkbox", className: "by-sign" });
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
    const numbers = make("input", { type: "checkbox", className: "with-numbers" });
    const scale = make("span", { className: "scale" });
    const judged = data.contexts.some((context) => typeof context.correct === "boolean");
    const verdict = make("select", { className: "verdict" }, ...[["", "all responses"], ["true", "right responses"], ["false", "wrong responses"]].map(([value, text]) => make("option", { value }, text)));
    verdict.setAttribute("aria-label", "which responses to show");

    function menu(text, entries, chosen, change, none) {
      const select = make("select", {}, ...(none ? [make("option", { value: "" }, none)] : []), ...groups(entries));
      select.value = chosen ? chosen.name : "";
      select.addEventListener("change", () => change(entries.find((m) => m.name === select.value) ?? null));
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
    const articles = data.contexts.map((context, index) => {
      const line = response(context, position, sides[0].spans);
      for (let t = 0; t < context.length; t++) owner.push({ context: index, t });
      position += context.length;
      const prompt = context.id.includes(context.prompt_id) ? "" : ` · prompt ${context.prompt_id}`;
      const facts = `${context.id}${prompt} · ${context.length} positions` + (context.finished ? "" : " · cut off") + ({ true: " · right", false: " · wrong" }[context.correct] ?? "");
      const pair = make("div", { className: "pair" }, line);
      const article = make("article", {}, make("header", {}, facts), make("p", { className: "prompt" }, context.prompt), pair);
      list.append(article);
      return { context, pair, article, from: position - context.length };
    });
    const seen = (i) => !articles[owner[i].context].article.hidden;
    if (spans.length) spans[0].tabIndex = 0;

    function response(context, from, into) {
      const name = make("span", { className: "which" });
      const line = make("p", { className: "response" }, name);
      (into === sides[0].spans ? sides[0] : sides[1]).lines.push(name);
      for (let i = from; i < from + context.length; i++) {
        const text = data.tokens[i], drawn = visible(text);
        const span = make("span", { className: "t", tabIndex: -1 }, drawn === text ? text : make("span", { className: "sign" }, drawn));
        span.dataset.i = i;
        into.push(span);
        line.append(span);
        if (text.includes("\n")) line.append(make("br"));
      }
      return line;
    }

    // A second column of responses, for the second criterion.
    function both() {
      list.classList.toggle("two", second !== null);
      if (second && sides[1].spans.length === 0) {
        for (const { context, pair, from } of articles) pair.append(response(context, from, sides[1].spans));
      }
    }

    // --- drawing
    function background(measure, value) {
      if (!Number.isFinite(value)) return "";
      const share = measure.signed ? value / measure.high : (value - measure.low) / (measure.high - measure.low);
      const strength = Math.min(1, Math.abs(measure.signed ? share : Math.max(0, share)));
      return tint(share < 0 && measure.signed, strength);
    }

    const tint = (low, strength) => `color-mix(in srgb, var(${low ? "--tv-low" : "--tv-high"}) ${(100 * strength).toFixed(1)}%, var(--tv-paper))`;
    const chosen = (measure, i) => measure !== null && measure !== undefined && measure.ranks[i] > 0 && measure.ranks[i] <= data.budgets[Number(slider.value)][1];

    function looks() {
      return second ? [[outline, outline], [second, second]] : [[colour, outline]];
    }

    function paint() {
      looks().forEach(([measure, rule], side) => {
        sides[side].spans.forEach((span, i) => {
          const value = measure.values[i], inside = chosen(rule, i);
          const bySign = signs.checked && advantage;
          span.style.backgroundColor = bySign ? (inside ? tint(advantage.values[i] < 0, 1) : "") : background(measure, value);
          span.classList.toggle("rest", Boolean(bySign) && !inside);
          span.classList.toggle("none", !bySign && !Number.isFinite(value));
          span.dataset.n = shown(value, measure.ranks ? 2 : 3);
        });
        sides[side].lines.forEach((line) => { line.textContent = second ? label(rule.name) : ""; });
      });
      scale.replaceChildren(...(signs.checked && advantage ? signKey() : second ? [] : ramp()));
    }

    function ramp() {
      const stops = [0, 0.25, 0.5, 0.75, 1].map((s) => background(colour, colour.low + s * (colour.high - colour.low)));
      const bar = make("span", { className: "ramp" });
      bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
      return [shown(colour.low), bar, shown(colour.high), make("span", { className: "hint" }, colour.unit)];
    }

    function signKey() {
      return [["teacher gives it more", false], ["teacher gives it less", true]].map(([text, low]) => {
        const mark = make("span", { className: "mark" }, text);
        mark.style.backgroundColor = tint(low, 1);
        return mark;
      });
    }

    function select() {
      const [share, number] = data.budgets[Number(slider.value)];
      const here = looks().map(([, rule], side) => {
        let inside = 0;
        sides[side].spans.forEach((span, i) => {
          const selected = chosen(rule, i);
          span.classList.toggle("selected", selected);
          inside += selected && seen(i);
        });
        return inside;
      });
      const shared = second ? `, ${count([...spans.keys()].filter((i) => chosen(outline, i) && chosen(second, i)).length)} in both` : "";
      budget.value = `${Number((100 * share).toPrecision(3))}%: ${count(number)} of ${count(data.total)}, ${here.map(count).join(" and ")} shown${shared}`;
      slider.setAttribute("aria-valuetext", budget.value);
    }

    function refresh() {
      paint();
      select();
      detail(current);
    }

    function find() {
      const wanted = search.value.toLowerCase();
      const hits = spans.filter((span, i) => {
        const hit = wanted !== "" && seen(i) && data.tokens[i].toLowerCase().includes(wanted);
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

    const unit = (text) => (text === "nats" ? " nats" : "");

    // What the step changed at a position: divergences before and after it.
    const CHANGES = [["forward_kl", "gain"], ["reverse_kl", "reverse_gain"]].filter((names) => names.every(named));

    function change(i) {
      return CHANGES.map(([before, drop]) => {
        const [was, fell] = [named(before).values[i], named(drop).values[i]];
        return [label(before), `${shown(was)} → ${shown(was - fell)} nats`, `gain ${shown(fell)}`];
      });
    }

    function detail(i) {
      panel.classList.toggle("empty", i < 0);
      if (i < 0) {
        panel.replaceChildren(make("p", { className: "hint" }, "Point at a token, or step with the arrow keys; n and p go by gain, / searches."));
        return;
      }
      const { context, t } = owner[i], facts = data.contexts[context], changed = change(i);
      const said = new Set(changed.length ? CHANGES.flat() : []);
      const measured = measures.filter((m) => m.kind === "measurement" && !said.has(m.name)).map((m) => [label(m.name), shown(m.values[i]) + unit(m.unit)]);
      const first = [outline, second].filter(Boolean);
      const ranked = [...new Set([...first, ...criteria])].map((m) => [label(m.name), shown(m.values[i], 2), m.ranks[i] ? `rank ${count(m.ranks[i])}` : "never"]);
      const title = make("h4", { className: "title" }, make("span", { className: "token" }, visible(data.tokens[i])), ` · position ${t} of ${facts.id}`);
      const inColumns = chunks(ranked).map((part, at) => make("div", { className: "criteria" }, make("h4", {}, at ? "more criteria" : "criteria"), table(part)));
      panel.replaceChildren(
        title,
        ...(changed.length ? [make("div", { className: "change" }, make("h4", {}, "before → after"), table(changed))] : []),
        ...inColumns.slice(0, 1),
        make("div", {}, make("h4", {}, "measured"), table(measured)),
        ...(tops ? ["student", "teacher"].map((role) => make("div", { className: role }, make("h4", {}, `${role}'s likeliest`), likeliest(role, i))) : []),
        ...inColumns.slice(1),
      );
    }

    const chunks = (rows) => (rows.length ? [rows.slice(0, CHUNK), ...chunks(rows.slice(CHUNK))] : []);

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
      for (const side of sides) if (current >= 0) side.spans[current]?.classList.remove("current");
      spans.forEach((span) => { if (span.tabIndex === 0) span.tabIndex = -1; });
      current = i;
      for (const side of sides) side.spans[i]?.classList.add("current");
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
      const way = (order.value === "low" ? ascending : [...ascending].reverse()).filter(seen);
      const at = afresh ? -1 : way.indexOf(current);
      afresh = false;
      const to = at < 0 ? (by > 0 ? 0 : way.length - 1) : Math.min(way.length - 1, Math.max(0, at + by));
      if (way.length) go(way[to]);
    }

    // The next token of a response that is shown.
    function along(by) {
      let i = current + by;
      while (i >= 0 && i < spans.length && !seen(i)) i += by;
      go(i);
    }

    function keys(event) {
      if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
      const moves = { ArrowRight: () => along(1), ArrowLeft: () => along(-1), n: () => step(1), p: () => step(-1), "/": () => search.focus() };
      if (moves[event.key]) {
        event.preventDefault();
        moves[event.key]();
      }
    }

    // --- the list of extremes
    const KINDS_OF_LIST = {
      gained: ["most gained", () => [...ascending].reverse()],
      lost: ["most lost", () => ascending.filter((i) => gain.values[i] < 0)],
      stuck: ["large KL and no gain", () => ascending.filter((i) => divergence?.values[i] >= data.large).sort((a, b) => Math.abs(gain.values[a]) - Math.abs(gain.values[b]) || a - b)],
    };
    const COLUMNS = [["token", null], ["gain", (i) => gain.values[i]], ["forward KL", (i) => divergence?.values[i] ?? NaN], ["position", (i) => owner[i].t], ["context", (i) => owner[i].context]];

    function extremes() {
      const kinds = make("select", { className: "extreme" }, ...Object.entries(KINDS_OF_LIST).filter(([name]) => name !== "stuck" || divergence).map(([value, [text]]) => make("option", { value }, text)));
      kinds.setAttribute("aria-label", "which positions to list");
      const body = make("tbody"), heads = make("tr");
      let rows = [], sorting = null;
      const fill = () => body.replaceChildren(...rows.map(entry));
      for (const [name, value] of COLUMNS) {
        const button = make("button", { type: "button" }, name);
        button.addEventListener("click", () => {
          const down = sorting !== name;
          sorting = down ? name : null;
          rows.sort((a, b) => (value ? value(b) - value(a) : data.tokens[a].localeCompare(data.tokens[b])) * (down ? 1 : -1) || a - b);
          fill();
        });
        heads.append(make("th", { scope: "col", className: value && name !== "context" ? "number" : "" }, button));
      }
      const renew = () => {
        rows = KINDS_OF_LIST[kinds.value][1]().filter(seen).slice(0, LISTED);
        sorting = null;
        fill();
      };
      kinds.addEventListener("change", renew);
      verdict.addEventListener("change", renew);
      const details = make("details", { className: "extremes" }, make("summary", {}, "Most gained, most lost, large KL and no gain"),
        make("p", { className: "hint" }, kinds, ` of the positions shown; a KL is large from ${shown(data.large ?? NaN)} nats on, which a tenth of all positions reach.`),
        make("div", { className: "frame" }, make("table", {}, make("thead", {}, heads), body)));
      details.addEventListener("toggle", () => { if (details.open) renew(); });
      return details;
    }

    function entry(i) {
      const { context, t } = owner[i];
      const jump = make("button", { type: "button", className: "jump" }, around(i));
      jump.addEventListener("click", () => go(i));
      return make("tr", {}, make("td", {}, jump), ...[shown(gain.values[i]), divergence ? shown(divergence.values[i]) : "–", String(t)].map((text) => make("td", { className: "number" }, text)), make("td", {}, data.contexts[context].id));
    }

    // A token with its neighbours, itself in brackets.
    function around(i) {
      const same = (j) => owner[j]?.context === owner[i].context;
      const word = (j) => (same(j) ? visible(data.tokens[j]) : "");
      const gap = data.gapped ? " " : "";
      return [word(i - 2), word(i - 1), `[${word(i)}]`, word(i + 1), word(i + 2)].join(gap).trim();
    }

    // --- assembly
    list.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".t");
      if (span) detail(Number(span.dataset.i));
    });
    list.addEventListener("pointerleave", () => detail(current));
    list.addEventListener("click", (event) => {
      const span = event.target.closest(".t");
      if (!span) return;
      const i = Number(span.dataset.i), { context, t } = owner[i];
      go(i, { focus: spans[i] === span });
      const chosenToken = { context_id: data.contexts[context].id, position: t, token: data.tokens[i] };
      root.dispatchEvent(new CustomEvent("tokenview-select", { bubbles: true, detail: { chosen: chosenToken, adds: event.shiftKey } }));
    });
    list.addEventListener("focusin", (event) => {
      if (event.target.matches(".t") && Number(event.target.dataset.i) !== current) go(Number(event.target.dataset.i), { focus: false });
    });
    root.addEventListener("keydown", keys);
    slider.addEventListener("input", () => { paint(); select(); });
    signs.addEventListener("change", paint);
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
    verdict.addEventListener("change", () => {
      for (const { context, article } of articles) article.hidden = verdict.value !== "" && String(context.correct) !== verdict.value;
      afresh = true;
      refresh();
      find();
    });
    numbers.addEventListener("change", () => list.classList.toggle("numbers", numbers.checked));
    const note = make("p", { className: "note" }, `${data.note}.`, make("span", { className: "in-print" }, " In print: the first 6."));
    const bar = make("div", { className: "bar" }, choose, scale, ...(judged ? [verdict] : []),
      ...(criteria.length ? [make("span", { className: "group" }, criterion, slider, budget), beside] : []),
      ...(criteria.length && advantage ? [make("label", { title: "only the selection, by whether the teacher gives the token more or less than the student" }, signs, "selection by sign of advantage")] : []),
      make("span", { className: "group" }, previous, order, next), make("span", { className: "group" }, search, found), make("label", {}, numbers, "numbers"));
    root.append(note, bar, extremes(), list, panel);
    paint();
    select();
    detail(-1);
  }

  globalThis.opdTokenView = view;
  document.querySelectorAll(".tokenview").forEach(view);
})();
