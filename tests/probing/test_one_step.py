import dataclasses
import itertools

import numpy as np
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.probing import one_step as probe_module
from diagnostics.probing.one_step import (
    Direction,
    StepBench,
    calibrate,
    gains,
    loss_weights,
    probe,
    split_prompts,
)
from diagnostics.probing.scores import score
from tests.conftest import make_bank, make_model, make_pair, make_prompts, make_tokenizer


@pytest.fixture(scope="module")
def setting():
    pair = make_pair()
    bank = rollout(pair, make_prompts(12), max_new_tokens=8)
    return pair, bank, score(pair, bank)


def mean_reverse_kl(pair, contexts):
    """Mean KL(p||q) over response positions, from whole logits in float64, with gradient."""
    total, count = 0.0, 0
    for context in contexts:
        ids = torch.tensor([context.ids])
        at = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        p = pair.student.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        with torch.no_grad():
            q = pair.teacher.model(input_ids=ids).logits[0, at].double().log_softmax(-1)
        total, count = total + (p.exp() * (p - q)).sum(), count + len(context.response_ids)
    return total / count


def step_contexts(bank, result):
    names = set(result.tokens.context_id[result.tokens.split == "step"])
    return [context for context in bank if context.context_id in names]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_step_is_torchs_own(setting, optimizer):
    """Gradient by plain autograd, update by torch.optim, gains by a fresh score: all equal to the
    probe's.
    """
    pair, bank, tokens = setting
    size = 3e-4 if optimizer == "adamw" else 0.05
    result = probe(pair, bank, tokens=tokens, optimizer=optimizer, step=size)
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    loss = mean_reverse_kl(twin, step_contexts(bank, result))
    loss.backward()
    parameters = list(twin.student.model.parameters())
    norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in parameters))
    kind = (
        torch.optim.AdamW(parameters, lr=size, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=size / float(norm))
    )
    kind.step()
    after = score(twin, bank)
    assert result.step.loss_before == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.step.gradient_norm == pytest.approx(float(norm), rel=1e-4)
    np.testing.assert_allclose(result.tokens.gain, tokens.forward_kl - after.forward_kl, atol=2e-5)
    np.testing.assert_allclose(
        result.tokens.reverse_gain, tokens.reverse_kl - after.reverse_kl, atol=2e-5
    )
    assert result.tokens.gain.abs().max() > 1e-2


def test_the_student_ends_as_it_began(setting):
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    result = probe(pair, bank, tokens=tokens)
    assert weights_sha256(pair.student.model) == before == result.step.weights_sha256
    assert all(p.grad is None for p in pair.student.model.parameters())


def test_a_failure_in_the_middle_restores_the_student(setting, monkeypatch):
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    monkeypatch.setattr(
        StepBench,
        "rescore",
        lambda self, description: (_ for _ in ()).throw(MemoryError(description)),
    )
    bench = StepBench(pair, bank, tokens, split_prompts(tokens.prompt_id, held_out=0.5, seed=0))
    with (
        pytest.raises(MemoryError),
        bench.moved([torch.ones_like(p) for p in bench.parameters], 0.1),
    ):
        bench.rescore("after")
    assert weights_sha256(pair.student.model) == before


def test_unrestored_weights_are_noticed(setting):
    pair, bank, tokens = setting
    bench = StepBench(pair, bank, tokens, split_prompts(tokens.prompt_id, held_out=0.5, seed=0))
    with torch.no_grad():
        bench.parameters[0][0, 0] += 1
    with pytest.raises(
        RuntimeError,
        match=(
            r"^1 of the student's \d+ weights are not as before the step, model.embed_tokens.weight"
            r" first"
        ),
    ):
        bench.require_restored()
    bench.restore()
    assert bench.require_restored() is None


def test_no_step_no_gain(setting):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, step=0)
    for name in (
        "gain",
        "reverse_gain",
        "placebo_gain",
        "placebo_reverse_gain",
        "relative_gain_released",
    ):
        assert (result.tokens[name] == 0).all(), name


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "topk_reverse"])
def test_a_teacher_that_is_the_student_teaches_nothing(loss):
    pair = assemble("same", make_model(1), make_model(1), make_tokenizer())
    result = probe(pair, make_bank([5, 6, 7, 8]), loss=loss)
    np.testing.assert_allclose(result.tokens.gain, 0, atol=1e-6)


