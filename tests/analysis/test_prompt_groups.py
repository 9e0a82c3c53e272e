"""Random groups of prompts: a hand-worked case, agreement with draws, and samples of prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import (
    correlations,
    prompt_groups,
    quadrants,
    rank_correlation,
    selection,
    study,
)
from diagnostics.analysis.bootstrap import Estimate, PromptClusters, mean
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.rank_correlation import (
    Controls,
    Variable,
    partial,
    pearson,
    spearman,
    values_of_pairs,
)
from diagnostics.analysis.step_batches import over_steps
from diagnostics.core import processes
from diagnostics.core.tables import write_parquet
from tests.made_tokens import made_tokens


@pytest.fixture
def small_limits(monkeypatch):
    """Limits at which the made-up table is large."""
    monkeypatch.setattr(prompt_groups, "LEAST_PROMPTS", 12)
    monkeypatch.setattr(prompt_groups, "LEAST_POSITIONS", 10)
    monkeypatch.setattr(prompt_groups, "GROUPS", 4)


def plain(prompts: int, length: int, seed: int = 0) -> pd.DataFrame:
    """A table of one step with a gain that has a part of its prompt."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(prompts), length)
    gain = rng.normal(size=prompts)[codes] + rng.normal(size=len(codes))
    return pd.DataFrame({"prompt_id": [f"p{code}" for code in codes], "gain": gain})


def means(tokens: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, Estimate]:
    prompts = PromptClusters(tokens["prompt_id"], bootstrap=bootstrap)
    return {"mean": mean(tokens["gain"].to_numpy(), prompts)}


def test_a_mean_over_groups_is_the_hand_worked_one():
    value, draws = prompt_groups.of_values(np.array([1.0, 2.0, 4.0, 5.0]))
    assert value == 3.0
    # The variance of the values is 10/3, that of their mean 10/12.
    assert np.std(draws, ddof=1) == pytest.approx(np.sqrt(10 / 12))


def test_with_a_tenth_of_the_groups_undefined_it_is_still_defined_and_with_more_it_is_not():
    values = np.arange(20.0)
    values[3] = np.nan
    value, draws = prompt_groups.of_values(values)
    assert value == pytest.approx((190 - 3) / 19) and np.isnan(draws[3])
    values[4:6] = np.nan
    assert np.isnan(prompt_groups.of_values(values)[0])


def test_groups_hold_every_prompt_once_and_whole(small_limits):
    tokens = plain(30, 5)
    groups = prompt_groups.groups_of(tokens, 0)
    assert len(groups) == 4 and sum(map(len, groups)) == len(tokens)
    names = [set(group["prompt_id"]) for group in groups]
    assert sorted(map(len, names)) == [7, 7, 8, 8]
    assert set.union(*names) == set(tokens["prompt_id"]) and sum(map(len, names)) == 30
    assert all((group["prompt_id"].value_counts() == 5).all() for group in groups)
    assert prompt_groups.groups_of(tokens, 0) is groups
    assert prompt_groups.groups_of(groups[0], 0) == []


def test_small_tables_are_not_divided():
    assert prompt_groups.groups_of(plain(40, 5), 0) == []


def test_the_interval_is_the_t_interval_of_the_groups_means(small_limits):
    tokens = plain(40, 5)
    estimate = over_steps(means, tokens, Bootstrap(draws=30))["mean"]
    of_groups = [group["gain"].mean() for group in prompt_groups.groups_of(tokens, 0)]
    assert estimate.value == pytest.approx(np.mean(of_groups))
    reach = stats.t.ppf(0.975, 3) * np.std(of_groups, ddof=1) / 2
    # 40 / 39 is the correction for few prompts that every interval has.
    low, high = estimate.interval(0.95)
    assert (high - low) / 2 == pytest.approx(reach * np.sqrt(40 / 39))
    assert (estimate.positions, estimate.prompts, estimate.groups) == (200, 40, 4)


def test_over_many_tables_groups_and_draws_agree_on_the_standard_error(monkeypatch):
    monkeypatch.setattr(prompt_groups, "LEAST_POSITIONS", 10)
    monkeypatch.setattr(prompt_groups, "GROUPS", 20)
    errors = {10: [], 10_000: []}
    for seed in range(20):
        tokens = plain(200, 4, seed)
        for least, found in errors.items():
            monkeypatch.setattr(prompt_groups, "LEAST_PROMPTS", least)
            prompt_groups._divided.clear()
            estimate = over_steps(means, tokens, Bootstrap(draws=200))["mean"]
            found.append(estimate.standard_error)
    ratio = np.mean(np.square(errors[10])) / np.mean(np.square(errors[10_000]))
    assert 0.8 < ratio < 1.25


def test_a_paired_difference_is_that_of_the_groups(small_limits):
    tokens = plain(40, 5).assign(other=lambda each: 2 * each["gain"])

    def make(part, bootstrap):
        prompts = PromptClusters(part["prompt_id"], bootstrap=bootstrap)
        return {name: mean(part[name].to_numpy(), prompts) for name in ("gain", "other")}

    found = over_steps(make, tokens, Bootstrap(draws=30))
    difference = found["other"] - found["gain"]
    assert difference.standard_error == pytest.approx(found["gain"].standard_error)
    assert difference.groups == 4 and difference.times(2.0).groups == 4


