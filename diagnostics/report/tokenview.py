"""Contexts as colored tokens, which show where on a response a measurement or a criterion is high.

    dx.show(bank, result.tokens, context=3, color="gain")  # in a notebook: shows itself
    dx.show(bank, result.tokens).save("tokens.html")       # one file, opens anywhere, offline
    print(dx.show(bank, result.tokens, context=3))         # in a terminal, with its colors

The page holds the prompt (dimmed) and the response token by token; a menu switches the color
between measurements and criteria, a slider sets the budget at which a criterion's selection is
outlined, a second criterion stands beside the first, and a panel shows the numbers of the token
under the pointer or the cursor, before and after the step, with both models' most likely tokens
where they are given. A list of the positions that gained and lost most, and of those with a large
divergence and no gain, leads to their places. Everything that the page shows was computed here or
before; its script only looks up, orders and draws.

Text reaches the page as JSON with every `<`, `>` and `&` escaped, and from there as text nodes,
never as markup. Numbers are packed as little-endian arrays in base64: four bytes for a measurement,
the upper two of them for a criterion's score, which leaves it two to three digits."""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import criteria as registry
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import write_atomic
from diagnostics.core.inputs import several, share, takes, token_table
from diagnostics.core.schema import SCHEMA, require_columns
from diagnostics.core.types import Bank, Context
from diagnostics.report.themes import themed
from diagnostics.report.token_text import Printed, in_color
from diagnostics.report.token_widget import token_widget

STATIC = Path(__file__).parent / "static"
MEASURES = (
    "gain",
    "context_gain",
    "gain_permuted",
    "relative_gain",
    "reverse_gain",
    "forward_kl",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "compatibility",
    "advantage",
    "student_logprob",
    "first_order_gain",
)
"""Measurements offered where the table has them."""
FIRST = ("gain", "forward_kl")
"""Measurements to begin with: the first that the table has."""
CRITERIA = (
    "teachability",
    "divergence",
    "reverse_divergence",
    "entropy",
    "compatibility",
    "incompatible",
    "tip",
)
"""Criteria that are offered first."""
BUDGETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Stops of the slider: shares of the positions of the whole table."""
MOST_CONTEXTS = 50
"""Contexts shown where none is named."""
LARGE = 0.9
"""Quantile of the forward KL over the whole table from which it is called large."""
PROBABILITY_STEPS = 2**16 - 1
SCALE_ENDS = (2, 98)
"""Percentiles over the whole table at which the color scale ends."""


@dataclass(frozen=True)
class TokenView:
    """A token view; shows itself in a notebook, and as colored text where it is printed."""

    fragment: str
    """The view as an element, for a page that brings style and script itself."""
    title: str
    printed: Printed = field(default=Printed(), compare=False)
    """What a terminal shows."""

    @property
    def html(self) -> str:
        """The view as one self-contained page."""
        return (
            '<!doctype html>\n<html lang="en" style="color-scheme: light dark"><head><meta'
            ' charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title>\n<style>\n{style()}</style></head>\n<body"
            f' class="tokenview-page">{self.fragment}\n'
            f"<script>\n{script()}</script></body></html>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, atomically."""
        return write_atomic(path, self.html.encode("utf-8", "backslashreplace"))

    def widget(self) -> Any:
        """The view as a Jupyter widget whose trait `selection` holds the tokens that were clicked.

        Returns:
            An anywidget. `selection` is a list of dictionaries with context_id, position and token;
            a click replaces it, a click with Shift adds to it.

        Raises:
            DiagnosticsError: anywidget is not installed.
        """
        return token_widget(self.fragment, style(), script())

    def __str__(self) -> str:
        return self.printed.text(color=in_color())

    def __repr__(self) -> str:
        return f"<{self.title}; print(...) shows it in a terminal, .save(path) writes a page>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts"'
            f' srcdoc="{html.escape(self.html)}" style="width:100%;height:36rem;border:0"></iframe>'
        )


