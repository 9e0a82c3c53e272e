"""The atlas: what holds on several pairs, which conclusions turn, and what a new pair would show.

    found = dx.atlas(["reports/embedded-probe", "reports/second-pair", "reports/smollm2"])
    found.pooled                             # one row per conclusion: mean, range, verdict
    found.effects                            # one row per pair and conclusion
    found.save("reports/atlas")              # atlas.html, tables/, figures/

Every sentence of the page is made from a row of `pooled`."""

from __future__ import annotations

import hashlib
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from diagnostics.analysis.across_pairs import CLAIMS, PairTables, effects, pooled
from diagnostics.analysis.claims import p_words
from diagnostics.analysis.decision import RIVALS
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import several
from diagnostics.core.run_lock import hold
from diagnostics.core.shown import by_uncertainty, sizes
from diagnostics.report import figures, glossary, naming, page, run_results, summary, svg
from diagnostics.report.compare_runs import folder_names
from diagnostics.report.page_tables import table_block
from diagnostics.report.run_results import RunResults
from diagnostics.report.written_pages import encoded, write_pages

CONTROLLED = tuple(f"{claim}: {statistic}" for claim, statistic in list(CLAIMS)[:3])
"""The conclusions of kind claim that the controlled statistics give."""
SENTENCES = {f"{claim}: {statistic}": words for (claim, statistic), words in CLAIMS.items()}
MOST_NAMED = 4
"""Criteria that a sentence names; the figure and the table have all."""


@dataclass(frozen=True)
class Atlas:
    """Several pairs; shows itself in a notebook as what holds on all of them."""

    runs: Mapping[str, RunResults]
    """What each run holds, by the name of its pair."""
    effects: pd.DataFrame
    """One row per pair and conclusion, see `analysis.across_pairs.effects`."""
    pooled: pd.DataFrame
    """One row per conclusion, see `analysis.across_pairs.pooled`."""

    def sentences(self) -> dict[str, list[str]]:
        """What follows, under the page's four questions; each sentence is a row, or a count."""
        return {
            "What to do": _advice(self.pooled, len(self.runs)),
            "What the paper got right": _claim_sentences(self.pooled, "right"),
            "What does not hold": [
                *_claim_sentences(self.pooled, "wrong"),
                *_turning(self.pooled),
            ],
            "What nobody can tell yet": _open_questions(self.pooled, len(self.runs)),
        }

    @property
    def pairs(self) -> pd.DataFrame:
        """The pairs: models, prompts, positions and step batches, one row per pair."""
        return pd.DataFrame([_facts(name, run) for name, run in self.runs.items()])

    def drawings(self) -> Iterator[tuple[str, str, dict]]:
        """Name, caption and options of `figures.atlas` for each figure that the tables allow."""
        kinds = {
            "over_random": "What each criterion gives beyond as many random positions.",
            "over_random_divergent": "The same beyond random positions among the divergent ones.",
            "correlation": "How criteria order what positions gain beyond a permuted teacher.",
            "claim": "The claims: the controlled statistics, and the paper's own.",
        }
        for kind, caption in kinds.items():
            rows = self.pooled[(self.pooled["kind"] == kind) & (self.pooled["pairs"] > 1)]
            budgets = sorted(rows["budget"].dropna().unique()) if "over" in kind else [None]
            for budget in budgets if len(rows) else []:
                where = "" if budget is None else f"_{budget:g}".replace(".", "_")
                yield f"{kind}{where}", caption, {"kind": kind, "budget": budget}

    @property
    def html(self) -> str:
        """All of it as one self-contained page."""
        return _page(self)

    def save(self, into: str | Path) -> Path:
        """Write atlas.html, its tables and its figures into a folder, and their hashes beside them.

        Args:
            into: The folder; made where it is missing.

        Returns:
            The path of atlas.html.

        Raises:
            DiagnosticsError: A file of such a name is not as this program wrote it.
        """
        into = Path(into)
        with hold(into):
            write_pages(into, {"atlas.html": encoded(self.html), **_files(self)})
        return into / "atlas.html"

    def __repr__(self) -> str:
        tables = {"effects": self.effects, "pooled": self.pooled}
        return sizes(f"Atlas of {', '.join(self.runs)}; tables (rows)", tables)

    def _repr_html_(self) -> str:
        return "".join(
            f"<h4>{html.escape(question)}</h4>{_list(found)}"
            for question, found in self.sentences().items()
        )


