"""A bank that the released scripts were run on, under this project's column names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.contexts.import_tokens import MEASURED, from_released

FOLDER = Path(
    os.environ.get("RELEASED_FIXTURE", Path(__file__).parents[2] / "files" / "released")
)
"""Where the fixture lies; another one with the same file names may be named in RELEASED_FIXTURE."""
OURS = MEASURED | {"target_in_student_topk": "sampled_in_student_topk"}
AFTER = (
    "student_entropy",
    "forward_kl",
    "reverse_kl",
    "compatibility",
    "bhattacharyya",
    "topk_overlap",
    "teacher_top1_in_topk",
    "sampled_in_student_topk",
    "top1_match",
)
LISTS = ("student_top_ids", "student_top_logps", "teacher_top_ids", "teacher_top_logps")
KEYS = ["sample_ordinal", "tok_pos"]


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
        return self.table("theta0_metrics")

    @cached_property
    def trained(self) -> pd.DataFrame:
        """The bank scored with the trained student."""
        return self.table("fixed_context_metrics")

    @cached_property
    def bank(self) -> pd.DataFrame:
        """The token bank of the training code."""
        return self.table("token_bank")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """The token table: the untrained student's columns, the trained one's and other K."""
        before, after = (self._measured(frame) for frame in (self.theta0, self.trained))
        tokens = before.assign(**{f"{name}_after": after[name] for name in AFTER})
        return tokens.assign(**self._other_supports()).assign(k=np.nan).drop(columns="k")

    def _measured(self, frame: pd.DataFrame) -> pd.DataFrame:
        outcomes = [name for name in frame if name.endswith("_base") or name.startswith("G_")]
        tokens = from_released(frame.drop(columns=outcomes))
        return tokens.assign(
            sampled_in_student_topk=frame["target_in_student_topk"].to_numpy() != 0
        )

    def _other_supports(self) -> dict[str, np.ndarray]:
        others = self.theta0[KEYS].merge(self.table("support_k8_k32"), validate="one_to_one")
        found = {}
        for theirs, ours in OURS.items():
            for k in (8, 32):
                for when, ending in (("theta0", ""), ("after", "_after")):
                    name = f"{theirs}_k{k}_{when}"
                    if name in others:
                        found[f"{ours}_k{k}{ending}"] = others[name].to_numpy()
        return found

    def lists(self) -> tuple[np.ndarray, ...]:
        """Ids and log-probabilities of the trained student's and the teacher's lists."""
        return tuple(np.array([json.loads(row) for row in self.trained[name]]) for name in LISTS)
