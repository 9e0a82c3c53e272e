"""The step batches' part of an interval."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import bootstrap
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.splits import splits
from diagnostics.analysis.step_batches import over_steps, pooled_drops
from diagnostics.core.folds import combine

STEPS, PROMPTS, LENGTH = 4, 24, 5


def fold_table(seed: int = 0, *, step_spread: float = 0.1) -> pd.DataFrame:
    """Gains with a spread over prompts and one over steps."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(PROMPTS), LENGTH)
    base = rng.normal(size=PROMPTS)[prompt] + rng.normal(size=len(prompt))
    steps = rng.normal(size=STEPS) * step_spread
    return combine(
        pd.DataFrame(
            {
                "prompt_id": [f"p{number:02d}" for number in prompt],
                "fold": prompt % STEPS,
                "forward_kl": 1.0,
                "reverse_kl": 1.0,
            }
            | {f"gain_fold{step}": base + steps[step] for step in range(STEPS)}
        )
    )


def means(tokens: pd.DataFrame, settings: Bootstrap) -> dict[str, Estimate]:
    return {
        split.name: bootstrap.mean(split.values(tokens, "gain"), split.prompts)
        for split in splits(tokens, bootstrap=settings)
    }


def test_the_two_parts_add_up_and_the_freedom_is_satterthwaites():
    estimate = over_steps(means, fold_table(), Bootstrap())["held_out"]
    tokens = fold_table()
    without = np.array([combine(tokens, without=f)["gain"].mean() for f in range(STEPS)])
    step_part = (STEPS - 1) / STEPS * ((without - without.mean()) ** 2).sum()
    prompt_part = means(tokens, Bootstrap())["held_out"].standard_error ** 2
    assert estimate.step_error**2 == pytest.approx(step_part, rel=1e-12)
    assert estimate.standard_error**2 == pytest.approx(step_part + prompt_part, rel=1e-12)
    freedom = (step_part + prompt_part) ** 2 / (
        step_part**2 / (STEPS - 1) + prompt_part**2 / (PROMPTS - 1)
    )
    reach = stats.t.ppf(0.975, freedom) * (step_part + prompt_part) ** 0.5
    assert estimate.interval()[1] - estimate.value == pytest.approx(reach, rel=1e-9)
    assert estimate.p_value == pytest.approx(
        2 * stats.t.sf(abs(estimate.value) / estimate.standard_error, freedom), rel=1e-9
    )


def test_equal_steps_add_nothing():
    found = over_steps(means, fold_table(step_spread=0.0), Bootstrap())["held_out"]
    assert found.step_error == pytest.approx(0, abs=1e-15)
    assert found.interval() == pytest.approx(
        means(fold_table(step_spread=0.0), Bootstrap())["held_out"].interval(), rel=1e-9
    )


def test_a_difference_is_paired_by_step():
    found = over_steps(means, fold_table(step_spread=2.0), Bootstrap())["held_out"]
    other = found.times(1.0)
    assert (found - other).step_error == 0
    assert found.times(3.0).step_error == pytest.approx(3 * found.step_error)


def test_a_table_of_one_step_carries_the_prompts_alone():
    one = fold_table().drop(columns="fold").assign(split="held_out")
    found = over_steps(means, one, Bootstrap())["all"]
    assert found.steps == 1
    assert found.standard_error == found.prompt_error


def test_exact_draws_make_every_cut_anew():
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(30), 7)
    values = rng.normal(size=len(ids)) + rng.normal(size=30)[ids]
    prompts = PromptClusters(ids, bootstrap=Bootstrap(draws=50))

    def share_above_median(columns: dict[str, np.ndarray]) -> np.ndarray:
        x = columns["x"]
        return np.array([x[x > np.median(x)].mean(), len(np.unique(columns["prompt"]))])

    mean, count = bootstrap.exact(share_above_median, {"x": values}, prompts)
    assert count.value == 30
    assert (count.draws == 30).all()
    for draw, weights in zip(mean.draws, prompts.weights):
        rows = np.concatenate([np.repeat(values[ids == p], int(w)) for p, w in enumerate(weights)])
        assert draw == pytest.approx(rows[rows > np.median(rows)].mean(), rel=1e-12)


def test_pooled_drops_are_sums_over_the_folds_and_not_a_mean_of_ratios():
    rows = [(0, 1.0, 3.0, 3.0), (1, 1.0, 1.0, 0.5), (0, 2.0, 6.0, 6.0), (1, 2.0, 2.0, -2.0)]
    table = pd.DataFrame(rows, columns=["fold", "step_size", "predicted_drop", "realised_drop"])
    table["chosen"] = table.step_size == 1.0
    pooled = pooled_drops(table.iloc[::-1])
    assert pooled.step_size.tolist() == [1.0, 2.0] and pooled.chosen.tolist() == [True, False]
    assert pooled.ratio.tolist() == [3.5 / 4, 4 / 8] and pooled.folds.tolist() == [2, 2]
    assert pooled.realised_drop.tolist() == [1.75, 2.0]
    assert pooled_drops(table.iloc[:3]).step_size.tolist() == [1.0]  # fold 1 lacks the other
    flat = pooled_drops(table.assign(predicted_drop=0.0))
    assert flat.ratio.isna().all()
