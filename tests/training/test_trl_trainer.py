import functools
import inspect
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import DistillationConfig, DistillationTrainer

from diagnostics import criteria
from diagnostics.contexts import generation, rollouts
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context
from diagnostics.measure import divergences, losses
from diagnostics.measure.extra_names import extras_of
from diagnostics.models.pair import assemble
from diagnostics.models.readout import Readout
from diagnostics.probing import scores
from diagnostics.training import step_metrics, trl_trainer
from diagnostics.training.trl_trainer import SelectedDistillationTrainer, Selection, check_contract
from tests.conftest import make_bank, make_model, make_pair, make_prompts, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


class Recording(SelectedDistillationTrainer):
    """Keeps every narrowed batch, its responses in the order in which they were generated."""

    def _narrow(self, batch, *measured):
        narrowed = super()._narrow(batch, *measured)
        kept = dict(narrowed)
        if "place" in batch:
            rows = batch["place"].argsort()
            kept = {
                name: value.detach()[rows] if value.ndim else value
                for name, value in narrowed.items()
            }
        self.narrowed = [*getattr(self, "narrowed", []), kept]
        return narrowed


def train(
    folder,
    pair,
    selection,
    *,
    steps=1,
    batch=4,
    accumulation=1,
    rate=1e-3,
    trainer=Recording,
    **options,
):
    prompts = make_prompts(steps * batch)
    made = trainer(
        pair,
        selection,
        args=DistillationConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=rate,
            max_completion_length=8,
            activation_checkpointing=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
            **{"bf16": False} | options,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [p.prompt for p in prompts], "row": list(range(len(prompts)))}
        ),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def logged(made, step=0):
    return [entry for entry in made.state.log_history if "loss" in entry][step]


def bank_of(batch):
    """A narrowed batch as frozen contexts."""
    contexts = []
    for i, mask in enumerate(batch["completion_mask"].bool()):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        contexts.append(
            Context(
                str(i),
                str(i),
                "",
                tuple(prompt),
                "",
                tuple(batch["completion_ids"][i][mask].tolist()),
                True,
            )
        )
    return Bank(tuple(contexts))


def on_positions(batch, name):
    return batch[name][batch["completion_mask"].bool()].numpy()


def plain_losses(pair, bank, **options):
    """Loss [N] at every position, one context at a time, from full float64 logits."""
    found = []
    for context in bank:
        ids = torch.tensor([context.ids])
        rows = slice(len(context.prompt_ids) - 1, len(context.ids) - 1)
        with torch.no_grad():
            student, teacher = (
                readout.model.double()(ids).logits[0, rows]
                for readout in (pair.student, pair.teacher)
            )
        found.append(
            losses.per_position(student, teacher, torch.tensor(context.response_ids), **options)
        )
        pair.student.model.float(), pair.teacher.model.float()
    return torch.cat(found).numpy()


