"""Which criteria rank the positions of a run nearly alike, written to reports/near-criteria.

    python -m diagnostics rollout --pair embedded --contexts 192 --output-dir DIR
    python scripts/near_criteria.py DIR

The contexts are those of reports/embedded-probe. Every position is scored with all measurements,
those on request among them; no step is taken, so `token_identity` and what draws random numbers are
left out. `scripts/docs.py` copies the nearest pairs into docs/criteria.md."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pandas as pd

import diagnostics as dx
from diagnostics import criteria
from diagnostics.core.tables import write_csv
from diagnostics.measure.extras import COLUMNS

ROOT = Path(__file__).parent.parent
DECIMALS = 4
TABLE = ROOT / "reports" / "near-criteria" / "near_criteria.csv"


def near(tokens: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of every two criteria's scores.

    Args:
        tokens: A token table.

    Returns:
        Columns criterion, other, spearman and positions (where both are defined), largest in size
        first.
    """
    names = [
        name
        for name in criteria.available(tokens)
        if not criteria.is_seeded(name) and criteria.find(name).kind != "all"
    ]
    scores = {name: pd.Series(criteria.score_criterion(tokens, name)) for name in names}
    rows = []
    for one, other in itertools.combinations(names, 2):
        both = scores[one].notna() & scores[other].notna()
        ranks = [scores[name][both].rank() for name in (one, other)]
        rows.append((one, other, round(ranks[0].corr(ranks[1]), DECIMALS), int(both.sum())))
    frame = pd.DataFrame(rows, columns=["criterion", "other", "spearman", "positions"])
    order = frame["spearman"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def main(directory: str) -> None:
    """Score the contexts of a run, and write the table."""
    bank = dx.read_bank(Path(directory) / "contexts.parquet")
    tokens = dx.score(dx.load_pair("embedded"), bank, sweep=(), extra=tuple(COLUMNS))
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    write_csv(TABLE, near(tokens))


if __name__ == "__main__":
    main(sys.argv[1])
