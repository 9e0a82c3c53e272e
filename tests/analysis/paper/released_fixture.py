"""A bank that the released scripts were run on, under this project's column names.

`python -m tests.analysis.paper.released_fixture SOURCE TARGET` writes the reduced copy of a fixture
that the tests read: the columns that they need, and the numbers to compare with.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.analysis.paper.masks import kept_summary, training_mask, training_scores
from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.contexts.released_columns import MEASURED
from tests.analysis.paper.released_names import BANK_SCORES

FOLDER = Path(os.environ.get("RELEASED_FIXTURE", Path(__file__).parents[2] / "files" / "released"))
"""Where the fixture lies; RELEASED_FIXTURE names another folder with the same file names."""
OTHER_KS = (8, 32)
BUDGET = 0.05
"""Budget of the trainings."""
SCORED_FILES = ("theta0_metrics", "fixed_context_metrics")
LISTS = ("student_top_ids", "student_top_logps", "teacher_top_ids", "teacher_top_logps")
POSITION = ["sample_ordinal", "tok_pos"]
BY_SUPPORT = ["Cmass_true", "CBC", "Coverlap", "reach_t1", "target_in_student_topk"]
SCORED = [
    *POSITION,
    "sample_index",
    "group_index",
    "pos_norm",
    "resp_len",
    "token_id",
    "Hs_full",
    "Ht_full",
    "KLf_full",
    "student_top1_id",
    "teacher_top1_id",
    *BY_SUPPORT,
]
READ = {
    "theta0_metrics": SCORED,
    "fixed_context_metrics": [*SCORED, *LISTS, "KLf_full_base", "G_KLf"],
    "support_k8_k32": [
        *POSITION,
        *(
            f"{name}_k{k}_{when}"
            for name in BY_SUPPORT
            for k in OTHER_KS
            for when in ("theta0", "after")
        ),
    ],
    "interventions": [*POSITION, "mask", "seed", "Hs_full", "KLf_full", "Cmass_true"],
    "token_bank": [
        "rollout_id",
        "sample_index",
        "tok_pos",
        "loss_mask_original",
        "Hs_topk_norm",
        "KLf_union",
        "Cmass",
        "Coverlap",
        "CBC",
        "Cprefix_ema",
        "reach_t1",
        "quadrant",
        *BANK_SCORES,
    ],
}
"""Columns that the tests read, by file; of the token bank also every `keep_...`."""


@dataclass(frozen=True)
class ReleasedFixture:
    """The files of a fixture."""

    folder: Path

    def table(self, name: str) -> pd.DataFrame:
        """One of the fixture's parquet files, as it is."""
        return pd.read_parquet(self.folder / f"{name}.parquet")

    @cached_property
    def expected(self) -> dict:
        """The numbers of the released scripts."""
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def theta0(self) -> pd.DataFrame:
        """The bank scored with the untrained student."""
        return self.table(SCORED_FILES[0])

    @cached_property
    def trained(self) -> pd.DataFrame:
        """The bank scored with the trained student."""
        return self.table(SCORED_FILES[1])

    @cached_property
    def bank(self) -> pd.DataFrame:
        """The token bank of the training code."""
        return self.table("token_bank")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """The token table: the untrained student's columns, the trained one's and other K."""
        before, after = (self.folder / f"{name}.parquet" for name in SCORED_FILES)
        tokens = read_tokens(before, after=after)
        made = tokens.assign(**self._other_supports())
        made.attrs.update(tokens.attrs)
        return made

    def _other_supports(self) -> dict[str, np.ndarray]:
        others = self.theta0[POSITION].merge(self.table("support_k8_k32"), validate="one_to_one")
        return {
            f"{MEASURED[name]}_k{k}{ending}": others[f"{name}_k{k}_{when}"].to_numpy()
            for name in BY_SUPPORT
            for k in OTHER_KS
            for when, ending in (("theta0", ""), ("after", "_after"))
        }

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The training bank's scores, from the columns that it measured."""
        columns = ("Hs_topk_norm", "KLf_union", "Cmass", "rollout_id")
        return training_scores(*(self.bank[name].to_numpy() for name in columns))

    @property
    def supervised(self) -> np.ndarray:
        """Mask of the training bank's positions that carry loss."""
        return (self.bank["loss_mask_original"] == 1).to_numpy()

    def mask(self, name: str, budget: float, *, minimum: int = 1) -> np.ndarray:
        """What a mask of the training code keeps of its bank, by our name."""
        return training_mask(
            self.scores,
            name,
            budget,
            position=self.bank["tok_pos"].to_numpy(),
            sample=self.bank["sample_index"].to_numpy(),
            rollout=self.bank["rollout_id"].to_numpy(),
            supervised=self.supervised,
            minimum=minimum,
        )

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The trained students of all trainings: the checkpoint's and the other interventions'."""
        columns = READ["interventions"]
        first = self.trained.assign(mask="teachability", seed=-1)[columns]
        frame = pd.concat([first, self.table("interventions")[columns]], ignore_index=True)
        names = self.theta0[POSITION].assign(context_id=self.tokens["context_id"].to_numpy())
        frame = frame.merge(names, on=POSITION, how="left", validate="many_to_one")
        return frame.assign(budget=BUDGET).rename(
            columns={
                "mask": "criterion",
                "tok_pos": "position",
                "Hs_full": "student_entropy_after",
                "KLf_full": "forward_kl_after",
                "Cmass_true": "compatibility_after",
            }
        )

    @cached_property
    def kept(self) -> pd.DataFrame:
        """What the mask of each training keeps of the training bank."""
        rows = [
            {
                "criterion": criterion,
                "budget": BUDGET,
                "seed": seed,
                **kept_summary(self.scores, self.mask(criterion, BUDGET), self.supervised),
            }
            for criterion, seed in dict.fromkeys(zip(self.cells["criterion"], self.cells["seed"]))
        ]
        return pd.DataFrame(rows)


def reduce(source: Path, target: Path) -> None:
    """Copy what the tests read of a fixture."""
    target.mkdir(parents=True, exist_ok=True)
    for name, columns in READ.items():
        frame = pd.read_parquet(source / f"{name}.parquet")
        kept = [column for column in frame if column.startswith("keep_")]
        frame[[*columns, *kept]].to_parquet(
            target / f"{name}.parquet",
            index=False,
            compression="brotli",
            compression_level=11,
            use_dictionary=False,
        )
    numbers = json.loads((source / "expected.json").read_text())
    (target / "expected.json").write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    reduce(*map(Path, sys.argv[1:3]))
