"""C5 from a grid of trainings: margins, what a grid detects, and what has no verdict."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import training_outcomes
from diagnostics.analysis.training_outcomes import Outcomes, SeedPromptEstimate, verdict_table

PROMPTS, SEEDS = 40, 3


def outcome_rows(
    effects, *, measure="reverse_kl", seeds=SEEDS, prompts=PROMPTS, noise=0.02, rng=0, start=1.0
):
    """Rows of a grid: value = start - effect of the cell + prompt effect + noise."""
    generator = np.random.default_rng(rng)
    prompt_effect, count = generator.normal(0, 0.1, prompts), generator.integers(5, 15, prompts)
    rows = []
    for (criterion, budget), effect in {("untouched", 0.0): 0.0, **effects}.items():
        for seed in [-1] if criterion == "untouched" else range(seeds):
            values = (
                start
                - effect
                + prompt_effect
                + generator.normal(0, noise if criterion != "untouched" else 0, prompts)
            )
            rows += [
                (criterion, budget, seed, measure, f"p{g:02d}", value * n, n)
                for g, (value, n) in enumerate(zip(values, count))
            ]
    return pd.DataFrame(
        rows, columns=["criterion", "budget", "seed", "measure", "prompt_id", "total", "count"]
    )


FIVE = {
    ("full", 1.0): 0.5,
    ("teachability", 0.05): 0.5,
    ("entropy", 0.05): 0.3,
    ("divergence", 0.05): 0.2,
    ("tip", 0.05): 0.3,
    ("random", 0.05): 0.35,
}


def seen(value, prompts=PROMPTS):
    """A difference that three trainings show alike."""
    return SeedPromptEstimate(np.full(3, value), np.full((5, 3), value), prompts)


def test_a_margin_below_what_the_grid_detects_is_not_identified():
    effects = FIVE | {("entropy", 0.05): 0.5}
    noisy = verdict_table(Outcomes(outcome_rows(effects, noise=1.5), draws=100)).set_index("rival")
    row = noisy.loc["entropy"]
    assert row["verdict"] == "not identified" and row["detectable"] > row["margin"]
    # The errors fall as one over each number, so that the margin needs (detectable/margin)^2 more.
    times = (row["detectable"] / row["margin"]) ** 2
    assert row["reason"] == (
        f"the margin cannot be tested: it is {row['margin']:.3g}, and this grid detects"
        f" {row['detectable']:.3g} with 80 % power; about {int(np.ceil(PROMPTS * times))} prompts x"
        f" {int(np.ceil(3 * times))} seeds would be needed"
    )
    assert noisy.loc["all", "verdict"] in ("not identified", "refuted")
    difference = Outcomes(outcome_rows(effects, noise=1.5), draws=100)
    gap = difference.gain("reverse_kl", "teachability", 0.05) - difference.gain(
        "reverse_kl", "entropy", 0.05
    )
    quantiles = stats.t.ppf([0.975, 0.8], gap.freedom).sum()
    assert row["detectable"] == pytest.approx(quantiles * gap.standard_error)
    low, high = gap.interval()
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, gap.freedom) * gap.standard_error)


def test_what_the_margin_could_be_but_is_not_decided_is_inconclusive():
    judge = training_outcomes._judged
    gap = seen(0.0)
    assert judge(gap, (-0.2, 0.1), 0.1, 0.05) == ("inconclusive", "its test does not decide")
    assert judge(gap, (-0.2, 0.1), 0.1, 0.5)[0] == "not identified"
    assert judge(gap, (-0.05, 0.1), 0.1, 0.5) == ("supported", "")
    assert judge(gap, (-0.5, -0.2), 0.1, 0.5) == ("refuted", "")
    assert judge(gap, (0.1, 0.1), 0.1, 0.0) == ("not identified", "its interval has no width")
    assert "full training gained nothing" in judge(gap, (-0.1, 0.1), 0.0, 0.1)[1]
    assert "not trained" in judge(gap, (-0.1, 0.1), np.nan, 0.1)[1]
    assert judge(seen(0.0, prompts=19), (1.0, 2.0), 0.1, 0.1) == (
        "not identified",
        "fewer than 20 prompts",
    )


def test_a_missing_rival_and_too_few_seeds_leave_c5_open():
    missing = {cell: effect for cell, effect in FIVE.items() if cell[0] != "tip"}
    table = verdict_table(Outcomes(outcome_rows(missing), draws=100)).set_index("rival")
    assert table.loc["all", "verdict"] == "inconclusive" and "tip" not in table.index
    two = verdict_table(Outcomes(outcome_rows(FIVE, seeds=2), draws=100))
    assert (two["verdict"] == "not identified").all()
    assert (two["reason"] == "too few seeds: 3 are needed").all()