@pytest.mark.parametrize(
    "criterion, budget",
    [
        ("teachability", 0.1),
        ("entropy", 0.3),
        ("incompatible", None),
        ("full", 0.05),
        ("acceptance", 0.2),
        ("ier", 0.3),
        ("bellman", 0.3),
        ("tails", 0.3),
        ("teachability_or_ier", 0.2),
    ],
)
def test_the_loss_is_the_mean_over_the_selected_positions(tmp_path, criterion, budget):
    made = train(tmp_path, make_pair(), Selection(criterion, budget))
    batch, pair = made.narrowed[0], make_pair()
    bank = bank_of(batch)
    extra = extras_of(criteria.find(criterion).needs)
    tokens = scores.score(pair, bank, k=16, sweep=(), extra=extra)
    expected = criteria.select(tokens, criterion, budget=budget)
    np.testing.assert_array_equal(on_positions(batch, "tool_mask") == 1, expected)
    assert batch["tool_mask"].sum() == batch["num_items_in_batch"] == expected.sum()
    reverse = plain_losses(pair, bank, loss="reverse_kl")
    assert logged(made)["loss"] == pytest.approx(reverse[expected].mean(), rel=1e-5)
    log = logged(made)
    assert (
        log["selected"] == expected.sum()
        and log["positions"] == bank.positions
        and log["selected_share"] == pytest.approx(expected.mean())
    )
    for name in ("forward_kl", "compatibility", "student_entropy"):
        assert log[f"{name}/all"] == pytest.approx(tokens[name].mean(), rel=1e-5)
        assert log[f"{name}/selected"] == pytest.approx(tokens[name][expected].mean(), rel=1e-5)
    assert log["q3/selected"] == pytest.approx((criteria.quadrants(tokens) == 3)[expected].mean())
    for name in step_metrics.SCORED:
        score = criteria.score_criterion(tokens, name)
        assert log[f"score_{name}/selected"] == pytest.approx(score[expected].mean(), rel=1e-5)
    if criterion != "tip":
        other = criteria.select(tokens, "tip", budget=budget or criteria.find(criterion).budget)
        assert log["jaccard/tip"] == pytest.approx(
            (other & expected).sum() / (other | expected).sum()
        )


@pytest.mark.parametrize(
    "loss, beta",
    [("forward_kl", 0.5), ("jsd", 0.3), ("jsd", 1.0), ("sampled", 0.5), ("topk_reverse", 0.5)],
)
def test_every_loss_is_ours(tmp_path, loss, beta):
    made = train(tmp_path, make_pair(), Selection("divergence", 0.3, loss=loss, beta=beta))
    batch, pair = made.narrowed[0], make_pair()
    values = plain_losses(pair, bank_of(batch), loss=loss, beta=beta, k=16)
    assert logged(made)["loss"] == pytest.approx(
        values[on_positions(batch, "tool_mask") == 1].mean(), rel=1e-4
    )
    assert logged(made)["grad_norm"] > 0


def test_a_soft_weight_weighs(tmp_path):
    made = train(tmp_path, make_pair(), Selection("acceptance"))
    batch, pair = made.narrowed[0], make_pair()
    bank = bank_of(batch)
    weights = scores.score(pair, bank, sweep=())["acceptance"].to_numpy()
    values = plain_losses(pair, bank, loss="reverse_kl")
    assert np.ptp(weights) > 0.1
    assert logged(made)["loss"] == pytest.approx((weights * values).sum() / weights.sum(), rel=1e-4)
    assert on_positions(batch, "loss_weights").mean() == pytest.approx(1)


def test_accumulation_changes_neither_masks_nor_weights(tmp_path):
    whole, parts = (
        train(
            tmp_path / str(n),
            make_pair(),
            Selection("teachability", 0.2),
            steps=2,
            batch=8,
            accumulation=n,
        )
        for n in (1, 4)
    )
    for one, other in zip(whole.narrowed, parts.narrowed):
        assert torch.equal(one["completion_ids"], other["completion_ids"]) and torch.equal(
            one["tool_mask"], other["tool_mask"]
        )
    for step in (0, 1):
        assert logged(whole, step)["loss"] == pytest.approx(logged(parts, step)["loss"], rel=1e-6)
    # A gradient of the size of its rounding has another AdamW step with every order of its sums.
    made, other, start = (
        torch.nn.utils.parameters_to_vector(model.parameters())
        for model in (whole.model, parts.model, make_pair().student.model)
    )
    assert (made - other).norm() <= 1e-4 * (made - start).norm()
    assert ((made - other).abs() > 2e-6).float().mean() <= 1e-3