def atlas(directories: Sequence[str | Path], *, names: Sequence[str] | None = None) -> Atlas:
    """Pool what several pairs say, with a random effect of the pair.

    Args:
        directories: Two or more run directories, one per pair of models, each with the tables that
            `analyze` and, for decisions, `compare` write.
        names: A name for each pair; the shortest endings of the paths that tell them apart where
            None.

    Returns:
        The tables `effects` and `pooled`, and a page that `save` writes. In a notebook it shows
        itself.

    Raises:
        DiagnosticsError: There are fewer than two directories, names repeat, a directory is not a
            finished run, or two runs are of the same two models, which would count a pair twice.
    """
    paths = [Path(directory) for directory in several(directories)]
    names = list(names) if names is not None else folder_names(paths)
    if len(paths) < 2 or len(names) != len(paths) or len(set(names)) != len(names):
        raise DiagnosticsError(
            "An atlas needs two or more runs, each with a name of its own; got"
            f" {len(paths)} and the names {', '.join(map(str, names)) or 'none'}."
            " Name more directories, or pass names=[…]."
        )
    runs = {str(name): run_results.read_run(path) for name, path in zip(names, paths, strict=True)}
    _refuse_twice(runs)
    levels = {name: run.level for name, run in runs.items()}
    table = effects({name: PairTables(run.tables, run.level) for name, run in runs.items()})
    return Atlas(runs, table, pooled(table, levels=levels))


def _weights(run: RunResults) -> tuple[str | None, ...]:
    """The hashes of both models, None where the manifest does not know them."""
    stages = [run.stage(name) for name in ("score", "rollout", "probe")]
    return tuple(
        next((m["weights_sha256"] for s in stages if isinstance(m := s.get(role), dict)), None)
        for role in ("student", "teacher")
    )


def _refuse_twice(runs: Mapping[str, RunResults]) -> None:
    seen: dict[tuple[str | None, ...], str] = {}
    for name, run in runs.items():
        weights = _weights(run)
        if None in weights:
            continue
        if weights in seen:
            raise DiagnosticsError(
                f"{seen[weights]} and {name} are runs of the same two models; pooling them would"
                " count one pair twice. Name one of them, or set them side by side with"
                " `report --against`."
            )
        seen[weights] = name


def _facts(name: str, run: RunResults) -> dict[str, object]:
    table = run.table("coverage")
    decision = run.table("decision")
    prompts = positions = None
    if table is not None and "prompts" in table:
        prompts, positions = int(table["prompts"].max()), int(table["positions"].max())
    return {
        "pair": name,
        **{role: _model(run, role) for role in ("student", "teacher")},
        "prompts": prompts,
        "positions": positions,
        "interventions": "yes" if decision is not None else "no",
    }


def _model(run: RunResults, role: str) -> str:
    """A model's name, or its kind and size where the name says its role alone."""
    name = summary.models(run).get(role, role)
    kind = summary.kind(summary.identity(run, role))
    return name if name != role else kind or "–"


def _span(row: Mapping, low: str = "low", high: str = "high") -> str:
    """An interval with the digits that half of it allows."""
    half = (row[high] - row[low]) / 2
    ends = (by_uncertainty(row[end], half, sign=True) for end in (low, high))
    return f"[{', '.join(ends)}]".replace("-", "−")


def _mean(row: Mapping) -> str:
    """A mean over pairs with its interval."""
    half = (row["high"] - row["low"]) / 2
    return f"{by_uncertainty(row['mean'], half, sign=True)} {_span(row)}".replace("-", "−")


def _of_pairs(row: Mapping) -> str:
    """How many pairs lie above, below and open, and where a new pair is expected."""
    counted = f"{row['pairs']:.0f} pairs: {row['above']:.0f} above zero, {row['below']:.0f} below"
    if pd.isna(row["new_low"]):
        return counted
    either = row["new_low"] < 0 < row["new_high"]
    side = ", on either side of zero" if either else ""
    return f"{counted}; a new pair {_span(row, 'new_low', 'new_high')}{side}"


def _decisive(pool: pd.DataFrame) -> pd.DataFrame:
    """The cells of over_random at the horizon that most pairs have, all rollouts."""
    rows = pool[(pool["kind"] == "over_random") & (pool["rollouts"] == "all")]
    rows = rows[rows["pairs"] > 1]
    if rows.empty:
        return rows
    usual = rows.groupby("horizon")["pairs"].sum()
    return rows[rows["horizon"] == max(usual.index[usual == usual.max()])]


