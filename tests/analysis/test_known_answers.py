"""What the whole analysis concludes from tables, and from a model, whose answer is known.

    gain_f          = s_f (marginal d + context + noise)    after the step on fold f, nats
    gain_permuted_f = s_f' (marginal d + noise)             after the step to a permuted teacher

with d, c and h the normalized divergence, compatibility and entropy of a position, which are
independent of each other, and factors s_f of each step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import criteria as registry
from diagnostics.analysis.claims import claim_tables
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.correlations import associate, correlate, correlation_differences
from diagnostics.analysis.selection import selection_curves
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.folds import combine
from diagnostics.core.schema import validate_tokens
from diagnostics.criteria import normalize
from diagnostics.models.pair import assemble
from diagnostics.probing.one_step import probe
from tests.conftest import make_model, make_pair, make_prompts, make_tokenizer
from tests.made_tokens import only_row

FOLDS = 4
QUICK = Bootstrap(draws=60)
DECIDED = {"supported", "refuted"}


def planted(
    context: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    prompts: int = 64,
    length: int = 14,
    marginal: float = 0.5,
    noise: float = 0.05,
    seed: int = 0,
    **columns,
) -> pd.DataFrame:
    """A fold table whose context gain is `context(d, c)` and noise."""
    rng = np.random.default_rng(seed)
    codes, n = np.repeat(np.arange(prompts), length), prompts * length
    divergence, entropy = np.exp(rng.normal(size=(2, n)))
    tokens = pd.DataFrame(
        {
            "context_id": [f"c{g}" for g in codes],
            "prompt_id": [f"p{g:03d}" for g in codes],
            "position": np.tile(np.arange(length), prompts),
            "response_length": length,
            "token_id": rng.integers(0, 99, n),
            "token": "t",
            "fold": codes % FOLDS,
            "student_entropy": entropy,
            "teacher_entropy": np.exp(rng.normal(size=n)),
            "forward_kl": divergence,
            "reverse_kl": divergence,
            "compatibility": rng.beta(2, 2, n),
        }
        | columns
    )
    d, c = normalize(tokens["forward_kl"]), normalize(tokens["compatibility"])
    factors = 1 + 0.02 * rng.normal(size=(FOLDS, 2))
    for fold, (real, permuted) in enumerate(factors):
        shared = marginal * d
        gain = shared + context(d, c) + noise * rng.normal(size=n)
        tokens[f"gain_fold{fold}"] = real * gain
        tokens[f"reverse_gain_fold{fold}"] = real * gain
        tokens[f"gain_permuted_fold{fold}"] = permuted * (shared + noise * rng.normal(size=n))
    return validate_tokens(combine(tokens))


def controlled(tokens: pd.DataFrame) -> pd.DataFrame:
    """The controlled verdicts of the primary population, by claim."""
    found = claim_tables(tokens, base_k=16, bootstrap=QUICK)["verdicts"]
    rows = found[(found["kind"] == "controlled") & (found["population"] == "held_out")]
    return rows.set_index("claim")


def test_a_planted_context_gain_is_found_where_the_gain_itself_hides_it():
    """The marginal part makes divergence order the gain best; the context gain is d*c."""
    tokens = planted(lambda d, c: 0.3 * d * c)
    found = controlled(tokens)
    assert set(found.loc[["C1", "C2", "C3"], "verdict"]) == {"supported"}
    found = associate(tokens, criteria=["teachability", "divergence"], bootstrap=QUICK)
    ahead = {
        row.outcome: row
        for row in correlation_differences(found, level=0.95).itertuples()
        if row.split == "held_out"
    }
    assert ahead["gain"].high < 0 < ahead["context_gain"].low


def test_a_negative_context_gain_is_refuted_and_not_left_open():
    found = controlled(planted(lambda d, c: -0.3 * d * c))
    assert set(found.loc[["C1", "C2", "C3"], "verdict"]) == {"refuted"}


def test_a_marginal_gain_alone_gives_no_controlled_verdict():
    found = controlled(planted(lambda d, c: np.zeros_like(d)))
    assert not DECIDED & set(found["verdict"])
    paper = claim_tables(planted(lambda d, c: 0 * d), base_k=16, bootstrap=QUICK)["verdicts"]
    raw = only_row(paper, claim="C1", kind="paper", outcome="gain", population="held_out")
    assert raw.verdict == "refuted"  # the same table, without the null


def test_a_planted_interaction_lies_in_its_interval():
    """c pays .1 for itself and .4 for each unit of d."""
    tokens = planted(lambda d, c: 0.1 * c + 0.4 * d * c)
    row = controlled(tokens).loc["C3"]
    assert row.statistic == "interaction" and row.verdict == "supported"
    assert row.low < 0.4 < row.high and row.high - row.low < 0.2


def test_an_effect_of_compatibility_alone_is_no_interaction():
    row = controlled(planted(lambda d, c: 0.3 * c)).loc["C3"]
    assert row.verdict not in DECIDED
    assert row.low < 0 < row.high


def test_a_measurement_that_does_not_follow_compatibility_is_no_proxy():
    """It would contradict C2 and C3 if it counted as a proxy: its effect has the other sign."""
    rng = np.random.default_rng(5)
    n = 64 * 14
    compatibility = rng.beta(2, 2, n)
    faithful = np.clip(compatibility + 0.02 * rng.normal(size=n), 0, 1)
    stranger = rng.random(n)
    strange = normalize(pd.Series(stranger))
    tokens = planted(
        lambda d, c: 0.3 * d * c - 0.2 * d * strange,
        compatibility=compatibility,
        compatibility_k8=faithful,
        bhattacharyya=faithful,
        topk_overlap=stranger,
    )
    tables = claim_tables(tokens, base_k=16, bootstrap=QUICK)
    rho = tables["claim_statistics"].query("statistic == 'spearman_with_c'").set_index("proxy")
    assert rho.loc["bhattacharyya", "estimate"] > 0.9
    assert abs(rho.loc["topk_overlap", "estimate"]) < 0.2
    row = only_row(tables["verdicts"], claim="C4", kind="controlled", population="held_out")
    assert row.verdict == "supported"
    assert "topk_overlap" in row.sentence


def test_a_bank_of_ties_decides_nothing():
    """Every position has the same divergence, entropy and compatibility."""
    n = 64 * 14
    same = dict(
        forward_kl=np.full(n, 0.7),
        reverse_kl=np.full(n, 0.7),
        student_entropy=np.full(n, 1.2),
        compatibility=np.full(n, 0.5),
    )
    tokens = planted(lambda d, c: 0 * d, **same)
    for name in ("divergence", "teachability", "tip", "entropy", "compatibility", "incompatible"):
        assert registry.ambiguous_share(tokens, name, budget=0.05) == 1.0
        assert registry.select(tokens, name, budget=0.05).sum() == registry.budget_count(n, 0.05)
    table = correlate(tokens, criteria=["divergence", "teachability"], bootstrap=QUICK)
    assert table[["estimate", "low", "high"]].isna().all(axis=None)
    assert not DECIDED & set(
        claim_tables(tokens, base_k=16, bootstrap=QUICK)["verdicts"]["verdict"]
    )
    curves = selection_curves(tokens, criteria=["divergence"], budgets=[0.05], bootstrap=QUICK)
    assert (curves.loc[curves["criterion"] == "divergence", "ambiguous"] == 1.0).all()


@torch.no_grad()
def deaf_teacher():
    """A teacher that says the same, and nothing uniform, whatever it reads.

    All tokens have one embedding, so every position attends to copies of one vector.
    """
    model = make_model(2, hidden=48)
    table = model.get_input_embeddings().weight
    table[:] = table[5].clone()
    return model


@pytest.fixture(scope="module")
def deaf():
    """A pair whose teacher ignores the context, and a bank of its student's responses."""
    pair = assemble("deaf", make_model(1), deaf_teacher(), make_tokenizer())
    return pair, rollout(pair, make_prompts(24), max_new_tokens=8, seed=3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_teacher_that_ignores_the_context_gives_no_context_gain(deaf, optimizer):
    """Any permutation of its answers is the same teacher, so both steps are one and the same."""
    pair, bank = deaf
    result = probe(pair, bank, optimizer=optimizer, folds=2, placebos=0)
    gain, context = (result.tokens[name].abs() for name in ("gain", "context_gain"))
    assert gain.mean() > 1e-4
    assert context.max() < 1e-3 * gain.mean()
    assert result.tokens["own_context_gain"].abs().max() < 1e-3 * gain.mean()


def test_a_teacher_that_reads_the_context_gives_some():
    """The same probe of a pair whose teacher reads, so that the test above can fail."""
    pair = make_pair()
    bank = rollout(pair, make_prompts(24), max_new_tokens=8, seed=3)
    result = probe(pair, bank, folds=2, placebos=0)
    assert result.tokens["own_context_gain"].mean() > 0.1 * result.tokens["own_gain"].mean() > 0
