"""Right and wrong responses on the page: verdicts side by side, and the main tables of either."""

from __future__ import annotations

import html
from collections.abc import Mapping

import pandas as pd

from diagnostics.analysis.responses import ALL, SIDES
from diagnostics.report import naming, summary
from diagnostics.report.glossary import typeset
from diagnostics.report.page_tables import table_block
from diagnostics.report.run_results import OF_SIDES, RunResults

SHOWN = ("verdicts", "correlations", "selection_curves", "selection_summary", "decision")
"""Tables of a side that the page holds; the others lie beside them in the run directory."""
ANSWERED = (
    summary.DECISION,
    "Which criterion follows the gain?",
    "What would a selection capture?",
    "What of confident errors?",
)
"""Questions that are answered for each side."""
HOW_MADE = (
    "Each side is a table of its own: scales, cuts, ranks, nulls, selections and Holm’s correction"
    " are those of its positions alone. The steps are not: every step was taken on all responses of"
    " its fold, so these are the positions of right (or wrong) responses after a step on both."
    " Right responses are the easier or the shorter ones too, so a difference between the columns"
    " describes two sets of responses. Every verdict on a side is exploratory, because what was"
    " registered is of all responses."
)
KIND_WORDS = {"paper": "as the paper has it", "controlled": "with controls"}


def parts(run: RunResults) -> dict[str, RunResults]:
    """The run and its two sides, as far as there are tables of them, by `all`, `right`, `wrong`."""
    return {ALL: run} | {side: run.responses(side) for side in SIDES if side in run.sides}


def is_asked(run: RunResults) -> bool:
    """Whether the tables of either side were asked for."""
    return OF_SIDES in run.manifest.get("stages", {})


def counted(run: RunResults, side: str) -> str:
    """Prompts and positions of a side, or why nothing is judged of it, as a sentence."""
    facts = run.stage(OF_SIDES).get(side) or {}
    if side not in run.sides:
        return run.why_no(side)
    return f"{int(facts['prompts']):,} prompts, {int(facts['positions']):,} positions."


def answers(run: RunResults) -> dict[str, str]:
    """What a side says to the questions of the page that it can answer."""
    found = summary.answer(run)
    return {question: found[question] for question in ANSWERED if question in found}


def verdicts(found: Mapping[str, RunResults]) -> pd.DataFrame:
    """Verdicts of the claims, one row per claim, kind and outcome.

    Args:
        found: Results by `all`, `right` and `wrong`, as `parts` gives them.

    Returns:
        Columns claim, kind, outcome, statement, and one per part with its verdict; an en dash where
        a part has none.
    """
    keys = ["claim", "kind", "outcome"]
    frames = []
    for name, run in found.items():
        shown, _ = summary.claims(run)
        if {*keys, "verdict", "statement"} <= set(shown):
            shown = shown[shown["population"] != "training"] if "population" in shown else shown
            frames.append(shown[[*keys, "statement", "verdict"]].assign(part=name))
    if not frames:
        return pd.DataFrame()
    long = pd.concat(frames, ignore_index=True).drop_duplicates([*keys, "part"])
    wide = long.pivot(index=keys, columns="part", values="verdict").reindex(columns=list(found))
    said = long.drop_duplicates(keys).set_index(keys)["statement"]
    wide = wide.loc[said.index].fillna("–")
    wide.insert(0, "statement", said)
    return wide.reset_index()


def overview(run: RunResults) -> str:
    """How much there is of either side, and the verdicts of all and of both side by side."""
    made = {side: counted(run, side) for side in SIDES}
    text = "".join(
        f"<p><b>{side.capitalize()} responses.</b> {html.escape(said)}</p>"
        for side, said in made.items()
    )
    facts = run.stage(OF_SIDES)
    if facts.get("not_judged"):
        text += (
            f'<p class="quiet">{int(facts["not_judged"]):,} responses are not judged and belong to'
            " neither side.</p>"
        )
    table = verdicts(parts(run)) if run.sides else pd.DataFrame()
    note = f'<p class="quiet">{html.escape(HOW_MADE)}</p>' if run.sides else ""
    return text + note + (_verdict_table(table) if len(table) else "")


def _verdict_table(table: pd.DataFrame) -> str:
    names = [name for name in (ALL, *SIDES) if name in table]
    heads = "".join(f'<th class="plain" scope="col">{name}</th>' for name in names)
    rows = "".join(
        _claim_rows(str(claim), str(statement), part, names)
        for (claim, statement), part in table.groupby(["claim", "statement"], sort=False)
    )
    return (
        '<div class="scroll"><table class="facts"><thead><tr><th class="plain" scope="col">claim'
        f"</th>{heads}</tr></thead><tbody>\n{rows}</tbody></table></div>"
    )


def _claim_rows(claim: str, statement: str, part: pd.DataFrame, names: list[str]) -> str:
    """A claim in words over the whole width, and a row of verdicts per kind and outcome."""
    words = html.escape(f"{claim}: {typeset(statement)}")
    head = (
        f'<th class="group" scope="rowgroup" colspan="{1 + len(names)}"><span>{words}</span></th>'
    )
    rows = "".join(_verdict_row(row, names) for row in part.to_dict("records"))
    return f"<tr>{head}</tr>\n{rows}"


def _verdict_row(row: Mapping, names: list[str]) -> str:
    outcome = naming.OUTCOMES.get(row["outcome"], naming.readable(str(row["outcome"])))
    kind = KIND_WORDS.get(row["kind"], str(row["kind"]))
    cells = "".join(
        f'<td><span class="verdict {summary.verdict_class(row[name])}">{html.escape(row[name])}'
        "</span></td>"
        for name in names
    )
    words = html.escape(", ".join(filter(None, [kind, outcome])))
    return f'<tr><th scope="row">{words}</th>{cells}</tr>\n'


def tables(run: RunResults, side: str) -> str:
    """The main tables of a side, folded, and where its others lie."""
    held = run.sides[side]
    shown = [name for name in SHOWN if name in held and len(held[name])]
    others = [name for name in held if name not in shown]
    beside = f'<p class="quiet">In tables/{side}: {html.escape(", ".join(others))}.</p>'
    return "".join(table_block(name, held[name], folder=side) for name in shown) + beside