def test_gradient_is_that_of_the_selected_mean(tmp_path):
    made = train(tmp_path, make_pair(), Selection("entropy", 0.25), max_grad_norm=0.0)
    batch, pair = made.narrowed[0], make_pair()
    for readout in (pair.student, pair.teacher):
        readout.model.double()
    total = 0.0
    for context, mask in zip(bank_of(batch), batch["tool_mask"]):
        ids, rows = (
            torch.tensor([context.ids]),
            slice(len(context.prompt_ids) - 1, len(context.ids) - 1),
        )
        ln_p, ln_q = (
            readout.model(ids).logits[0, rows].log_softmax(-1)
            for readout in (pair.student, pair.teacher)
        )
        total = (
            total
            + (
                (ln_p.exp() * (ln_p - ln_q.detach())).sum(-1) * mask[: len(context.response_ids)]
            ).sum()
        )
    (total / batch["tool_mask"].sum()).backward()
    norm = sum(p.grad.square().sum() for p in pair.student.model.parameters()).sqrt()
    assert logged(made)["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_responses_come_from_the_streams_of_their_rows(tmp_path):
    made = train(tmp_path, make_pair(), Selection("full", seed=5), steps=2, rate=0.0)
    pair, prompts = make_pair(), make_prompts(8)
    streams = [generation.random_stream(5, "train", row) for row in range(4, 8)]
    expected = generation.generate(
        pair.student.model,
        [pair.tokenizer(p.prompt)["input_ids"] for p in prompts[4:]],
        generation.StreamSampler(streams, 1.0, 1.0, 0, 64),
        end_ids=pair.end_ids,
        max_new_tokens=8,
    )
    assert [list(c.response_ids) for c in bank_of(made.narrowed[1])] == expected


def test_random_selection_is_seeded_by_step():
    tokens = scores.score(
        make_pair(), rollouts.rollout(make_pair(), make_prompts(6), max_new_tokens=8), sweep=()
    )
    first, again, later, other = (
        Selection("random", 0.2, seed=s).weights(tokens, step=n)
        for s, n in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert (first == again).all() and (first != later).any() and (first != other).any()
    assert first.sum() == later.sum() == criteria.budget_count(len(tokens), 0.2)


def test_a_minimum_of_each_response_is_kept_within_the_budget():
    tokens = scores.score(make_pair(), make_bank([9, 9, 9, 9]), k=16, sweep=())
    mask = Selection("divergence", 0.2, per_context_minimum=1).weights(tokens, step=0) > 0
    free = Selection("divergence", 0.2).weights(tokens, step=0) > 0
    best = tokens["forward_kl"].groupby(tokens["context_id"]).idxmax()
    assert mask.sum() == free.sum() == 8 and mask[best].all()
    every = tokens["context_id"].nunique()
    assert tokens["context_id"][mask].nunique() == every == 4
    other = Selection("entropy", 0.2, per_context_minimum=1).masks(tokens)["divergence"]
    assert (other == mask).all()
    with pytest.raises(DiagnosticsError, match=r"^per_context_minimum=1 needs 4 positions, more "):
        Selection("divergence", 0.05, per_context_minimum=1).weights(tokens, step=0)


def test_ties_and_scope_of_a_selection_are_those_of_select():
    """The table of a step is its batch."""
    tokens = scores.score(
        make_pair(), rollouts.rollout(make_pair(), make_prompts(6), max_new_tokens=8), sweep=()
    )
    tokens["student_entropy"] = np.minimum(tokens.student_entropy, tokens.student_entropy.median())
    masks = {}
    for ties in ("raw", "position", "random"):
        for scope in ("batch", "context"):
            chosen = Selection("tip", 0.3, seed=4, ties=ties, scope=scope)
            masks[ties, scope] = chosen.weights(tokens, step=2) > 0
            expected = criteria.select(
                tokens,
                "tip",
                budget=0.3,
                seed=[4, 2],
                ties=ties,
                scope="table" if scope == "batch" else "context",
            )
            assert (masks[ties, scope] == expected).all()
    assert masks["raw", "batch"].sum() == criteria.budget_count(len(tokens), 0.3)
    by_context = pd.Series(masks["raw", "context"]).groupby(tokens.context_id)
    assert (by_context.sum() == np.ceil(0.3 * by_context.size())).all()
    assert (masks["raw", "batch"] != masks["random", "batch"]).any()


def test_a_position_that_is_not_finite_carries_no_loss():
    tokens = scores.score(
        make_pair(), rollouts.rollout(make_pair(), make_prompts(3), max_new_tokens=8), sweep=()
    )
    tokens.loc[2, "forward_kl"] = np.nan
    weights = Selection("full").weights(tokens, step=0)
    assert weights[2] == 0 and weights.sum() == len(tokens) - 1
    tokens["forward_kl"] = np.nan
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^Criterion 'full' selects none of the {len(tokens)} positions of step 3\. Use a"
            r" larger batch or budget\.$"
        ),
    ):
        Selection("full").weights(tokens, step=3)