def test_same_seed_same_result(setting):
    pair, bank, tokens = setting
    first, second, other = (
        probe(pair, bank, tokens=tokens, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert first.equals(second) and not (first.split == other.split).all()


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "sampled", "topk_reverse"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_chosen_step_is_linear_enough_and_helps(setting, loss, optimizer):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, loss=loss, optimizer=optimizer)
    chosen = result.calibration[result.calibration.chosen]
    assert len(chosen) == 1 and chosen.ratio.item() >= 0.8
    assert result.step.realised_drop > 0
    larger = result.calibration[result.calibration.step_size > chosen.step_size.item()]
    assert (larger.ratio < 0.8).all()


def test_gradient_does_not_depend_on_batches(setting):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    weights = loss_weights(tokens, split) * np.random.default_rng(0).random(len(tokens)).round(1)
    whole, parts = (
        StepBench(pair, bank, tokens, split, batch_tokens=size).gradient(
            weights, loss="jsd", beta=0.3
        )
        for size in (10_000, 1)
    )
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    for a, b in zip(whole[1], parts[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_order_of_the_batches_changes_no_bit(setting):
    """Several processes have the batches in shares, and add up what each has: mean loss and
    gradient are rounded once.
    """
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    weights, bench = (
        loss_weights(tokens, split),
        StepBench(pair, bank, tokens, split, batch_tokens=20),
    )
    batches, teacher = bench.step_batches, bench.step_teacher
    assert len(batches) >= 4
    values, gradients = [], []
    for order in list(itertools.permutations(range(len(batches))))[::7][:12]:
        bench.step_batches, bench.step_teacher = (
            [batches[i] for i in order],
            [teacher[i] for i in order],
        )
        value, gradient = bench.gradient(weights, loss="reverse_kl", beta=0.5)
        values.append(value), gradients.append(gradient)
    assert len(set(values)) == 1
    assert all(
        torch.equal(a, b) for other in gradients for a, b in zip(gradients[0], other, strict=True)
    )


def test_norms_and_products_are_float64_sums_over_pieces():
    generator = torch.Generator().manual_seed(0)
    left, right = (
        [
            torch.randn(3, probe_module.PIECE // 2 + 5, generator=generator).T,
            torch.randn(7, generator=generator),
            torch.tensor(2.0),
        ]
        for _ in range(2)
    )
    flat = [
        np.concatenate([t.numpy().astype(np.float64).ravel() for t in tensors])
        for tensors in (left, right)
    ]
    assert probe_module.tensor_norm(left) == pytest.approx(
        np.sqrt(np.square(flat[0]).sum()), rel=1e-13
    )
    assert probe_module._dot(left, right) == pytest.approx((flat[0] * flat[1]).sum(), rel=1e-11)


def test_the_placebo_moves_every_weight_as_far(setting):
    pair, bank, tokens = setting
    bench = StepBench(pair, bank, tokens, split_prompts(tokens.prompt_id, held_out=0.5, seed=0))
    update = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for i, p in enumerate(bench.parameters)
    ]
    with bench.moved(update, 0.01, placebo_seed=5):
        moved = [(p - o).detach() for p, o in zip(bench.parameters, bench.origin)]
    cosine = sum((m * u).sum() for m, u in zip(moved, update)) / (
        0.01 * sum((u * u).sum() for u in update)
    )
    for m, u in zip(moved, update):
        torch.testing.assert_close(m.abs(), 0.01 * u.abs(), atol=1e-6, rtol=1e-3)
    assert abs(float(cosine)) < 0.05


def test_relative_gain_has_a_floor():
    before = (np.array([1.0, 5e-4, 0.0]), np.array([2.0, 2.0, 2.0]))
    after = (np.array([0.5, 1e-4, 0.1]), np.array([1.0, 2.0, 2.5]))
    out = gains(before, after, before)
    np.testing.assert_allclose(out["gain"], [0.5, 4e-4, -0.1])
    np.testing.assert_allclose(out["relative_gain"], [0.5, np.nan, np.nan])
    np.testing.assert_allclose(out["relative_gain_released"], [0.5, 0.8, -1e11], rtol=1e-6)
    np.testing.assert_allclose(out["reverse_gain"], [1.0, 0.0, -0.5])
    np.testing.assert_array_equal(out["placebo_gain"], 0)


class Parabola:
    """A bench whose loss along the direction is 1 - a + bend*a^2, so the ratio at a is 1 -
    bend*a.
    """

    weight_norm = 2.0

    def __init__(self, bend):
        self.bend, self.at, self.trials = bend, 0.0, 0

    def moved(self, update, size):
        self.at, self.trials = size, self.trials + 1
        return __import__("contextlib").nullcontext()

    def mean_loss(self, weights, *, loss, beta):
        return 1.0 - self.at + self.bend * self.at**2


@pytest.mark.parametrize("bend", [0.1, 1.0, 5.0, 100.0])
def test_calibration_finds_the_knee_of_a_parabola(bend):
    bench = Parabola(bend)
    table = calibrate(bench, Direction([], "reverse_kl", 1.0, 1.0, -1.0, 1.0), np.ones(1), beta=0.5)
    chosen = table[table.chosen].iloc[0]
    assert 0.8 <= chosen.ratio <= 0.87 and chosen.step_size == pytest.approx(0.2 / bend, rel=0.3)
    assert bench.trials <= 4 and chosen.relative_norm == pytest.approx(chosen.step_size / 2)


def test_calibration_warns_where_nothing_is_linear(caplog):
    table = calibrate(
        Parabola(1e9), Direction([], "reverse_kl", 1.0, 1.0, -1.0, 1.0), np.ones(1), beta=0.5
    )
    assert table.chosen.iloc[0] and "no step tried was linear" in caplog.text


def test_prompts_are_never_split_across_the_halves(setting):
    ids = setting[2].prompt_id
    split = split_prompts(ids, held_out=0.25, seed=0)
    assert all(len(set(split[ids == prompt])) == 1 for prompt in ids.unique())
    assert len(ids[split == "held_out"].unique()) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss="hinge"), r"^Unknown loss 'hinge'\. Known are forward_kl, reverse_kl, jsd"),
        (dict(optimizer="adam7"), r"^Unknown optimizer 'adam7'\. Known are adamw, sgd\.$"),
        (dict(step="big"), r"^The step is 'auto' or a number of at least 0; got 'big'\.$"),
        (dict(step=-1.0), r"^The step is 'auto' or a number of at least 0; got -1\.0\.$"),
        (dict(held_out=1.0), r"^held_out=1\.0 leaves 0 step and 12 held-out prompts of 12\."),
    ],
)
def test_settings_that_cannot_be_used(setting, options, message):
    pair, bank, tokens = setting
    with pytest.raises(DiagnosticsError, match=message):
        probe(pair, bank, tokens=tokens, **options)