def _advice(pool: pd.DataFrame, pairs: int) -> list[str]:
    """Which criterion to train with, and which to leave, by budget."""
    rows = _decisive(pool)
    if rows.empty:
        return ["Fewer than two pairs have interventions, so that no criterion can be named."]
    return [
        *_by_budget(pool, rows, "above", "beats", pairs),
        *_by_budget(pool, rows, "below", "falls behind", pairs),
    ] or ["No criterion is on one side of random positions on the pairs that have it."]


def _by_budget(
    pool: pd.DataFrame, rows: pd.DataFrame, side: str, verb: str, pairs: int
) -> list[str]:
    found = []
    for budget, group in rows.groupby("budget"):
        sure = group[group["verdict"].str.startswith(side)]
        sure = sure[~sure["conclusion"].isin(RIVALS)]
        order = [False, side == "below"]  # what most pairs say, then the largest difference
        sure = sure.sort_values(["pairs", "mean"], ascending=order, kind="stable")
        for row in sure.head(MOST_NAMED if side == "above" else 1).to_dict("records"):
            found.append(
                f"At {budget:.0%}, {naming.readable(row['conclusion'])} {verb} random positions"
                f"{_where(row, pairs)} by {_mean(row)} of what all positions give ({_said(row)})"
                f"{_divergent(pool, row)}."
            )
    return found


def _where(row: Mapping, pairs: int) -> str:
    """Which pairs a verdict rests on that is of the pairs rather than of their mean."""
    if not row["verdict"].endswith("on every pair"):
        return ""
    having = f"{row['pairs']:.0f} of {pairs} pairs, the ones that have it"
    return f" on {'every pair' if row['pairs'] == pairs else having}, in the mean"


def _said(row: Mapping) -> str:
    """Verdict, counts and p; counts and p alone where the sentence says the verdict."""
    each = row["verdict"].endswith("on every pair")
    counts = "each settles its own sign" if each else f"{row['verdict']}; {_of_pairs(row)}"
    return f"{counts}; of the mean, {p_words(row['p_holm'])} after Holm"


def _turning(pool: pd.DataFrame) -> list[str]:
    """Criteria that are above random positions on one pair and below them on another."""
    rows = _decisive(pool)
    if rows.empty:
        return []
    rows = rows[(rows["verdict"] == "turns with the pair") & ~rows["conclusion"].isin(RIVALS)]
    return [
        f"{naming.readable(row['conclusion']).capitalize()} at {row['budget']:.0%} over random"
        f" positions: turns with the pair (mean {_mean(row)} of what all positions give;"
        f" {_of_pairs(row)})."
        for row in rows.sort_values(["budget", "conclusion"]).to_dict("records")
    ]


def _divergent(pool: pd.DataFrame, row: Mapping) -> str:
    """The same criterion and budget over random divergent positions, as the end of a sentence."""
    same = pool[(pool["kind"] == "over_random_divergent") & (pool["pairs"] > 1)]
    for name in ("conclusion", "outcome", "budget", "horizon", "rollouts"):
        same = same[same[name] == row[name]]
    if same.empty or row["mean"] < 0:
        return ""
    other = same.iloc[0].to_dict()
    return f"; over random divergent positions {_mean(other)} ({other['verdict']})"


def _claim_sentences(pool: pd.DataFrame, kind: str) -> list[str]:
    rows = pool[(pool["kind"] == "claim") & pool["conclusion"].isin(CONTROLLED)]
    wanted = {
        "right": rows["verdict"].str.startswith("above"),
        "wrong": rows["verdict"].str.startswith("below")
        | rows["verdict"].eq("turns with the pair"),
    }[kind]
    said = [_claim(row) for row in rows[wanted].to_dict("records")]
    return said or ["None of the controlled claims."]


def _claim(row: Mapping) -> str:
    name, words = str(row["conclusion"]).split(":")[0], SENTENCES[str(row["conclusion"])]
    return (
        f"{name}, {words}: {row['verdict']} (mean {_mean(row)};"
        f" {_of_pairs(row)}; {p_words(row['p_holm'])} after Holm)."
    )