def test_a_larger_teacher_head_is_cut(tmp_path):
    pair = assemble(
        "tiny", make_model(1), make_model(2, hidden=48, vocabulary=72), make_tokenizer()
    )
    kept = pair.teacher.model.lm_head.weight[:64].clone()
    made = train(tmp_path, pair, Selection("divergence", 0.2))
    torch.testing.assert_close(made.teacher_model.lm_head.weight, kept, rtol=0, atol=0)
    assert logged(made)["reverse_kl/selected"] == pytest.approx(logged(made)["loss"], rel=1e-5)


def test_a_larger_student_head_is_refused(tmp_path):
    pair = assemble(
        "tiny", make_model(1, vocabulary=72), make_model(2, hidden=48), make_tokenizer()
    )
    message = (
        r"^The student's head has 72 ids and the teacher's 64; training compares whole"
        r" distributions\. "
        r"Cut the student's first: model\.resize_token_embeddings\(64\)\.$"
    )
    with pytest.raises(DiagnosticsError, match=message):
        train(tmp_path, pair, Selection("full"))


def test_another_loss_in_trl_is_noticed(tmp_path, monkeypatch):
    from trl.trainer import distillation_trainer

    original = distillation_trainer._chunked_divergence_loss
    monkeypatch.setattr(
        distillation_trainer,
        "_chunked_divergence_loss",
        lambda *a, **k: (2 * original(*a, **k)[0], *original(*a, **k)[1:]),
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^TRL .* computes a reverse_kl loss of .* on the positions of a batch, where it is .*"
            r" Install trl==1\.16\.0\.$"
        ),
    ):
        train(tmp_path, make_pair(), Selection("full"))


def test_the_installed_trl_keeps_the_contract():
    check_contract()
    source = inspect.getsource(DistillationTrainer._compute_loss)
    assert (
        'completion_mask * inputs["tool_mask"]' in source
        and "completion_mask * tool_mask"
        in inspect.getsource(DistillationTrainer._generate_and_score_completions)
    )
    assert 'inputs["num_items_in_batch"]' in inspect.getsource(DistillationTrainer.compute_loss)


def test_a_changed_trl_is_refused():
    class Renamed:
        """A release without the method that is overridden first."""

    class Reordered(DistillationTrainer):
        """A release that takes its arguments in another order."""

        def _compute_loss(self, inputs, unwrapped_student, num_items_in_batch):
            return None

    start = r"^TRL 9\.9 is not the release that training was written for: DistillationTrainer\."
    with pytest.raises(
        DiagnosticsError,
        match=start
        + r"_generate_and_score_completions is missing, and \(self, inputs, …\) is relied on\."
        r" Install trl==1\.16\.0\.$",
    ):
        check_contract(Renamed, "9.9")
    with pytest.raises(
        DiagnosticsError,
        match=start
        + r"_compute_loss takes \(self, inputs, unwrapped_student, num_items_in_batch\), and ",
    ):
        check_contract(Reordered, "9.9")