def test_a_table_of_another_bank_is_refused(setting):
    pair, bank, tokens = setting
    with pytest.raises(
        DiagnosticsError,
        match=r"does not list the bank's \d+ positions in order\. Score this bank again",
    ):
        probe(pair, bank, tokens=tokens.iloc[::-1])


def test_a_bf16_student_is_refused(bank):
    pair = assemble("low", make_model(1).bfloat16(), make_model(2), make_tokenizer())
    with pytest.raises(
        DiagnosticsError, match=r"^The student is in bfloat16, where a step this small vanishes"
    ):
        probe(pair, bank)


def test_predictors_are_untouched_by_the_step(setting):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens)
    assert result.tokens[list(tokens.columns)].equals(tokens)
    assert (
        dataclasses.asdict(result.step)["step_positions"] == (result.tokens.split == "step").sum()
    )
    assert "gain" in result._repr_html_() and probe_module.ADAM_EPS == 1e-8


@pytest.mark.parametrize(
    "late", [False, True], ids=["in the loss", "when the last layers have their gradient"]
)
def test_out_of_memory_in_the_gradient_starts_it_again(setting, monkeypatch, caplog, late):
    pair, bank, tokens = setting
    split = split_prompts(tokens.prompt_id, held_out=0.5, seed=0)
    weights = loss_weights(tokens, split)
    reference = StepBench(pair, bank, tokens, split).gradient(weights, loss="reverse_kl", beta=0.5)
    bench, real = StepBench(pair, bank, tokens, split), probe_module.losses.chunked_loss
    rows = []

    def no_room(_):
        if rows[-1] > 20:
            raise torch.OutOfMemoryError("injected")

    def crowded(student_nH, *rest, **options):
        rows.append(len(student_nH))
        if not late:
            no_room(None)
        return real(student_nH, *rest, **options)

    monkeypatch.setattr(probe_module.losses, "chunked_loss", crowded)
    first_layer = dict(pair.student.model.named_parameters())[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    hook = first_layer.register_hook(no_room) if late else None
    value, gradient = bench.gradient(weights, loss="reverse_kl", beta=0.5)
    if hook:
        hook.remove()
    assert "halved" in caplog.text and value == pytest.approx(reference[0], rel=1e-6)
    for a, b in zip(gradient, reference[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