def style() -> str:
    """The view's style sheet."""
    return themed((STATIC / "tokenview.css").read_text(encoding="utf-8"))


def script() -> str:
    """The view's script."""
    return (STATIC / "tokenview.js").read_text(encoding="utf-8")


@takes(tokens=token_table, criteria=several, budget=share)
def show(
    bank: Bank,
    tokens: pd.DataFrame,
    context: int | str | Sequence[int | str] | None = None,
    *,
    color: str | None = None,
    budget: float = 0.05,
    criteria: Iterable[str] | None = None,
    tops: pd.DataFrame | None = None,
    note: str | None = None,
    correct: bool | None = None,
) -> TokenView:
    """Show contexts of a bank token by token, colored by a measurement or a criterion.

    Args:
        bank: The frozen contexts.
        tokens: The whole token table of that bank, one row per response position: scales, scores
            and ranks are computed over all of its rows, not only over the contexts shown.
        context: An index in the bank, a context_id, or a list of them; the first 50 where None.
        color: The measurement or criterion to begin with; the gain where None, or the forward KL
            before a step was taken.
        budget: Share of all positions whose selection is outlined at first, between 0 and 1; it is
            moved to the nearest stop of the slider.
        criteria: Names of the criteria to offer; all that the columns allow, those that the user
            registered among them, where None.
        tops: Both models' most likely tokens as `score_with_tops` returns them, one row per
            position, with the columns context_id, position, student_top, student_top_p,
            teacher_top and teacher_top_p; probabilities are between 0 and 1.
        note: How the contexts were chosen, for the reader; said by itself where None.
        correct: True shows right responses alone and False wrong ones, as the bank says; None shows
            all, and the view has a menu where responses were judged.

    Returns:
        The view; it shows itself in a notebook, `print` shows it in a terminal, and `save` writes
        one self-contained page.

    Raises:
        DiagnosticsError: There is no such context or nothing of that name to color by, or the table
            was scored from another bank.
    """
    require_columns(tokens, ("context_id", "position", "token"), what="A token view")
    color = color or next((name for name in FIRST if name in tokens), MEASURES[0])
    bank = bank.as_scored(tokens)
    contexts = _chosen(_of_verdict(bank, correct), context)
    rows = _rows(tokens, contexts)
    names, texts = _criteria(tokens, criteria), tokens["token"].astype(str)
    measures = [*_measurements(tokens, rows), *_scores(tokens, rows, names)]
    payload = {
        "total": len(tokens),
        "color": color,
        "note": note or _how_many(bank, contexts, named=context is not None),
        "large": _large(tokens),
        "budgets": _stops(len(tokens)),
        "budget": int(np.abs(np.log(np.divide(BUDGETS, budget))).argmin()),
        "measures": measures,
        "contexts": _contexts(contexts),
        "tokens": texts.iloc[rows].tolist(),
        "gapped": not texts.str.startswith((" ", "\n")).any(),
        "tops": None if tops is None else _tops(tops, tokens.iloc[rows]),
    }
    known = [measure["name"] for measure in payload["measures"]]
    if color not in known:
        raise DiagnosticsError(
            f"No measurement or criterion to color by is named {color!r}. This table can show"
            f" {', '.join(known)}."
        )
    printed = _printed(payload, measures[known.index(color)])
    return TokenView(_fragment(payload), _title(contexts), printed)


def _title(contexts: Sequence[Context]) -> str:
    if len(contexts) == 1:
        return f"Tokens of {contexts[0].context_id}"
    return f"Tokens of {len(contexts)} contexts"


