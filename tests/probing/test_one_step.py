"""The steps against torch's own optimizer and a fresh score; their calibration and refusals."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.folds import NULLS, combine
from diagnostics.core.formulas import gains
from diagnostics.core.tables import write_parquet
from diagnostics.models.pair import assemble, weights_sha256
from diagnostics.probing import step as step_module
from diagnostics.probing import tensor_lists
from diagnostics.probing.directions import Direction
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.one_step import READ, probe, read_scores
from diagnostics.probing.scores import score
from diagnostics.probing.step import StepBench, calibrate, calibrate_together, loss_weights
from tests.conftest import make_bank, make_model, make_pair, make_prompts, make_tokenizer

BARE = {"nulls": (), "placebos": 0, "horizon": ()}
"""The steps alone, for tests that look at nothing else."""


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


def bench_of(setting, **options):
    pair, bank, tokens = setting
    return StepBench(pair, bank, tokens, assign_folds(tokens, 4, seed=0), **options)


def step_contexts(bank, result, fold):
    names = set(result.tokens.context_id[result.tokens.fold == fold])
    return [context for context in bank if context.context_id in names]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fold", [0, 2])
def test_the_step_is_torchs_own(setting, optimizer, fold):
    """Gradient by plain autograd, update by torch.optim, gains by a fresh score: all equal to the
    probe's.
    """
    pair, bank, tokens = setting
    size = 3e-4 if optimizer == "adamw" else 0.05
    result = probe(pair, bank, tokens=tokens, optimizer=optimizer, step=size, **BARE)
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    loss = mean_reverse_kl(twin, step_contexts(bank, result, fold))
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
    assert result.steps[fold].loss_before == pytest.approx(float(loss.detach()), rel=1e-5)
    assert result.steps[fold].gradient_norm == pytest.approx(float(norm), rel=1e-4)
    gain_N, reverse_N = (result.tokens[f"{name}_fold{fold}"] for name in ("gain", "reverse_gain"))
    np.testing.assert_allclose(gain_N, tokens.forward_kl - after.forward_kl, atol=2e-5)
    np.testing.assert_allclose(reverse_N, tokens.reverse_kl - after.reverse_kl, atol=2e-5)
    assert gain_N.abs().max() > 1e-2


def test_a_gain_is_the_mean_over_the_steps_on_other_folds(setting):
    pair, bank, tokens = setting
    table = probe(pair, bank, tokens=tokens, **BARE).tokens
    for row in table.itertuples():
        steps = [getattr(row, f"gain_fold{fold}") for fold in range(4)]
        own = steps.pop(row.fold)
        assert row.gain == pytest.approx(np.mean(steps)) and row.own_gain == own
        assert row.gain_sd == pytest.approx(np.std(steps, ddof=1))
    again = combine(table)
    assert all(table[name].equals(again[name]) for name in table)
    assert table.own_gain.mean() > table.gain.mean()  # a step helps most where it was taken


def test_all_folds_have_one_size_that_is_linear_for_them_together(setting):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, folds=3, **BARE)
    table = result.calibration
    assert (
        table.groupby("fold").step_size.agg(tuple) == tuple(table.step_size[: len(table) // 3])
    ).all()
    assert (table.groupby("fold").chosen.sum() == 1).all()
    assert table[table.chosen].step_size.nunique() == 1
    drops = table.groupby("step_size")[["predicted_drop", "realised_drop"]].sum()
    ratio = drops.realised_drop / drops.predicted_drop
    assert result.step.step_size == ratio[ratio >= 0.8].index.max()
    assert [step.fold for step in result.steps] == [0, 1, 2]
    assert sum(step.step_positions for step in result.steps) == len(tokens)
    assert all(
        step.step_positions + step.held_out_positions == len(tokens) for step in result.steps
    )


def test_the_student_ends_as_it_began(setting):
    pair, bank, tokens = setting
    before = weights_sha256(pair.student.model)
    result = probe(pair, bank, tokens=tokens)
    assert weights_sha256(pair.student.model) == before == result.step.weights_sha256
    assert all(p.grad is None for p in pair.student.model.parameters())


def test_a_failure_in_the_middle_restores_the_student(setting, monkeypatch):
    pair, _bank, _tokens = setting
    before = weights_sha256(pair.student.model)
    monkeypatch.setattr(
        StepBench,
        "rescore",
        lambda self, description: (_ for _ in ()).throw(MemoryError(description)),
    )
    bench = bench_of(setting)
    with (
        pytest.raises(MemoryError),
        bench.moved([torch.ones_like(p) for p in bench.parameters], 0.1),
    ):
        bench.rescore("after")
    assert weights_sha256(pair.student.model) == before


def test_unrestored_weights_are_noticed(setting):
    _pair, _bank, _tokens = setting
    bench = bench_of(setting)
    kept = bench.parameters[0].detach().clone()
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
    with torch.no_grad():
        bench.parameters[0].copy_(kept)
    assert bench.require_restored() is None


def test_no_step_no_gain(setting):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, step=0, nulls=NULLS, horizon=())
    made = [name for name in result.tokens if name not in tokens and "gain" in name]
    assert len(made) > 40 and "context_gain_token_type" in made
    for name in set(made) - {"relative_gain"}:
        assert (result.tokens[name] == 0).all(), name
    sizes = result.placebo.set_index("stratum").loc["all"]
    assert sizes.mean_abs_gain == 0 == sizes.step_mean_abs_gain and sizes.directions == 4


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "topk_reverse"])
def test_a_teacher_that_is_the_student_teaches_nothing(loss):
    pair = assemble("same", make_model(1), make_model(1), make_tokenizer())
    result = probe(pair, make_bank([5, 6, 7, 8]), loss=loss, horizon=(2,))
    for name in (
        "gain",
        "own_gain",
        "gain_permuted",
        "own_gain_permuted",
        "context_gain",
        "gain_h2",
    ):
        np.testing.assert_allclose(result.tokens[name].dropna(), 0, atol=1e-6)


def test_a_probe_of_the_columns_that_it_reads_is_that_of_the_whole_table(setting, tmp_path):
    pair, bank, tokens = setting
    read = read_scores(write_parquet(tmp_path / "scores.parquet", tokens))
    assert set(read) == set(tokens) & set(READ) and len(read.columns) < len(tokens.columns) / 3
    assert read.equals(tokens[list(read)]) and read.attrs == tokens.attrs
    options = {"nulls": NULLS, "placebos": 1, "horizon": (1,), "folds": 3}
    some, whole = (probe(pair, bank, tokens=given, **options) for given in (read, tokens))
    made = [name for name in whole.tokens if name not in tokens]
    assert [name for name in some.tokens if name not in read] == made and len(made) > 20
    assert some.tokens[made].equals(whole.tokens[made])
    for name in ("calibration", "placebo", "horizon"):
        assert getattr(some, name).equals(getattr(whole, name))


def test_same_seed_same_result(setting):
    pair, bank, tokens = setting
    first, second, other = (
        probe(pair, bank, tokens=tokens, seed=seed).tokens for seed in (0, 0, 1)
    )
    assert first.equals(second) and not (first.fold == other.fold).all()


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl", "jsd", "sampled", "topk_reverse"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_chosen_step_is_linear_enough_and_helps(setting, loss, optimizer):
    pair, bank, tokens = setting
    result = probe(pair, bank, tokens=tokens, loss=loss, optimizer=optimizer, **BARE)
    drops = result.calibration.groupby("step_size")[["predicted_drop", "realised_drop"]].sum()
    ratio = drops.realised_drop / drops.predicted_drop
    assert ratio[result.step.step_size] >= 0.8
    assert (ratio[ratio.index > result.step.step_size] < 0.8).all()
    assert sum(step.realised_drop for step in result.steps) > 0


def test_gradient_does_not_depend_on_batches(setting):
    tokens = setting[2]
    weights = bench_of(setting).loss_weights(0) + bench_of(setting).loss_weights(2)
    weights *= np.random.default_rng(0).random(len(tokens)).round(1)
    whole, parts = (
        bench_of(setting, batch_tokens=size).gradient(weights, loss="jsd", beta=0.3)
        for size in (10_000, 1)
    )
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    for a, b in zip(whole[1], parts[1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_contexts_without_weight_are_never_run(setting, monkeypatch):
    """A minibatch costs its own contexts, whatever batches they lie in."""
    pair, bank, tokens = setting
    bench, run = bench_of(setting), []
    wanted = [context.context_id for context in bank][::4]
    weights = tokens.context_id.isin(wanted).to_numpy().astype(float)
    assert len(set(bench.folds[weights > 0])) > 1
    real = type(pair.student).hidden
    monkeypatch.setattr(
        type(pair.student),
        "hidden",
        lambda self, ids, mask: (run.append(len(ids)), real(self, ids, mask))[1],
    )
    value, gradient = bench.gradient(weights, loss="reverse_kl", beta=0.5)
    assert sum(run) == len(wanted)
    contexts = [context for context in bank if context.context_id in wanted]
    twin = assemble("twin", make_model(1), pair.teacher.model, pair.tokenizer)
    loss = mean_reverse_kl(twin, contexts)
    loss.backward()
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, p in zip(gradient, twin.student.model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_the_order_of_the_batches_changes_no_bit(setting):
    """Several processes have the batches in shares, and add up what each has: mean loss and
    gradient are rounded once.
    """
    bench = bench_of(setting, batch_tokens=20)
    weights = sum(bench.loss_weights(fold) for fold in range(4))
    part = bench._part
    batches, teacher = part.batches, part.teacher
    assert len(batches) > 4
    values, gradients = [], []
    for order in itertools.islice(itertools.permutations(range(len(batches))), 0, None, 7):
        if len(values) == 12:
            break
        part.batches = [batches[i] for i in order]
        part.teacher = [teacher[i] for i in order]
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
            torch.randn(3, tensor_lists.PIECE // 2 + 5, generator=generator).T,
            torch.randn(7, generator=generator),
            torch.tensor(2.0),
        ]
        for _ in range(2)
    )
    flat = [
        np.concatenate([t.numpy().astype(np.float64).ravel() for t in tensors])
        for tensors in (left, right)
    ]
    assert tensor_lists.tensor_norm(left) == pytest.approx(
        np.sqrt(np.square(flat[0]).sum()), rel=1e-13
    )
    assert tensor_lists.inner_product(left, right) == pytest.approx(
        (flat[0] * flat[1]).sum(), rel=1e-11
    )


def test_the_placebo_moves_every_weight_as_far(setting):
    _pair, _bank, _tokens = setting
    bench = bench_of(setting)
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
    out = gains(before, after)
    np.testing.assert_allclose(out["gain"], [0.5, 4e-4, -0.1])
    np.testing.assert_allclose(out["relative_gain"], [0.5, np.nan, np.nan])
    np.testing.assert_allclose(out["relative_gain_released"], [0.5, 0.8, -1e11], rtol=1e-6)
    np.testing.assert_allclose(out["reverse_gain"], [1.0, 0.0, -0.5])


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


def test_folds_that_bend_at_unlike_sizes_get_the_size_of_their_sums():
    """1 - a + 0.1 a^2 and 1 - a + 1.9 a^2: together 2 - 2a + 2a^2, so the knee is at 0.2."""

    class Two(Parabola):
        def moved(self, update, size):
            self.bend = update
            return super().moved(update, size)

    bench = Two(None)
    folds = [Direction(bend, "reverse_kl", 1.0, 1.0, -1.0, 1.0) for bend in (0.1, 1.9)]
    table = calibrate_together(
        bench, [lambda d=d: d for d in folds], [np.ones(1), np.ones(1)], beta=0.5
    )
    chosen = table[table.chosen].set_index("fold")
    assert chosen.step_size[0] == chosen.step_size[1] == pytest.approx(0.2, rel=0.3)
    assert chosen.ratio[0] > 0.95 and chosen.ratio[1] < 0.8 < chosen.ratio.mean() < 0.87
    assert chosen.ratio[1] == pytest.approx(1 - 1.9 * chosen.step_size[1])


def test_calibration_warns_where_nothing_is_linear(caplog):
    table = calibrate(
        Parabola(1e9), Direction([], "reverse_kl", 1.0, 1.0, -1.0, 1.0), np.ones(1), beta=0.5
    )
    assert table.chosen.iloc[0] and "no step tried was linear" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss="hinge"), r"^Unknown loss 'hinge'\. Known are forward_kl, reverse_kl, jsd"),
        (dict(optimizer="adam7"), r"^Unknown optimizer 'adam7'\. Known are adamw, sgd\.$"),
        (dict(step="big"), r"^The step is 'auto' or a number of at least 0; got 'big'\.$"),
        (dict(step=-1.0), r"^The step is 'auto' or a number of at least 0; got -1\.0\.$"),
        (dict(folds=1), r"^folds is 1, and what is held out for a step are the other folds\."),
        (dict(folds=13), r"^12 prompts cannot fill 13 folds\."),
        (
            dict(held_out=0.5),
            r"^probe\(\) no longer takes 'held_out'\. .* use folds \(4 by default\) in its place",
        ),
        (dict(nulls=("locally",)), r"^Unknown null 'locally'\. Known are global, divergence"),
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
    assert dataclasses.asdict(result.step)["step_positions"] == (result.tokens.fold == 0).sum()
    assert "gain" in result._repr_html_() and tensor_lists.ADAM_EPS == 1e-8


def test_nothing_of_an_earlier_probe_stays_in_the_table(setting):
    pair, bank, tokens = setting
    first = probe(pair, bank, tokens=tokens, folds=6, nulls=("divergence",)).tokens
    again = probe(pair, bank, tokens=first.assign(split="step"), **BARE).tokens
    assert again.equals(probe(pair, bank, tokens=tokens, **BARE).tokens)


def test_two_folds_have_no_spread_and_no_token_baseline(setting):
    pair, bank, tokens = setting
    table = probe(pair, bank, tokens=tokens, folds=2, **BARE).tokens
    assert table.gain_sd.isna().all() and "token_identity_gain" not in table
    assert (table.gain == np.where(table.fold == 0, table.gain_fold1, table.gain_fold0)).all()


def test_a_gradient_in_few_passes_is_that_of_the_banks_batches(setting, monkeypatch):
    pair, bank, tokens = setting
    weights = np.zeros(len(tokens))
    weights[::5] = 1.0
    folds = np.zeros(len(tokens), dtype=int)
    bench, passes = StepBench(pair, bank, tokens, folds, batch_tokens=60), []
    real = StepBench.states
    monkeypatch.setattr(StepBench, "states", lambda *given: passes.append(1) or real(*given))
    bench._limit = 9999
    value, gradient = bench.gradient(weights, loss="reverse_kl", beta=0.5)
    many, passes[:] = len(passes), []
    joined = bench.gradient(weights, loss="reverse_kl", beta=0.5, few_passes=True)
    assert len(passes) == 1 < many and joined[0] == pytest.approx(value, rel=1e-6)
    for a, b in zip(joined[1], gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_few_passes_that_run_out_of_memory_become_more(setting, monkeypatch):
    _, _, tokens = setting
    weights = loss_weights(tokens, np.ones(len(tokens), dtype=bool))
    bench, real, sizes = bench_of(setting), StepBench.states, []
    reference = bench.gradient(weights, loss="reverse_kl", beta=0.5, few_passes=True)

    def crowded(self, batch):
        sizes.append(batch.tokens)
        if batch.tokens > 30:
            raise torch.OutOfMemoryError("injected")
        return real(self, batch)

    monkeypatch.setattr(StepBench, "states", crowded)
    found = bench.gradient(weights, loss="reverse_kl", beta=0.5, few_passes=True)
    assert found[0] == pytest.approx(reference[0], rel=1e-6) and max(sizes) > 30
    sizes.clear()
    bench.gradient(weights, loss="reverse_kl", beta=0.5, few_passes=True)
    assert max(sizes) <= 30  # the next step begins with passes that fit


@pytest.mark.parametrize(
    "late", [False, True], ids=["in the loss", "when the last layers have their gradient"]
)
def test_out_of_memory_in_the_gradient_starts_it_again(setting, monkeypatch, caplog, late):
    pair, _bank, tokens = setting
    weights = loss_weights(tokens, np.ones(len(tokens), dtype=bool))
    reference = bench_of(setting).gradient(weights, loss="reverse_kl", beta=0.5)
    bench, real = bench_of(setting), step_module.losses.chunked_loss
    rows = []

    def no_room(_):
        if rows[-1] > 12:
            raise torch.OutOfMemoryError("injected")

    def crowded(student_nH, *rest, **options):
        rows.append(len(student_nH))
        if not late:
            no_room(None)
        return real(student_nH, *rest, **options)

    monkeypatch.setattr(step_module.losses, "chunked_loss", crowded)
    first_layer = dict(pair.student.model.named_parameters())[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    hook = first_layer.register_hook(no_room) if late else None
    measured = [len(batch.rows_n) for batch in bench.frozen.whole.batches]
    value, gradient = bench.gradient(weights, loss="reverse_kl", beta=0.5)
    if hook:
        hook.remove()
    # what is measured before and after a step stays on the same batches
    assert measured == [len(batch.rows_n) for batch in bench.frozen.whole.batches]
    assert len(bench._part.batches) > len(bench.frozen.whole.batches)
    assert "halved" in caplog.text and value == pytest.approx(reference[0], rel=1e-6)
    for a, b in zip(gradient, reference[1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