def test_a_batch_without_its_mask_is_refused(tmp_path, monkeypatch):
    original = DistillationTrainer._generate_and_score_completions

    def renamed(self, inputs):
        batch = original(self, inputs)
        batch["response_mask"] = batch.pop("completion_mask")
        return batch

    monkeypatch.setattr(DistillationTrainer, "_generate_and_score_completions", renamed)
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^TRL {trl_trainer.trl_version} is not the release .*: the batch lacks"
            r" completion_mask\. Install trl==1\.16\.0\.$"
        ),
    ):
        train(tmp_path, make_pair(), Selection("full"))


@pytest.mark.parametrize("head_apart", [False, True])
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
def test_a_head_sharded_by_fsdp_gives_the_same_gradient(head_apart, loss):
    """One process is enough: FSDP2 keeps DTensors all the same."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    def gradients(shard):
        pair = make_pair()
        student, ids = pair.student.model, torch.tensor([[0, 5, 6, 7, 8, 9]])
        for module in (
            [*student.model.layers, *([student.lm_head] if head_apart else []), student]
            if shard
            else []
        ):
            fully_shard(module)
        kinds = []

        def forward(*_, **__):
            kinds.append(hasattr(student.lm_head.weight, "full_tensor"))
            states, teacher = (
                student.base_model(input_ids=ids, use_cache=False).last_hidden_state[0],
                pair.teacher.hidden(ids, torch.ones_like(ids))[0],
            )
            return losses.chunked_loss(
                states,
                trl_trainer._gathered(pair.student).logits,
                teacher.detach(),
                trl_trainer._gathered(pair.teacher).logits,
                torch.tensor([5, 6, 7, 8, 9, 3]),
                loss=loss,
                weights_N=torch.ones(6),
                denominator=6.0,
            )

        student.forward = forward
        student().backward()
        assert kinds == [shard and head_apart]
        return {
            name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in student.named_parameters()
        }

    whole = gradients(False)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = gradients(True)
    finally:
        distributed.destroy_process_group()
    for name, gradient in whole.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=0, atol=1e-7)


def test_a_teacher_in_bfloat16_is_trained_on_and_the_guard_is_quiet(tmp_path):
    for seed, criterion in enumerate(("margin", "teachability", "random", "full")):
        pair = make_pair()
        pair.teacher = Readout(pair.teacher.model.bfloat16(), vocabulary=64)
        made = train(tmp_path / criterion, pair, Selection(criterion, 0.1, seed=seed))
        assert made._checked == (criterion == "full") and np.isfinite(logged(made)["loss"])


@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["reverse_kl", "sampled"])
def test_bf16_acts_on_scoring_and_on_the_loss(tmp_path, teacher, loss):
    pair = make_pair()
    pair.teacher = Readout(pair.teacher.model.to(teacher), vocabulary=64)
    made = train(tmp_path, pair, Selection("divergence", 0.3, loss=loss), accumulation=2, bf16=True)
    batch, before = made.narrowed[0], make_pair()
    assert batch["teacher_states"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        hidden = before.student.backbone(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state.bfloat16()
    states = hidden[:, :-1][:, -batch["completion_ids"].shape[1] :][batch["completion_mask"].bool()]
    expected = losses.per_position(
        states.float() @ before.student.head.weight.detach().bfloat16().float().T,
        batch["teacher_states"][batch["completion_mask"].bool()].float()
        @ before.teacher.head.weight.detach().bfloat16().float().T,
        batch["completion_ids"][batch["completion_mask"].bool()],
        loss=loss,
    )
    chosen = on_positions(batch, "tool_mask") == 1
    assert logged(made)["loss"] == pytest.approx(expected.numpy()[chosen].mean(), rel=2e-3)


def test_without_bf16_full_is_plain_trl_bit_for_bit(tmp_path):
    class Plain(DistillationTrainer):
        """TRL but for where its responses come from."""

        def _generate_and_score_completions(self, inputs):
            self._streams = [
                generation.random_stream(0, "train", example["row"]) for example in inputs
            ]
            batch = super()._generate_and_score_completions(inputs)
            torch.manual_seed(
                int(generation.random_stream(0, "step", self.state.global_step).integers(2**31))
            )
            return batch

        def _generate_single_turn(self, prompt_ids, *_, **__):
            chooser = generation.StreamSampler(self._streams, 1.0, 1.0, 0, 64)
            return generation.generate(
                self.model, prompt_ids, chooser, end_ids=self.eos_token_ids, max_new_tokens=8
            )

    for accumulation in (1, 2):
        pair, prompts = make_pair(), make_prompts(8)
        args = DistillationConfig(
            output_dir=str(tmp_path / "plain"),
            max_steps=2,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
            max_completion_length=8,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            shuffle_dataset=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            beta=1.0,
        )
        plain = Plain(
            model=pair.student.model,
            teacher_model=pair.teacher.model,
            processing_class=pair.tokenizer,
            args=args,
            train_dataset=Dataset.from_dict(
                {"prompt": [p.prompt for p in prompts], "row": list(range(8))}
            ),
        )
        plain.train()
        ours = train(
            tmp_path / "ours", make_pair(), Selection("full"), steps=2, accumulation=accumulation
        )
        assert [logged(ours, step)["loss"] for step in (0, 1)] == [
            logged(plain, step)["loss"] for step in (0, 1)
        ]
        for one, other in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_dropout_does_not_ring_the_guard(tmp_path):
    pair = make_pair()
    for layer in pair.student.model.model.layers:
        layer.mlp.down_proj = torch.nn.Sequential(layer.mlp.down_proj, torch.nn.Dropout(0.5))
    made = train(tmp_path, pair, Selection("full"), disable_dropout=False)
    assert made._checked and not made.shares_forward


def test_scoring_takes_as_many_responses_at_once_as_the_loss(tmp_path, monkeypatch):
    sizes = []
    original = SelectedDistillationTrainer._measured
    monkeypatch.setattr(
        SelectedDistillationTrainer,
        "_measured",
        lambda self, part: (sizes.append(len(part["completion_ids"])), original(self, part))[1],
    )
    train(tmp_path, make_pair(), Selection("teachability", 0.2), batch=8, accumulation=4)
    assert sizes == [2, 2, 2, 2]


def test_scoring_out_of_memory_is_halved(tmp_path, monkeypatch, caplog):
    original = SelectedDistillationTrainer._measured

    def full(self, part):
        if len(part["completion_ids"]) > limit:
            raise torch.OutOfMemoryError("injected")
        return original(self, part)

    limit, chosen = 8, Selection("teachability", 0.2)
    whole = train(tmp_path / "whole", make_pair(), chosen, batch=8, accumulation=2)
    monkeypatch.setattr(SelectedDistillationTrainer, "_measured", full)
    limit = 2
    halved = train(tmp_path / "halved", make_pair(), chosen, batch=8, accumulation=2)
    assert torch.equal(whole.narrowed[0]["tool_mask"], halved.narrowed[0]["tool_mask"])
    assert "4 responses do not fit in memory at once: scored in halves" in caplog.text
    limit = 0
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Scoring 1 responses at once does not fit in memory \(injected\)\. Raise"
            r" --accumulation, "
        ),
    ):
        train(tmp_path / "none", make_pair(), chosen, batch=8, accumulation=2)


class TwoPasses(Recording):
    """Measures in a pass of its own, as with several micro-batches."""

    shares_forward = property(lambda self: False, lambda self, value: None)


@pytest.mark.parametrize(
    "selection",
    [
        Selection("teachability", 0.2),
        Selection("random", 0.3, seed=3),
        Selection("full"),
        Selection("acceptance", loss="jsd", beta=0.3),
        Selection("tip", 0.3, loss="sampled", ties="random"),
    ],
    ids=lambda chosen: chosen.criterion,
)
def test_one_pass_trains_what_two_passes_train(tmp_path, selection):
    one = train(tmp_path / "one", make_pair(), selection, steps=2, batch=6)
    two = train(tmp_path / "two", make_pair(), selection, steps=2, batch=6, trainer=TwoPasses)
    assert one.shares_forward and not two.shares_forward
    for ours, theirs in zip(one.narrowed, two.narrowed):
        for name in ("completion_ids", "tool_mask", "loss_weights", "num_items_in_batch"):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=0)
    for step in (0, 1):
        ours, theirs = (dict(logged(made, step)) for made in (one, two))
        clock = {"step_time", "tokens_per_second", "epoch", "step", "train_runtime"}
        for name in ours.keys() - clock:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    for ours, theirs in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "accumulation, noise, student, teacher",
    [(1, False, 1, 1), (2, False, 4, 2), (1, True, 2, 1)],
)
def test_no_model_runs_more_often_than_it_must(
    tmp_path, monkeypatch, accumulation, noise, student, teacher
):
    """Once each, where the selection is within the loss's own pass; the student twice elsewhere."""
    pair, calls = make_pair(), []
    if noise:
        pair.student.model.model.layers[0].self_attn.attention_dropout = 0.1
    original = DistillationTrainer._get_last_hidden_state

    @functools.wraps(original)
    def counted(self, model, *arguments, **more):
        calls.append("student" if model is pair.student.model else "teacher")
        return original(self, model, *arguments, **more)

    monkeypatch.setattr(DistillationTrainer, "_get_last_hidden_state", counted)
    train(tmp_path, pair, Selection("teachability", 0.2), accumulation=accumulation)
    assert (calls.count("student"), calls.count("teacher")) == (student, teacher)