def _printed(payload: dict[str, Any], measure: dict[str, Any]) -> Printed:
    """What a terminal shows of a payload, colored by one of its measures."""
    values = unpack(measure["data"], measure["packing"])
    low, high = measure["low"], measure["high"]
    shares = values / high if measure["signed"] else (values - low) / (high - low)
    floor = -1.0 if measure["signed"] else 0.0
    return Printed(
        title=f"{payload['note']}; colored by {measure['name']}, from {low:.3g} to {high:.3g}",
        contexts=tuple((one["id"], one["prompt"], one["length"]) for one in payload["contexts"]),
        tokens=tuple(payload["tokens"]),
        shares=tuple(np.clip(shares, floor, 1.0).tolist()),
        gap=" " if payload["gapped"] else "",
    )


def _how_many(bank: Bank, contexts: list[Context], *, named: bool) -> str:
    """How many contexts are shown, and how they were chosen."""
    if len(contexts) == len(bank):
        return f"All {len(bank)} contexts"
    how = "chosen by the caller" if named else "the first of the bank"
    return f"{len(contexts)} of {len(bank)} contexts, {how}"


def _large(tokens: pd.DataFrame) -> float | None:
    """The forward KL from which it is large; None where there is none."""
    if "forward_kl" not in tokens or not tokens["forward_kl"].notna().any():
        return None
    return float(tokens["forward_kl"].quantile(LARGE))


def telling_contexts(bank: Bank, tokens: pd.DataFrame, count: int) -> tuple[list[int], str]:
    """Contexts for a page that cannot show all: the first of the bank, and those with extremes.

    Args:
        bank: The frozen contexts.
        tokens: The token table of that bank.
        count: Number of contexts to show.

    Returns:
        Indices in the bank's order, and how they were chosen as a sentence. Half are the first of
        the bank; the others hold, in turn, the position that gained most, the one that lost most,
        and the one whose gain is nearest to 0 among the tenth with the largest forward KL.
    """
    if count >= len(bank) or not {"gain", "forward_kl"} <= set(tokens.columns):
        shown = list(range(min(count, len(bank))))
        return shown, _how_many(bank, [bank[i] for i in shown], named=False)
    place = {one.context_id: index for index, one in enumerate(bank)}
    first = (count + 1) // 2
    chosen = dict.fromkeys(range(first))
    for one in itertools.chain.from_iterable(zip(*_extremes(tokens), strict=False)):
        if len(chosen) == count:
            break
        chosen.setdefault(place[one])
    note = (
        f"{len(chosen)} of {len(bank)} contexts: {first} are the first of the bank, the others hold"
        " the most gained, the most lost, and large divergences without a gain, so they are not"
        " typical"
    )
    return sorted(chosen), note


def _extremes(tokens: pd.DataFrame) -> list[list[str]]:
    """Contexts by their most gained position, their most lost one, and a large divergence that
    gained least.
    """
    table = tokens[["context_id", "gain", "forward_kl"]].dropna(subset=["gain"])
    high, large = table.sort_values("gain", kind="stable"), _large(tokens) or 0.0
    stuck = table[table["forward_kl"] >= large]
    stuck = stuck.iloc[stuck["gain"].abs().argsort(kind="stable")]
    return [list(dict.fromkeys(part["context_id"])) for part in (high[::-1], high, stuck)]


def _of_verdict(bank: Bank, correct: bool | None) -> Bank:
    """The contexts of one verdict; all of them for None."""
    if correct is None:
        return bank
    kept = tuple(one for one in bank if one.correct is correct)
    if not kept:
        judged = sum(one.correct is not None for one in bank)
        raise DiagnosticsError(
            f"No context is {'right' if correct else 'wrong'}: {judged} of {len(bank)} were judged."
            " Leave `correct` out, or judge the responses with --verifier."
        )
    return Bank(kept)


