"""Pooling over pairs: hand-worked means, another route, and what may not be pooled."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis.across_pairs import PairTables, effects, pooled, random_effects
from diagnostics.core.errors import DiagnosticsError

Z = stats.norm.ppf(0.975)


def decision(effect_full=0.5, prompts=60, **over):
    """A decision table with `full` and a criterion per keyword: (difference, half an interval)."""
    shared = {"horizon": 20, "measure": "reverse_kl", "rollouts": "all", "primary": True}
    shared |= {"prompts": prompts, "steps": 4}
    full = {"criterion": "full", "budget": 1.0, "effect": effect_full}
    rows = [full | {"effect_low": effect_full - 0.1}]
    for name, (value, half) in over.items():
        ends = {"over_random_low": value - half, "over_random_high": value + half}
        rows.append({"criterion": name, "budget": 0.05, "over_random": value, **ends})
    return pd.DataFrame([shared | row for row in rows])


def correlations(**values):
    rows = [
        {"outcome": "context_gain", "criterion": name, "split": "held_out", "method": "spearman"}
        | {"estimate": value, "low": value - 0.1, "high": value + 0.1, "prompts": 50, "steps": 4}
        for name, value in values.items()
    ]
    return pd.DataFrame(rows)


def squares(y, s, tau2):
    w = [1 / (e * e + tau2) for e in s]
    mean = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    return sum(a * (b - mean) ** 2 for a, b in zip(w, y, strict=True))


def apart(y, s):
    """tau^2 by halving an interval, then Hartung and Knapp by loops."""
    y, s = [float(v) for v in y], [float(v) for v in s]
    k, least, most = len(y), 0.0, 100.0
    for _ in range(200):
        tau2 = (least + most) / 2
        least, most = (tau2, most) if squares(y, s, tau2) > k - 1 else (least, tau2)
    tau2 = least if squares(y, s, 0.0) > k - 1 else 0.0
    w = [1 / (e * e + tau2) for e in s]
    mean = sum(a * b for a, b in zip(w, y, strict=True)) / sum(w)
    se = (max(1.0, squares(y, s, tau2) / (k - 1)) / sum(w)) ** 0.5
    half, wide = stats.t.ppf(0.975, k - 1) * se, np.nan
    if k > 2:
        wide = stats.t.ppf(0.975, k - 2) * (tau2 + se**2) ** 0.5
    return mean, mean - half, mean + half, tau2**0.5, mean - wide, mean + wide


def test_pairs_that_agree_have_the_mean_of_one_experiment():
    """Two pairs, 1 +- 1 and 3 +- 1: tau^2 = 2 - 1 = 1, mean 2, SE = sqrt(2 / 2) = 1."""
    found = random_effects([1.0, 3.0], [1.0, 1.0])
    assert found["tau"] == pytest.approx(1.0, rel=1e-9)
    assert found["mean"] == pytest.approx(2.0)
    assert found["high"] - found["mean"] == pytest.approx(stats.t.ppf(0.975, 1), rel=1e-9)
    assert np.isnan(found["new_low"])


def test_the_interval_is_never_narrower_than_without_a_factor():
    """Three equal estimates: Q is 0, and the factor of Hartung and Knapp would make it 0 wide."""
    found = random_effects([0.2, 0.2, 0.2], [0.1, 0.1, 0.1])
    assert found["tau"] == 0 and found["i2"] == 0
    half = stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert found["high"] - found["mean"] == pytest.approx(half)


@pytest.mark.parametrize("seed", range(5))
def test_means_and_ranges_are_those_of_another_route(seed):
    draw = np.random.default_rng(seed)
    y, s = draw.normal(0, 1, 3 + seed), draw.uniform(0.1, 0.8, 3 + seed)
    found = random_effects(y, s)
    names = ("mean", "low", "high", "tau", "new_low", "new_high")
    np.testing.assert_allclose([found[name] for name in names], apart(y, s), rtol=1e-7, atol=1e-9)


def test_thousandths_of_a_nat_are_pooled_like_nats():
    y, s = np.array([0.1, 0.4, 0.3]), np.array([0.1, 0.05, 0.2])
    one, ten = random_effects(y, s), random_effects(1e-4 * y, 1e-4 * s)
    for name in ("mean", "low", "high", "tau", "new_low"):
        assert ten[name] == pytest.approx(1e-4 * one[name], rel=1e-9)
    assert ten["p_value"] == pytest.approx(one["p_value"], rel=1e-9)


def test_a_difference_to_random_is_a_share_of_what_all_positions_give():
    pairs = {
        "a": PairTables({"decision": decision(0.5, teachability=(0.1, 0.05))}),
        "b": PairTables({"decision": decision(0.2, teachability=(0.1, 0.05))}),
    }
    table = effects(pairs)
    assert table["estimate"].tolist() == pytest.approx([0.2, 0.5])
    assert table["low"].tolist() == pytest.approx([0.1, 0.25])
    row = pooled(table).iloc[0]
    want = apart([0.2, 0.5], np.array([0.1, 0.25]) / Z)
    assert row["mean"] == pytest.approx(want[0], rel=1e-9)


def test_a_pair_whose_full_loss_gives_nothing_is_counted_and_not_pooled():
    pairs = {
        "a": PairTables({"decision": decision(0.5, teachability=(0.1, 0.05))}),
        "b": PairTables({"decision": decision(0.05, teachability=(0.1, 0.05))}),
    }
    table = effects(pairs)
    assert table["judged"].tolist() == [True, False]
    assert "not clear of zero" in table["reason"][1]
    row = pooled(table).iloc[0]
    assert (row["pairs"], row["not_judged"], row["verdict"]) == (1, 1, "one pair")


def test_a_pair_of_few_prompts_is_shown_and_not_pooled():
    pairs = {
        name: PairTables({"decision": decision(0.5, count, teachability=(0.1, 0.05))})
        for name, count in (("a", 60), ("b", 19))
    }
    table = effects(pairs)
    assert table["reason"].tolist() == ["", "too few prompts"]


def test_correlations_are_pooled_after_arctanh():
    pairs = {
        name: PairTables({"correlations": correlations(entropy=value)})
        for name, value in (("a", 0.2), ("b", 0.5), ("c", 0.4))
    }
    row = pooled(effects(pairs)).iloc[0]
    value = np.array([0.2, 0.5, 0.4])
    error = (np.arctanh(value + 0.1) - np.arctanh(value - 0.1)) / 2 / Z
    want = np.tanh(np.array(apart(np.arctanh(value), error))[[0, 1, 2, 4, 5]])
    got = [row[name] for name in ("mean", "low", "high", "new_low", "new_high")]
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "signs, verdict",
    [
        ((1, 1, 1), "above zero on every pair"),
        ((-1, -1, -1), "below zero on every pair"),
        ((1, -1, 1), "turns with the pair"),
        ((0, 0, 0), "cannot tell"),
    ],
)
def test_verdicts(signs, verdict):
    pairs = {
        f"pair {i}": PairTables({"decision": decision(0.5, tip=(0.2 * sign, 0.05))})
        for i, sign in enumerate(signs)
    }
    assert pooled(effects(pairs)).iloc[0]["verdict"] == verdict


def test_random_divergent_is_a_rival_of_its_own():
    table = decision(0.5, teachability=(0.1, 0.05), random_divergent=(0.08, 0.05))
    rival = pd.DataFrame({"over_random_divergent": [np.nan, 0.02, np.nan]})
    for end, half in (("_low", -0.05), ("_high", 0.05)):
        rival[f"over_random_divergent{end}"] = rival["over_random_divergent"] + half
    table = pd.concat([table, rival], axis=1)
    found = effects({name: PairTables({"decision": table}) for name in "ab"})
    rows = found[found["kind"] == "over_random_divergent"]
    assert rows["conclusion"].tolist() == ["teachability"] * 2
    assert rows["estimate"].tolist() == pytest.approx([0.04, 0.04])


def test_one_pair_is_no_atlas():
    with pytest.raises(DiagnosticsError, match="two or more pairs"):
        effects({"a": PairTables({"decision": decision(tip=(0.1, 0.1))})})


def test_runs_without_tables_are_refused():
    with pytest.raises(DiagnosticsError, match="Run `analyze`"):
        effects({"a": PairTables({}), "b": PairTables({})})