@pytest.mark.parametrize("criterion", ["full", "random"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_criterion_that_reads_nothing_is_measured_where_it_is_asked(
    tmp_path, monkeypatch, criterion, accumulation
):
    """The training is the same, the models run as often as in plain TRL, and the log has less."""
    options = {"steps": 3, "accumulation": accumulation}
    every, seldom = (Selection(criterion, 0.3, measure_every=each) for each in (1, 2))
    whole = train(tmp_path / "whole", make_pair(), every, **options)
    sizes = []
    original = divergences.measure_hidden
    monkeypatch.setattr(
        divergences, "measure_hidden", lambda *a, **k: (sizes.append(1), original(*a, **k))[1]
    )
    part = train(tmp_path / "part", make_pair(), seldom, **options)
    assert len(sizes) == 2 * accumulation  # steps 0 and 2
    for one, other in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for step in range(3):
        ours, theirs = logged(whole, step), logged(part, step)
        assert ours["loss"] == theirs["loss"] and ours["selected"] == theirs["selected"]
        assert ("forward_kl/all" in theirs) == ("overlap_ratio" in theirs) == (step != 1)


def test_a_criterion_that_reads_measurements_has_every_step_measured(tmp_path):
    """What only the log needs is left out between the steps that are due."""
    assert not Selection("random", measure_every=3).measures(1)
    assert Selection("random", measure_every=3).measures(3)
    assert Selection("teachability", measure_every=3).measures(1)
    chosen = Selection("teachability", 0.2, measure_every=2)
    first, second = (logged(train(tmp_path, make_pair(), chosen, steps=2), step) for step in (0, 1))
    assert "forward_kl/all" in first and "forward_kl/all" in second
    assert "overlap_ratio" in first and "overlap_ratio" not in second


def test_what_draws_noise_in_training_is_noticed():
    quiet, layer = SimpleNamespace(neftune_noise_alpha=None), torch.nn.Linear(2, 2)
    assert not trl_trainer._is_noisy(make_pair().student.model, quiet)
    assert not trl_trainer._is_noisy(torch.nn.Sequential(layer, torch.nn.Dropout(0.0)), quiet)
    assert trl_trainer._is_noisy(torch.nn.Sequential(layer, torch.nn.Dropout(0.1)), quiet)
    assert trl_trainer._is_noisy(layer, SimpleNamespace(neftune_noise_alpha=5.0))
    for name in ("attention_dropout", "layerdrop", "router_jitter_noise"):
        layer = torch.nn.Linear(2, 2)
        setattr(layer, name, 0.1)
        assert trl_trainer._is_noisy(layer, quiet), name


def test_a_measurement_is_without_the_noise_of_training(tmp_path):
    measured = []
    for alpha in (None, 50.0):
        made = train(
            tmp_path / str(alpha), make_pair(), Selection("entropy", 0.3), neftune_noise_alpha=alpha
        )
        measured.append(logged(made)["forward_kl/all"])
        assert made.shares_forward == (alpha is None)
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)


def test_a_model_that_cannot_be_taken_apart_is_refused(tmp_path):
    pair = make_pair()
    pair.teacher.apart = False
    message = (
        r"^The teacher \(LlamaForCausalLM\) cannot be taken apart into backbone and output head,"
        r" from which the loss is computed\. It can be scored and probed; "
    )
    with pytest.raises(DiagnosticsError, match=message):
        train(tmp_path, pair, Selection("full"))


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 5}])
def test_the_sampled_loss_needs_samples_from_p(tmp_path, options):
    (name,) = options
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^The loss `sampled` is an estimate over tokens drawn from p itself, and {name} draws"
            r" them from something else\. "
        ),
    ):
        train(tmp_path, make_pair(), Selection("full", loss="sampled"), **options)
    assert logged(train(tmp_path, make_pair(), Selection("full"), **options))["loss"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"no_repeat_ngram_size": 2}},
    ],
)
def test_what_our_own_sampling_does_not_know_is_refused(tmp_path, options):
    (name,) = options
    with pytest.raises(DiagnosticsError, match=rf"^{name} acts only where vLLM generates\. "):
        train(tmp_path, make_pair(), Selection("full"), **options)