def _open_questions(pool: pd.DataFrame, pairs: int) -> list[str]:
    claims = pool[(pool["kind"] == "claim") & pool["conclusion"].isin(CONTROLLED)]
    found = [_claim(row) for row in claims[claims["verdict"] == "cannot tell"].to_dict("records")]
    cells = _decisive(pool)
    if len(cells):
        open_cells = cells["verdict"].isin(["cannot tell", "turns with the pair"]).sum()
        found.append(
            f"{open_cells} of {len(cells)} cells of criterion and budget are open, or turn with the"
            " pair."
        )
    found.append(
        f"Whether {pairs} pairs stand for those that people train: they were not drawn from any"
        " population, and the range for a new pair takes them as if they were."
    )
    return found


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in sentences) + "</ul>"


def _page(found: Atlas) -> str:
    sentences = found.sentences()
    lists = {question: _list(texts) for question, texts in sentences.items()}
    linked = iter(glossary.linked("\0".join(lists.values())).split("\0"))
    lead = "".join(f"<h2>{html.escape(question)}</h2>{next(linked)}" for question in lists)
    drawn = "".join(_figure(found, *drawing) for drawing in found.drawings())
    tables = {"atlas_pooled": found.pooled, "atlas_effects": found.effects}
    sections = [
        ("pairs", "The pairs", _pairs_table(found.pairs)),
        ("figures", "Figures", drawn),
        ("method", "How pairs are pooled", f"<p>{html.escape(METHOD)}</p>"),
        ("tables", "Tables", "".join(table_block(*item) for item in tables.items())),
        ("methods", "Methods", glossary.glossary()),
    ]
    return page.shell(f"What holds on {len(found.runs)} pairs", "", lead, sections)


METHOD = (
    "Each pair gives one estimate per conclusion, with its interval over prompts and step batches."
    " The mean gives every pair a random effect (Paule and Mandel; Hartung and Knapp, with a factor"
    " of at least 1), and the range says where another pair is expected (from three pairs on)."
    " Correlations are pooled after Fisher's arctanh; differences to random are shares of what the"
    " full loss gives in the same pair. Pairs with fewer than 20 prompts are shown and not pooled."
    " Holm's correction is over the conclusions of one kind."
)
"""What the page says of the method; the formulas stand in `analysis.across_pairs`."""


def _pairs_table(table: pd.DataFrame) -> str:
    buffer = io.StringIO()
    for row in table.astype(object).where(table.notna(), "–").to_dict("records"):
        cells = "".join(map(_cell, list(row.values())[1:]))
        buffer.write(f'<tr><th scope="row">{html.escape(str(row["pair"]))}</th>{cells}</tr>\n')
    heads = "".join(f'<th class="plain" scope="col">{html.escape(name)}</th>' for name in table)
    return (
        f'<div class="scroll"><table class="facts"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{buffer.getvalue()}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if pd.api.types.is_number(value):
        return f'<td class="number">{value:,.0f}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _figure(found: Atlas, name: str, caption: str, options: Mapping) -> str:
    drawings = "".join(
        f'<div class="{size}">'
        + svg.inline_svg(
            figures.atlas(found.effects, found.pooled, width=width, **options), f"{name}-{size}"
        )
        + "</div>"
        for size, width in (("wide", figures.DOUBLE), ("narrow", figures.SINGLE))
    )
    text = html.escape(f"{caption} Every pair has its own prompts and its own interval.")
    return f'<figure id="figure-{name}">{drawings}<figcaption>{text}</figcaption></figure>'


def _files(found: Atlas) -> dict[str, bytes]:
    """The tables as CSV, the figures as PNG, and what was read."""
    made = {
        "tables/atlas_effects.csv": found.effects.to_csv(index=False).encode(),
        "tables/atlas_pooled.csv": found.pooled.to_csv(index=False).encode(),
        "atlas.json": json.dumps(_read(found), indent=2, sort_keys=True).encode(),
    }
    for name, _, options in found.drawings():
        drawn = figures.atlas(found.effects, found.pooled, **options)
        made[f"figures/atlas_{name}.png"] = svg.png(drawn)
    return made


def _read(found: Atlas) -> dict[str, dict]:
    """For each pair what was read of it: a hash over its manifest, its models and its choices."""
    return {
        name: {
            "manifest_sha256": hashlib.sha256(
                json.dumps(run.manifest, sort_keys=True).encode()
            ).hexdigest(),
            "models": summary.models(run),
            "primary": run.manifest.get("primary"),
        }
        for name, run in found.runs.items()
    }
