"""K of a table's columns: stated by the scoring, the table or a flag, and never assumed."""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import claim_statistics, quadrants
from diagnostics.analysis import robustness as R
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.study import study
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from tests.made_tokens import made_tokens, only_row

DRAWS = {"draws": 10, "seed": 0}


def with_k(k, tokens=None):
    """A table whose overlaps are those of K, with other K beside it."""
    tokens = made_tokens(supports=(16, 32)) if tokens is None else tokens
    overlap = np.random.default_rng(3).integers(0, k + 1, len(tokens)) / k
    return tokens.assign(topk_overlap=overlap)


@pytest.mark.parametrize("k", [1, 4, 8, 10, 16, 64])
def test_overlaps_tell_k(k):
    assert R.known_k(with_k(k)) == (k if k > 1 else None)
    assert R.known_k(with_k(k).head(20)) is None and R.known_k(with_k(k), k) == k


def test_a_k_that_cannot_be_is_refused():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The values of topk_overlap are no numbers of tokens over 16, so K is not 16\. They"
            r" are those of K = 10\. Give the K that"
        ),
    ):
        R.known_k(with_k(10), 16)
    with pytest.raises(DiagnosticsError, match=r"^K is a number of tokens, 1 or more; got 0\.$"):
        R.known_k(with_k(10), 0)


def test_every_k_of_the_columns_shows():
    tokens = with_k(8, made_tokens(supports=(3, 16, 64)))
    assert {k for _, k, _ in R.supports(tokens, base_k=8)} == {8, 3, 16, 64}


def test_the_study_writes_each_k_for_its_own_columns():
    """K = 8 without a suffix, K = 16 and 32 with one: each row is that of its column."""
    tokens = with_k(8)
    table = study(tokens, criteria=["divergence"], **DRAWS)["support_robustness"]
    assert set(table[table.proxy == "compatibility"].k) == {8, 16, 32}
    for k, name in ((8, "compatibility"), (16, "compatibility_k16"), (32, "compatibility_k32")):
        expected = claim_statistics.estimates(
            tokens,
            {"context_gain": ("controlled",)},
            claim_statistics.Support("compatibility", k, name),
            {},
            widened="",
            bootstrap=Bootstrap(draws=0),
        )
        value = next(
            estimate.value
            for key, estimate in expected.items()
            if (key.population, key.name) == ("held_out", "interaction")
        )
        row = only_row(
            table,
            proxy="compatibility",
            k=k,
            outcome="context_gain",
            split="held_out",
            statistic="interaction",
        )
        assert row.estimate == pytest.approx(value)


def test_an_unknown_k_is_said():
    tokens = made_tokens().drop(columns=["topk_overlap"])
    found = study(tokens, criteria=["divergence"], **DRAWS)["warnings"]
    assert (
        only_row(found, code="unknown_k").message
        == "Nothing says at which K these columns were measured; K = 16 is written for it. Pass"
        " base_k, or --k."
    )
    for told in (
        study(tokens, criteria=["divergence"], base_k=8, **DRAWS),
        study(with_k(8), criteria=["divergence"], **DRAWS),
    ):
        assert "unknown_k" not in set(told["warnings"].code) and 8 in set(
            told["claim_statistics"].k
        )


def test_an_imported_table_states_its_k_or_is_asked_for_it(tmp_path, capsys):
    path, directory = tmp_path / "tokens.parquet", tmp_path / "out"
    made_tokens().drop(columns=["topk_overlap"]).to_parquet(path)
    command = [
        "analyze",
        "--tokens",
        str(path),
        "--draws",
        "5",
        "--quiet",
        "--output-dir",
        str(directory),
    ]
    assert main(command) == 2
    assert (
        "does not say at which K compatibility were measured. Give it with --k, or in a column `k`."
        in capsys.readouterr().err
    )
    assert main([*command, "--k", "4"]) == 0
    assert set(pd.read_csv(directory / "tables/support_robustness.csv").k) == {4, 8}
    assert (
        json.loads((directory / "manifest.json").read_text())["stages"]["analyze"]["settings"]["k"]
        == 4
    )


def test_an_imported_table_is_not_taken_at_twice_its_k(tmp_path, capsys):
    """Every overlap of K = 8 is one of K = 16 as well, but none of so many is an odd sixteenth."""
    path = tmp_path / "tokens.parquet"
    with_k(8).assign(k=16).to_parquet(path)
    command = ["analyze", "--tokens", str(path), "--draws", "5", "--quiet"]
    for number, more in enumerate((["--k", "16"], ["--k", "32"])):
        assert main([*command, *more, "--output-dir", str(tmp_path / str(number))]) == 2
        assert "are those of K = 8: none is an odd part." in capsys.readouterr().err
    assert main([*command, "--k", "8", "--output-dir", str(tmp_path / "right")]) == 0


def test_a_runs_scoring_says_its_k(folders, tmp_path, capsys):
    out = ["--quiet", "--output-dir", str(tmp_path / "out")]
    models = [*folders[:4], "--device", "cpu"]
    assert main(["rollout", *folders[:10], "--device", "cpu", *out]) == 0
    assert main(["score", *models, "--k", "8", "--sweep", "16,32", *out]) == 0
    assert main(["probe", *models, *out]) == 0
    assert main(["analyze", "--draws", "5", *out]) == 0
    table, tokens = (
        pd.read_csv(tmp_path / "out/tables/support_robustness.csv"),
        pd.read_parquet(tmp_path / "out/tokens.parquet"),
    )
    assert set(table.k) == {8, 16, 32}
    split = table.split.iloc[0]
    for k, name in ((8, "compatibility"), (16, "compatibility_k16"), (32, "compatibility_k32")):
        contrast = quadrants.q3_contrast(
            tokens.assign(compatibility=tokens[name]), by=["compatibility"], draws=0
        )
        expected = only_row(contrast, outcome="gain", split=split, groups="tertile").difference
        row = only_row(
            table, proxy="compatibility", k=k, outcome="gain", split=split, statistic="q3_gap"
        )
        assert row.estimate == pytest.approx(expected, nan_ok=True)
    assert main(["analyze", "--draws", "5", "--k", "16", *out]) == 2
    assert "Got --k 16, and this run was scored with --k 8." in capsys.readouterr().err
