"""The set-up that probe, intervention and attribution share, and the frozen bank below it."""

import dataclasses

import numpy as np
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import weights_sha256
from diagnostics.probing.attribution import AttributionConfig, attribute
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.intervention import InterventionConfig, intervene, interventions
from diagnostics.probing.one_step import probe
from diagnostics.probing.scores import ScoreConfig, score
from diagnostics.probing.step import ProbeConfig, prepare_step, split_prompts
from tests.conftest import make_pair, make_prompts

GRID = InterventionConfig(criteria=("entropy",), budgets=(0.5,), random_draws=1)


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


def test_all_three_take_the_same_step(setting):
    pair, bank, tokens = setting
    config = ProbeConfig(loss="jsd", beta=0.3, seed=4)
    step = prepare_step(pair, bank, tokens, config)
    probed = probe(pair, bank, config, tokens=tokens)
    grid = interventions(pair, bank, config, GRID, tokens=tokens)
    traced = attribute(pair, bank, config, AttributionConfig(sample=1), tokens=tokens, draws=10)
    for calibration in (probed.calibration, grid.calibration, traced.calibration):
        assert calibration.equals(step.calibration)
    assert probed.step.step_size == step.step_size == grid.effects[0].step_size
    for split in (probed.tokens.split, grid.split, traced.tokens.split):
        assert (np.asarray(split) == step.bench.split).all()
    np.testing.assert_array_equal(grid.cells[0].weights_N, step.weights_N)


def test_keywords_and_configuration_objects_are_one(setting):
    pair, bank, tokens = setting
    left = probe(pair, bank, tokens=tokens, optimizer="sgd", held_out=0.25)
    right = probe(pair, bank, ProbeConfig(optimizer="sgd", held_out=0.25), tokens=tokens)
    assert left.tokens.equals(right.tokens) and left.step == right.step
    assert score(pair, bank, k=8, sweep=[2]).equals(score(pair, bank, ScoreConfig(k=8, sweep=(2,))))
    cells = dataclasses.asdict(GRID)
    left = intervene(pair, bank, tokens=tokens, draws=20, **cells)
    assert left.equals(intervene(pair, bank, None, GRID, tokens=tokens, draws=20))


def test_a_tables_split_is_kept_where_asked(setting):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.25, seed=7)
    marked, config = tokens.assign(split=split), ProbeConfig(step=1e-4)
    assert (prepare_step(pair, bank, marked, config).bench.split == split).all()
    own = prepare_step(pair, bank, marked, config, keep_split=False).bench.split
    assert (own == split_prompts(tokens.prompt_id, held_out=0.5, seed=0)).all()


def test_preparing_moves_nothing(setting):
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    step = prepare_step(pair, bank, tokens, ProbeConfig())
    assert weights_sha256(pair.student.model) == before == step.bench.origin_sha256
    assert step.step_size == step.calibration.step_size[step.calibration.chosen].item() > 0


def test_parts_of_a_bank_have_batches_of_their_own(setting):
    pair, bank, tokens = setting
    step = split_prompts(tokens.prompt_id, held_out=0.5, seed=0) == "step"
    whole = FrozenBank(pair, bank, batch_tokens=60)
    parts = FrozenBank(pair, bank, batch_tokens=60, parts=[step, ~step])
    for part, mask in zip(parts.parts, (step, ~step), strict=True):
        rows = torch.cat([batch.rows_n for batch in part.batches])
        assert sorted(rows.tolist()) == np.flatnonzero(mask).tolist()
    for one, other, name in zip(
        whole.divergences(), parts.divergences(), ("forward_kl", "reverse_kl"), strict=True
    ):
        np.testing.assert_allclose(one, tokens[name], atol=1e-6)
        np.testing.assert_allclose(one, other, atol=1e-6)
    half = FrozenBank(pair, bank, parts=[step]).divergences()[0]
    assert (half[~step] == 0).all() and (half[step] > 0).all()


def test_a_halved_part_holds_the_same_states(setting):
    pair, bank, _ = setting
    (part,) = FrozenBank(pair, bank).parts
    before = {
        row: state
        for batch, states in part
        for row, state in zip(batch.rows_n.tolist(), states, strict=True)
    }
    count = len(part.batches)
    part.halve(MemoryError("full"))
    assert len(part.batches) == 2 * count
    for batch, states in part:
        for row, state in zip(batch.rows_n.tolist(), states, strict=True):
            assert torch.equal(before[row], state)


def test_a_pair_without_teacher_is_refused_before_any_work(setting):
    pair, bank, tokens = setting
    alone = dataclasses.replace(pair, teacher=None)
    with pytest.raises(DiagnosticsError, match=r"^This pair has only a student"):
        probe(alone, bank, tokens=tokens)