def test_engines_without_whole_heads_are_refused():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^DeepSpeed ZeRO-3 shards the output heads .* Use ZeRO-2, or FSDP2"
            r" \(configs/fsdp2-8gpu\.yaml\)"
        ),
    ):
        trl_trainer._check_engine(zero3=True, fsdp=None)
    with pytest.raises(
        DiagnosticsError, match=r"^FSDP's first version shards .* Set fsdp_version: 2"
    ):
        trl_trainer._check_engine(zero3=False, fsdp=1)
    trl_trainer._check_engine(zero3=False, fsdp=2)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "tied, field, refused",
    [
        (False, {"modules_to_save": ["lm_head"]}, "output head"),
        (True, {"modules_to_save": ["embed_tokens"]}, "embedding, which is tied to the head"),
        (
            True,
            {"target_modules": ["embed_tokens", "q_proj"]},
            "embedding, which is tied to the head",
        ),
        (False, {"modules_to_save": ["embed_tokens"]}, None),
    ],
)
def test_an_adapter_on_the_head_is_refused(tmp_path, tied, field, refused):
    peft = pytest.importorskip("peft")
    student = make_model(1)
    if tied:
        student.config.tie_word_embeddings = True
        student.tie_weights()
    pair = assemble("tiny", student, make_model(2, hidden=48), make_tokenizer())
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | field
    )
    arguments = dict(
        args=DistillationConfig(
            output_dir=str(tmp_path),
            bf16=False,
            report_to="none",
            activation_checkpointing=False,
            max_steps=1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w1"], "row": [0]}),
        peft_config=config,
    )
    if refused is None:
        SelectedDistillationTrainer(pair, Selection("full"), **arguments)
        return
    with pytest.raises(
        DiagnosticsError,
        match=rf"^The adapter reaches the {refused} \(.*\), where training would not see it\. ",
    ):
        SelectedDistillationTrainer(pair, Selection("full"), **arguments)