@pytest.mark.parametrize("ranked", [False, True])
def test_values_of_pairs_are_those_of_single_pairs(ranked):
    rng = np.random.default_rng(0)
    prompts = PromptClusters(np.repeat(np.arange(10), 12), draws=20)
    held = rng.normal(size=(2, 120))
    scores = {"a": rng.normal(size=120) + held[0], "flat": np.ones(120), "b": rng.normal(size=120)}
    scores["b"][:7] = np.nan
    outcomes = {"y": scores["a"] + rng.normal(size=120), "z": rng.normal(size=120)}
    scores, outcomes = (
        {name: Variable(values) for name, values in pool.items()} for pool in (scores, outcomes)
    )
    found = values_of_pairs(scores, outcomes, prompts, ranked=ranked)
    given = values_of_pairs(scores, outcomes, prompts, ranked=ranked, controls=Controls(list(held)))
    for (outcome, score), estimate in found.items():
        pair = scores[score], outcomes[outcome]
        alone = (spearman if ranked else pearson)(*pair, prompts)
        assert estimate.value == pytest.approx(alone.value, abs=1e-12, nan_ok=True)
        assert (estimate.positions, estimate.prompts) == (alone.positions, alone.prompts)
        alone = partial(*pair, Controls(list(held)), prompts, ranked=ranked)
        assert given[outcome, score].value == pytest.approx(alone.value, abs=1e-12, nan_ok=True)


def test_every_table_of_a_divided_study_and_comparison_is_there(small_limits):
    tokens, options = made_tokens(), {"criteria": ["teachability", "divergence"], "draws": 8}
    made = study.study(tokens, base_k=16, **options)
    compared = selection.compare(tokens, budgets=[0.1], **options)
    prompt_groups.LEAST_PROMPTS = 10_000
    prompt_groups._divided.clear()
    usual = study.study(tokens, base_k=16, **options)
    assert set(made) == set(usual)
    assert set(compared) == set(selection.compare(tokens, budgets=[0.1], **options))
    for name in ("correlations", "quadrants", "positions"):
        keys = [each for each in usual[name] if usual[name][each].dtype.kind not in "fiu"]
        assert set(map(tuple, made[name][keys].values)) == set(map(tuple, usual[name][keys].values))
    assert made["positions"]["positions"].sum() == usual["positions"]["positions"].sum()


def test_two_processes_make_of_the_groups_what_one_makes(small_limits, monkeypatch):
    made = []
    for workers in (1, 2):
        monkeypatch.setattr(processes, "usable", lambda workers=workers: workers)
        made.append(selection.compare(made_tokens(), budgets=[0.1], draws=8))
    one, two = made
    assert list(one) == list(two)
    for name, table in one.items():
        pd.testing.assert_frame_equal(two[name], table, check_exact=True)


def test_the_mean_of_a_divided_table_is_near_that_of_the_whole(small_limits):
    tokens = made_tokens()
    divided = quadrants.position_means(tokens, bins=1, draws=20)
    prompt_groups.LEAST_PROMPTS = 10_000
    prompt_groups._divided.clear()
    whole = quadrants.position_means(tokens, bins=1, draws=200)
    apart = np.abs(divided["mean"] - whole["mean"])
    assert (apart < (whole["high"] - whole["low"])).all()


def test_pairs_are_counted_among_some_prompts_of_a_large_group(small_limits, monkeypatch):
    monkeypatch.setattr(correlations, "KENDALL_POSITIONS", 20)
    table = correlations.correlate(made_tokens(), criteria=["divergence"], draws=20)
    counted = table[table["method"] == "kendall"]
    assert (counted["positions"] < table["positions"].max()).all()
    assert np.isfinite(counted["estimate"]).any()


def test_a_study_of_too_many_positions_is_of_a_sample_of_prompts(tmp_path, monkeypatch, caplog):
    tokens = made_tokens()
    monkeypatch.setattr(prompt_groups, "LEAST_PROMPTS", 3)
    monkeypatch.setattr(prompt_groups, "STUDIED", len(tokens) // 2)
    prompt_groups._say.cache_clear()
    sample = prompt_groups.studied(tokens, 0)
    assert 0 < len(sample) <= len(tokens) // 2
    kept = tokens[tokens["prompt_id"].isin(sample["prompt_id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(sample, kept)
    (told,) = sample.attrs["warnings"]
    assert told[0] == "sampled" and f"from {len(tokens)} positions" in told[2]
    assert told[2] in caplog.text
    path = write_parquet(tmp_path / "tokens.parquet", tokens)
    read = prompt_groups.read_studied(path, 0)
    pd.testing.assert_frame_equal(read, sample)
    assert read.attrs["warnings"] == sample.attrs["warnings"]


def test_few_prompts_and_few_positions_are_studied_whole(tmp_path, monkeypatch):
    tokens = made_tokens()
    assert prompt_groups.studied(tokens, 0) is tokens
    path = write_parquet(tmp_path / "tokens.parquet", tokens)
    pd.testing.assert_frame_equal(prompt_groups.read_studied(path, 0), tokens)
    monkeypatch.setattr(prompt_groups, "STUDIED", 10)
    assert prompt_groups.studied(tokens, 0) is tokens


def test_no_prompt_is_left_out_where_that_would_take_minutes(monkeypatch):
    tokens = made_tokens()
    usual = correlations.associate(tokens, criteria=["divergence"], draws=20)
    monkeypatch.setattr(rank_correlation, "LEFT_OUT", 0)
    found = correlations.associate(tokens, criteria=["divergence"], draws=20)
    for key, estimate in found.items():
        assert (estimate.left_out is None) == (key[3] == "spearman")
        assert usual[key].left_out is not None
        assert estimate.value == usual[key].value
        np.testing.assert_array_equal(estimate.draws, usual[key].draws)
