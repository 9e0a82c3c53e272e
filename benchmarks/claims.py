"""How often the claims get a verdict: where there is nothing to find, and where something is.

    python benchmarks/claims.py --tables 200 --output benchmarks/CLAIMS.md

Tables of known content (`tests/claim_tables.py`), 32 prompts of 40 positions, four folds:

    any teacher     the gain rises with D under the permuted teacher as under the true one
    any teacher,    the same, and each step also adds c and d*c by chance, with mean 0 over steps:
      uneven steps  an interval over the prompts alone would take that for an effect
    reach           the context gain rises with C
    interaction     it rises with d*c

A false verdict is a primary row that is supported or refuted in one of the first two.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diagnostics.analysis.claims import claim_tables
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from tests.claim_tables import claim_tokens

CASES = {
    "any teacher": dict(marginal=0.05),
    "any teacher, uneven steps": dict(marginal=0.05, tilt=0.01),
    "reach": dict(reach=0.01),
    "interaction": dict(interaction=0.04),
}
FALSE = ("any teacher", "any teacher, uneven steps")
DRAWS = 200


def primary_verdicts(case: str, seed: int) -> pd.DataFrame:
    """Claim, kind and verdict of the primary rows of one table."""
    tokens = claim_tokens(seed=seed, prompts=32, length=40, **CASES[case])
    table = claim_tables(
        tokens,
        base_k=16,
        bootstrap=Bootstrap(draws=DRAWS, seed=seed),
        registered=PrimaryChoices().sha256(),
    )["verdicts"]
    columns = ["claim", "kind", "verdict"]
    return table.loc[table["primary"], columns].assign(case=case, seed=seed)


def summary(found: pd.DataFrame) -> str:
    """Markdown: shares of each verdict by case and claim, and the rate of false verdicts."""
    lines = ["| case | claim | kind | supported | refuted | inconclusive | not identified |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for (case, claim, kind), rows in found.groupby(["case", "claim", "kind"], sort=False):
        shares = [
            f"{(rows.verdict == name).mean():.3f}"
            for name in ("supported", "refuted", "inconclusive", "not identified")
        ]
        lines.append(f"| {case} | {claim} | {kind} | {' | '.join(shares)} |")
    lines.append("")
    decided = found.assign(false=found.verdict.isin(["supported", "refuted"]))
    for case in FALSE:
        rows = decided[decided.case == case]
        if len(rows):
            per_table = rows.groupby("seed").false.any()
            error = np.sqrt(per_table.mean() * (1 - per_table.mean()) / len(per_table))
            lines.append(
                f"{case}: {per_table.mean():.1%} +- {error:.1%} of {len(per_table)} tables have a"
                " false verdict among their primary rows (nominal: at most 5 %)."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Simulate the tables and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", type=int, default=200, help="tables per case")
    parser.add_argument("--case", choices=list(CASES), help="one case alone")
    parser.add_argument("--output", help="also write the table to this file")
    options = parser.parse_args()
    cases = [options.case] if options.case else list(CASES)
    found = pd.concat(
        [primary_verdicts(case, seed) for case in cases for seed in range(options.tables)],
        ignore_index=True,
    )
    text = summary(found)
    print(text)
    if options.output:
        head = f"{__doc__.split(chr(10), maxsplit=1)[0]}\n\n{options.tables} tables per case.\n\n"
        Path(options.output).write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()