def _chosen(bank: Bank, context: int | str | Sequence[int | str] | None) -> list[Context]:
    if context is None:
        return list(bank)[:MOST_CONTEXTS]
    wanted = [context] if isinstance(context, (int, str, np.integer)) else list(context)
    by_id = {one.context_id: one for one in bank}
    found = [by_id.get(one) if isinstance(one, str) else _at(bank, one) for one in wanted]
    if None in found or not found:
        missing = wanted[found.index(None)] if found else wanted
        raise DiagnosticsError(
            f"There is no context {missing!r}: the bank holds {len(bank)}, from"
            f" {bank[0].context_id!r} to {bank[len(bank) - 1].context_id!r}. Give an index, a"
            " context_id, or a list of them."
        )
    return found


def _at(bank: Bank, index: int) -> Context | None:
    """The context of that index, counted from the end where negative; None outside the bank."""
    return bank[index] if -len(bank) <= index < len(bank) else None


def _rows(tokens: pd.DataFrame, contexts: list[Context]) -> np.ndarray:
    """Row numbers of the contexts' positions, in order."""
    places = pd.Series(np.arange(len(tokens))).groupby(tokens["context_id"].to_numpy()).indices
    order = tokens["position"].to_numpy()
    rows = []
    for context in contexts:
        here = places.get(context.context_id, np.array([], dtype=int))
        here = here[np.argsort(order[here], kind="stable")]
        if order[here].tolist() != list(range(len(context.sampled_ids))):
            raise DiagnosticsError(
                f"The token table has {len(here)} positions for context {context.context_id!r},"
                f" whose response has {len(context.sampled_ids)}. Pass the table that was scored"
                " from this bank."
            )
        rows.append(here)
    return np.concatenate(rows)


def _criteria(tokens: pd.DataFrame, names: Iterable[str] | None) -> list[str]:
    if names is not None:
        return [registry.find(name).name for name in names]
    known = [*registry.usual(tokens), *filter(_is_mine, registry.available(tokens))]
    able = [name for name in dict.fromkeys(known) if registry.find(name).kind != "all"]
    first = [name for name in CRITERIA if name in able]
    return [*first, *(name for name in able if name not in first)]


def _is_mine(name: str) -> bool:
    return registry.find(name).mine


def _stops(positions: int) -> list[list[float]]:
    """[share, number of positions] of each stop of the slider."""
    return [[budget, registry.budget_count(positions, budget)] for budget in BUDGETS]


