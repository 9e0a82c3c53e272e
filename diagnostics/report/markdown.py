"""The report for a repository's page: report.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from diagnostics.report import provenance, summary
from diagnostics.report.figures.registry import in_page_order
from diagnostics.report.run_results import RunResults
from diagnostics.report.two_steps import OF, in_words, meaning, two_steps


def markdown(run: RunResults, drawn: Collection[str], left_out: Mapping[str, str]) -> str:
    """The report as Markdown: answer, verdicts, figures as links, missing parts, provenance.

    Args:
        run: The run's tables, tokens and notes.
        drawn: Names of the figures that were drawn.
        left_out: For each figure that could not be drawn, the reason.

    Returns:
        The text of report.md. Text that came from models, prompts or users is escaped.
    """
    blocks = [
        f"# {_plain(summary.title(run))}",
        *(f"**{question}** {_plain(text)}" for question, text in summary.answer(run).items()),
        *_step_rows(run),
        *_verdict_rows(run),
    ]
    blocks += [f"> {_plain(message)}" for message in provenance.warnings(run)]
    blocks += [
        "## What was not run",
        "\n".join(f"- {_plain(line)}" for line in provenance.missing(run, left_out)) or "Nothing.",
    ]
    for spec in in_page_order():
        if spec.name in drawn:
            blocks += [
                f"## {spec.title}",
                f"![{spec.title}](figures/{spec.name}.png)",
                spec.reading,
            ]
    versions = ", ".join(
        f"{name} {version}" for name, version in run.manifest.get("versions", {}).items()
    )
    blocks += [
        "## Provenance",
        _plain(
            f"{versions}. Settings, models and the sha256 of each file: manifest.json; every"
            " number: tables/*.csv."
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _step_rows(run: RunResults) -> list[str]:
    """The probe's step and the decision's, side by side; nothing unless both are recorded."""
    table = two_steps(run)
    if len(table) < 2:
        return []
    rows = [f"| {' | '.join([name, *map(_plain, cells)])} |" for name, cells in in_words(table)]
    head = f"| | {' | '.join(OF[step] for step in table['step'])} |"
    return [_plain(meaning(table)), "\n".join([head, "|---|---|---|", *rows])]


def _verdict_rows(run: RunResults) -> list[str]:
    shown, _ = summary.claims(run)
    if not {"claim", "outcome", "verdict", "sentence"} <= set(shown.columns):
        return []
    columns = ["claim", *(name for name in ("kind",) if name in shown), "outcome", "verdict"]
    heads = {"outcome": "by", "kind": "as"}
    cells = shown[[*columns, "sentence"]].astype(object).fillna("").astype(str).map(_plain)
    rows = [f"| {' | '.join(row)} |" for row in cells.itertuples(index=False)]
    head = " | ".join([*(heads.get(name, name) for name in columns), "why"])
    registered = summary.registered(run)
    table = ["\n".join([f"| {head} |", "|" + "---|" * (len(columns) + 1), *rows])]
    return ([_plain(registered)] if registered else []) + table


CODE = r"`[^`<>|\n]+`"
"""What is left as code; nothing in it can end a table's cell or begin an element."""


def _plain(text: str) -> str:
    """Text that Markdown shows as it is; what stands between backticks is code."""
    parts = re.split(f"({CODE})", summary.minus(text))
    return "".join(part if re.fullmatch(CODE, part) else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