def _measurements(tokens: pd.DataFrame, rows: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for name in MEASURES:
        if name in tokens:
            values = tokens[name].to_numpy(dtype=np.float64)
            unit = SCHEMA[name].unit if name in SCHEMA else ""
            found.append(
                {
                    "name": name,
                    "kind": "measurement",
                    "unit": unit,
                    **_scale(values),
                    "packing": "<f4",
                    "data": pack(values[rows], "<f4"),
                }
            )
    return found


def _scores(tokens: pd.DataFrame, rows: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """Scores of the criteria with the rank of each position in the whole table, 0 where it can
    never be selected.
    """
    found, measured = [], set(MEASURES) & set(tokens.columns)
    width = "<u2" if len(tokens) < 2**16 else "<u4"
    for name in names:
        scores, raw = registry.score_pairs(tokens, name)
        ranks = np.zeros(len(tokens), dtype=np.int64)
        order = registry.ranking(tokens, scores, raw)
        ranks[order] = np.arange(1, len(order) + 1)
        shown = f"{name} (criterion)" if name in measured else name
        found.append(
            {
                "name": shown,
                "kind": "criterion",
                "unit": registry.find(name).formula,
                **_scale(scores),
                "packing": UPPER,
                "data": pack(scores[rows], UPPER),
                "ranks": pack(ranks[rows], width),
                "width": width,
            }
        )
    return found


def _scale(values: np.ndarray) -> dict[str, Any]:
    """Ends of the color scale: symmetric around zero where the low end lies below it."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, SCALE_ENDS) if len(finite) else (0.0, 1.0)
    signed = bool(low < 0)
    reach = max(abs(low), abs(high))
    low, high = (-reach, reach) if signed else (low, high)
    return {"low": float(low), "high": float(high if high > low else low + 1e-12), "signed": signed}


UPPER = "upper"
"""Packing of the upper two bytes of 32-bit floats, rounded to the nearest."""


def pack(values: np.ndarray, packing: str) -> str:
    """Base64 of the little-endian bytes of an array, of a numpy dtype or `UPPER`."""
    if packing == UPPER:
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4").astype(np.uint64)
        rounded = np.where(np.isnan(values), 0x7FC0, (bits + 0x8000) >> 16)
        values, packing = rounded, "<u2"
    return base64.b64encode(np.ascontiguousarray(values, dtype=np.dtype(packing)).tobytes()).decode(
        "ascii"
    )


def unpack(text: str, packing: str) -> np.ndarray:
    """The array that was packed, as float64 or as integers."""
    content = base64.b64decode(text)
    if packing != UPPER:
        return np.frombuffer(content, dtype=packing).astype(
            np.float64 if packing == "<f4" else np.int64
        )
    bits = np.frombuffer(content, dtype="<u2").astype("<u4") << 16
    return bits.view("<f4").astype(np.float64)


def _contexts(contexts: list[Context]) -> list[dict[str, Any]]:
    return [
        {
            "id": one.context_id,
            "prompt_id": one.prompt_id,
            "prompt": one.prompt,
            "finished": one.finished,
            "correct": one.correct,
            "length": len(one.sampled_ids),
        }
        for one in contexts
    ]


ROLES = ("student", "teacher")
TOPS = tuple(f"{role}_top{part}" for role in ROLES for part in ("", "_p"))
"""Columns of the table of most likely tokens that the view shows."""


def _tops(tops: pd.DataFrame, shown: pd.DataFrame) -> dict[str, Any]:
    """Both models' most likely tokens at the shown positions, packed.

    Tokens are indices from 1 into a list of words, 0 for none; probabilities are in steps of
    1/65535.
    """
    require_columns(
        tops,
        ("context_id", "position", *TOPS),
        what="The table of most likely tokens for a token view",
    )
    table = tops.set_index(["context_id", "position"])[list(TOPS)]
    table = table.reindex(pd.MultiIndex.from_frame(shown[["context_id", "position"]]))
    cells = [cell for role in ROLES for cell in table[f"{role}_top"] if not _is_missing(cell)]
    k = max(map(len, cells), default=0)
    words: dict[str, int] = {}
    packed: dict[str, Any] = {}
    for role in ROLES:
        ids, shares = _padded(table[f"{role}_top"], table[f"{role}_top_p"], k, words)
        steps = pack(np.round(shares.ravel() * PROBABILITY_STEPS), "<u2")
        packed[role] = {"ids": ids.ravel(), "p": steps}
    width = "<u2" if len(words) < 2**16 - 1 else "<u4"
    for role in packed:
        packed[role]["ids"] = pack(packed[role]["ids"], width)
    return packed | {"k": k, "words": list(words), "width": width, "steps": PROBABILITY_STEPS}


def _padded(
    tokens: pd.Series, probabilities: pd.Series, k: int, words: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices [N, k] into `words`, to which new tokens are added, and probabilities [N, k]."""
    ids, shares = np.zeros((len(tokens), k), dtype=np.int64), np.zeros((len(tokens), k))
    for i, (names, values) in enumerate(zip(tokens, probabilities, strict=True)):
        if not _is_missing(names):
            ids[i, : len(names)] = [words.setdefault(str(name), len(words)) + 1 for name in names]
            shares[i, : len(names)] = values
    return ids, shares


def _is_missing(cell: Any) -> bool:
    """True for a position that the table of most likely tokens does not have."""
    return cell is None or isinstance(cell, float)


def script_json(content: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _fragment(payload: dict[str, Any]) -> str:
    return (
        '<div class="tokenview"><script'
        f' type="application/json">{script_json(payload)}</script><noscript>The token view needs'
        " JavaScript; it loads nothing from elsewhere.</noscript></div>"
    )
