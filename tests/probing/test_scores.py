"""The token table against whole-model forwards, and the batches that it is measured in."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics.core import progress, types
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.progress import Shards
from diagnostics.core.schema import SCHEMA
from diagnostics.core.tables import write_parquet_parts
from diagnostics.core.types import Bank, Context
from diagnostics.measure.extras import COLUMNS
from diagnostics.models.pair import assemble
from diagnostics.probing import scores
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.probing.scores import batches, score
from tests.conftest import make_bank, make_model, make_tokenizer
from tests.counted_memory import counted_memory


def reference_logprobs(model, context):
    """ln p of each response token, one full forward a token, from the model's own logits in
    float64.
    """
    out = []
    for t, token in enumerate(context.response_ids):
        prefix = torch.tensor([context.prompt_ids + context.response_ids[:t]])
        with torch.no_grad():
            logits = model(input_ids=prefix).logits[0, -1].double()
        out.append(float(logits[token] - logits.logsumexp(0)))
    return out


def test_sampled_logprobs_equal_an_independent_rescore(pair, bank):
    tokens = score(pair, bank)
    for name, readout in (("student_logprob", pair.student), ("teacher_logprob", pair.teacher)):
        expected = np.concatenate([reference_logprobs(readout.model, context) for context in bank])
        np.testing.assert_allclose(tokens[name], expected, atol=1e-5)


def test_rows_are_the_banks_positions_in_order(pair, bank):
    tokens = score(pair, bank, k=8, sweep=(2,))
    assert list(zip(tokens.context_id, tokens.position, tokens.token_id)) == [
        (c.context_id, t, token) for c in bank for t, token in enumerate(c.response_ids)
    ]
    assert (
        tokens.response_length == tokens.groupby("context_id").position.transform("count")
    ).all()
    before = {
        name
        for name, entry in SCHEMA.items()
        if entry.stage == "before"
        and not entry.imported
        and not entry.on_request
        and "dropped" not in name
        and "tail" not in name
    } - {"token_identity_gain"}  # made from the gains of other folds
    before -= {name for names in COLUMNS.values() for name in names}  # measured where asked for
    assert before <= set(tokens.columns) and "compatibility_k2" in tokens
    assert not [name for name, entry in SCHEMA.items() if entry.on_request and name in tokens]


def test_what_is_measured_on_request_joins_the_rest(pair, bank, tmp_path):
    plain, more = (score(pair, bank, k=8, sweep=(2,), extra=names) for names in ((), ("ier",)))
    added = set(more) - set(plain)
    assert added == {
        "ier_signal",
        "ier_noise",
        "ier_signal_k2",
        "ier_noise_k2",
        "ier_full_signal",
        "ier_full_noise",
    }
    assert more[list(added)].notna().all(axis=None)
    pd.testing.assert_frame_equal(more[plain.columns], plain)
    with pytest.raises(DiagnosticsError, match=r"^Unknown extra measurement 'margin'\. Known are"):
        score(pair, bank, extra=("margin",))


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_padding_changes_nothing(pair, bank, batch_tokens):
    """Ragged lengths, alone or together; filler ids never reach a real position."""
    tokens, reference = (
        score(pair, bank, batch_tokens=batch_tokens),
        score(pair, bank, batch_tokens=1),
    )
    numeric = reference.select_dtypes("number").columns
    np.testing.assert_allclose(tokens[numeric], reference[numeric], atol=2e-5, rtol=1e-5)


def test_end_tokens_inside_a_batch_are_positions_like_others(pair):
    """pad == eos: lengths make the mask, so an end token in the middle or at the end is scored."""
    contexts = (
        Context("a", "a", "", (0, 5), "", (7, 1, 9, 1), True),
        Context("b", "b", "", (0, 6, 8, 9), "", (1,), True),
    )
    tokens = score(pair, Bank(contexts))
    expected = np.concatenate(
        [reference_logprobs(pair.student.model, context) for context in contexts]
    )
    np.testing.assert_allclose(tokens.student_logprob, expected, atol=1e-5)
    assert tokens.is_special.tolist() == [False, True, False, True, True]


def test_same_bank_same_table_bit_for_bit(pair, bank):
    pd.testing.assert_frame_equal(score(pair, bank), score(pair, bank), check_exact=True)


def test_a_teacher_that_is_the_student_disagrees_nowhere(bank):
    tokens = score(assemble("same", make_model(1), make_model(1), make_tokenizer()), bank)
    for name in (
        "forward_kl",
        "reverse_kl",
        "js",
        "hellinger",
        "advantage",
        "union_forward_kl",
        "union_log_ratio_variance",
    ):
        np.testing.assert_allclose(tokens[name], 0, atol=1e-6, err_msg=name)
    assert (
        (tokens.topk_overlap == 1).all()
        and tokens.top1_match.all()
        and (tokens.acceptance == 1).all()
    )


def test_padding_stays_small():
    bank = make_bank(np.random.default_rng(0).integers(5, 60, 200).tolist())
    todo = batches(bank, batch_tokens=512)
    padded = sum(batch.ids_BT.numel() for batch in todo)
    assert padded < 1.1 * sum(len(context.ids) for context in bank)
    assert max(batch.ids_BT.numel() for batch in todo) <= 512
    rows = torch.cat([batch.rows_n for batch in todo])
    assert sorted(rows.tolist()) == list(range(bank.positions))


def test_large_batches_have_little_padding_each(monkeypatch):
    """Some hundred contexts in one batch differ in length although they are sorted by it."""
    lengths = np.random.default_rng(1).integers(5, 400, 300).tolist()
    bank = make_bank(lengths)
    monkeypatch.setattr(scores, "BATCH_TOKENS", 512)
    todo = batches(bank, batch_tokens=100_000)
    assert len(todo) > 1 and max(batch.tokens for batch in todo) > 10_000
    for batch in todo:
        padding = 1 - float(batch.mask_BT.sum()) / batch.tokens
        assert padding <= scores.PADDING or batch.tokens <= 512
    rows = torch.cat([batch.rows_n for batch in todo])
    assert sorted(rows.tolist()) == list(range(bank.positions))


@pytest.mark.parametrize("kept", [None, 0.3])
@pytest.mark.parametrize("size", [40, 512, 8192])
def test_batches_are_those_of_a_loop_over_tokens(size, kept):
    draws = np.random.default_rng(2)
    bank = make_bank(draws.integers(0, 30, 60).tolist())
    keep = None if kept is None else draws.random(bank.positions) < kept
    starts = np.cumsum([0, *(len(context.response_ids) for context in bank)])
    chosen = [
        i
        for i in range(len(bank))
        if any(keep is None or keep[row] for row in range(starts[i], starts[i + 1]))
    ]
    groups = []
    for i in sorted(chosen, key=lambda i: (bank[i].longest, i)):
        if not groups or (len(groups[-1]) + 1) * bank[i].longest > size:
            groups.append([])
        groups[-1].append(i)
    found = batches(bank, batch_tokens=size, keep=keep)
    assert [[context.context_id for context in batch.contexts] for batch in found] == [
        [bank[i].context_id for i in group] for group in groups
    ]
    for batch, group in zip(found, groups, strict=True):
        expected = [
            (b, len(bank[i].prompt_ids) + t - 1, token, starts[i] + t)
            for b, i in enumerate(group)
            for t, token in enumerate(bank[i].response_ids)
            if keep is None or keep[starts[i] + t]
        ]
        assert expected == list(
            zip(*(x.tolist() for x in (*batch.at_n, batch.sampled_n, batch.rows_n)))
        )
        for b, i in enumerate(group):
            ids = list(bank[i].ids)
            assert batch.ids_BT[b].tolist() == ids + [0] * (batch.ids_BT.shape[1] - len(ids))
            assert batch.mask_BT[b].sum() == len(ids) and batch.mask_BT[b, : len(ids)].all()


def test_a_table_is_of_a_bank_only_in_order(pair, bank):
    tokens = score(pair, bank, sweep=())
    expected = [(context.context_id, token) for context in bank for token in context.response_ids]
    assert list(zip(tokens["context_id"], tokens["token_id"])) == expected
    assert scores.lists_positions(bank, tokens)
    other = tokens.assign(token_id=tokens["token_id"].where(tokens.index != 3, 63))
    name = tokens.assign(context_id=tokens["context_id"].where(tokens.index != 3, "x"))
    backwards = tokens.iloc[::-1]
    for wrong in (tokens[:-1], other, name, backwards, tokens[:0]):
        assert not scores.lists_positions(bank, wrong)


def test_a_gradient_is_sized_by_the_student_alone(pair, bank, monkeypatch):
    """The teacher gets none."""
    asked = []

    def choose(size, models, *, use):
        asked.append((size, [model is pair.student.model for model in models], use))
        return 8192

    monkeypatch.setattr(scores.batch_size, "choose", choose)
    assert FrozenBank(pair, bank).batch_tokens == 8192
    assert scores.chosen_batch_tokens(pair, None, use="gradient") == 8192
    assert asked == [(None, [True, False], "score"), (None, [True], "gradient")]


class OnCard:
    """Stands in for the copies of a card: the order in which they begin and are waited for."""

    def __init__(self, values):
        self.values = values
        log.append(f"copy {values['a'].item():.0f}")

    is_under_way = True

    def arrays(self):
        log.append(f"wait {self.values['a'].item():.0f}")
        return {name: each.numpy() for name, each in self.values.items()}


log = []


def test_a_copy_runs_while_the_next_batch_is_measured(monkeypatch):
    def measured():
        for number in range(3):
            log.append(f"measure {number}")
            yield number, {"a": torch.tensor([float(number)])}

    log.clear()
    monkeypatch.setattr(scores, "_Copy", OnCard)
    found = [(batch, values["a"].item()) for batch, values in scores.on_host(measured())]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert log == [
        *("measure 0", "copy 0", "measure 1", "copy 1", "wait 0"),
        *("measure 2", "copy 2", "wait 1", "wait 2"),
    ]


def test_on_the_cpu_a_batch_is_handed_out_at_once():
    came = []

    def measured():
        for number in range(2):
            came.append(number)
            yield number, {"a": torch.tensor([float(number)]), "b": torch.tensor([True])}

    for number, values in scores.on_host(measured()):
        assert came[-1] == number and values["a"].dtype == values["b"].dtype == np.float64
    assert list(scores.on_host(iter(()))) == []


def test_the_size_of_a_batch_is_8192_on_the_cpu(pair, bank, monkeypatch):
    """The table of a run without the setting is that of the number, in every bit."""
    asked, original = [], scores.plans
    monkeypatch.setattr(
        scores,
        "plans",
        lambda bank, **options: asked.append(options) or original(bank, **options),
    )
    pd.testing.assert_frame_equal(
        score(pair, bank), score(pair, bank, batch_tokens=8192), check_exact=True
    )
    assert [options["batch_tokens"] for options in asked] == [8192, 8192]


def test_only_kept_positions_are_projected(bank):
    keep = np.zeros(bank.positions, dtype=bool)
    keep[[0, 6, 7]] = True
    todo = batches(bank, keep=keep)
    assert sorted(torch.cat([batch.rows_n for batch in todo]).tolist()) == [0, 6, 7]
    assert sum(len(batch.ids_BT) for batch in todo) == 2


def test_dropped_mass_is_what_the_cut_removes(bank):
    pair = assemble(
        "cut", make_model(1, vocabulary=64), make_model(2, vocabulary=70), make_tokenizer()
    )
    tokens = score(pair, bank)
    context = bank[1]
    with torch.no_grad():
        logits = pair.teacher.model(input_ids=torch.tensor([context.ids])).logits[0].double()
    first = len(context.prompt_ids) - 1
    expected = logits[first : first + len(context.response_ids)].softmax(-1)[:, 64:].sum(-1)
    np.testing.assert_allclose(
        tokens.teacher_dropped_mass[tokens.context_id == "c1"], expected, atol=1e-6
    )
    assert "student_dropped_mass" not in tokens and expected.max() > 1e-3


def poisoned(model, token):
    """The model with NaN in the embedding of one id: every position of a context that holds it is
    NaN, since 0 * NaN is NaN in attention.
    """
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    return model


def test_few_nan_positions_are_excluded_and_counted(caplog):
    clean = tuple(
        Context(f"c{i}", f"p{i}", "", (0, 5), "", tuple(range(4, 44)), False) for i in range(8)
    )
    last = Context("c8", "p8", "", (0, 5), "", (5, 60, 6), False)
    pair = assemble("nan", poisoned(make_model(1), 60), make_model(2), make_tokenizer())
    tokens = score(pair, Bank((*clean, last)))
    assert np.flatnonzero(tokens.forward_kl.isna()).tolist() == [320, 321, 322]
    assert (
        "3 of 323 positions have NaN or infinite logits and are excluded (the first at position 0"
        " of context 'c8', the student's; of 3 looked at, 3 are the student's and 0 the teacher's"
        " alone)" in caplog.text
    )


def test_many_nan_positions_stop_the_run(bank):
    pair = assemble("nan", poisoned(make_model(1), 0), make_model(2), make_tokenizer())
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^38 of 38 positions have NaN or infinite logits \(the first at position 0 of context"
            r" 'c0', the student's; of 38 looked at, 38 are the student's and 0 the teacher's"
            r" alone\)\. Load the models"
        ),
    ):
        score(pair, bank)


@pytest.mark.parametrize(
    "context, message",
    [
        (Context("c", "p", "", (), "", (5,), False), r"^Context 'c' has no prompt tokens"),
        (
            Context("c", "p", "", (0,), "", (64,), False),
            r"^Context 'c' holds token id 64, and the shared vocabulary has 64\.",
        ),
        (
            Context("c", "p", "", (0,), "", (), False),
            r"^The bank has 1 contexts and no response tokens",
        ),
    ],
)
def test_banks_that_cannot_be_scored(pair, context, message):
    with pytest.raises(DiagnosticsError, match=message):
        score(pair, Bank((context,)))


def test_an_empty_response_beside_others_has_no_rows(pair):
    bank = Bank((*make_bank([3]).contexts, Context("e", "e", "", (0, 4), "", (), False)))
    assert score(pair, bank).context_id.unique().tolist() == ["c0"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_score_close_to_float32(bank, dtype):
    kind = getattr(torch, dtype)
    pair = assemble(dtype, make_model(1).to(kind), make_model(2).to(kind), make_tokenizer())
    reference = assemble("f32", make_model(1), make_model(2), make_tokenizer())
    tolerance = {"bfloat16": 0.2, "float16": 0.02, "float64": 1e-4}[
        dtype
    ]  # what the states lose; these logits are large
    np.testing.assert_allclose(
        score(pair, bank).forward_kl, score(reference, bank).forward_kl, atol=tolerance
    )


def test_rescore_equals_score_bit_for_bit(pair, bank):
    todo = batches(bank)
    forward, reverse = scores.rescore(
        pair, todo, scores.teacher_states(pair, todo), positions=bank.positions, description="x"
    )
    tokens = score(pair, bank)
    assert (forward == tokens.forward_kl).all() and (reverse == tokens.reverse_kl).all()


def crowded(pair, monkeypatch, limit):
    """The student runs out of memory over `limit` tokens."""
    real = pair.student.hidden

    def hidden(ids_BT, mask_BT):
        if ids_BT.numel() > limit:
            raise torch.OutOfMemoryError("injected")
        return real(ids_BT, mask_BT)

    monkeypatch.setattr(pair.student, "hidden", hidden)


def test_out_of_memory_halves_the_batch(pair, bank, monkeypatch, caplog):
    reference = score(pair, bank)
    crowded(pair, monkeypatch, 40)
    tokens = score(pair, bank)
    assert "tokens do not fit in memory at once: halved" in caplog.text
    np.testing.assert_allclose(tokens.forward_kl, reference.forward_kl, atol=1e-5)


def test_one_context_that_does_not_fit_names_the_remedy(pair, bank, monkeypatch):
    crowded(pair, monkeypatch, 3)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^One context of \d+ tokens does not fit in memory \(injected\)\. Use --teacher-dtype"
        ),
    ):
        score(pair, bank)


def test_models_that_take_turns_score_the_same(bank):
    pair, reference = (
        assemble("tiny", make_model(1), make_model(2, tie_word_embeddings=True), make_tokenizer())
        for _ in range(2)
    )
    pair.offload_teacher = True
    assert score(pair, bank).equals(score(reference, bank))


def test_likeliest_tokens_come_from_the_same_pass(pair, bank):
    tokens, tops = scores.score_with_tops(pair, bank)
    pd.testing.assert_frame_equal(tokens, score(pair, bank))
    context, at = bank[3], 4
    row = tops[(tops.context_id == context.context_id) & (tops.position == at)].iloc[0]
    ids = torch.tensor([context.ids[: len(context.prompt_ids) + at]])
    for role in ("student", "teacher"):
        shares = getattr(pair, role).model(ids).logits[0, -1].double().softmax(-1)
        expected = shares.topk(scores.TOPS)
        assert row[f"{role}_top_ids"].tolist() == expected.indices.tolist()
        assert row[f"{role}_top_p"].tolist() == pytest.approx(expected.values.tolist(), rel=1e-4)
        assert list(row[f"{role}_top"]) == [
            pair.tokenizer.decode([token]) for token in expected.indices.tolist()
        ]


def test_a_position_that_was_not_scored_has_no_likeliest_tokens():
    clean = tuple(
        Context(f"c{i}", f"p{i}", "", (0, 5), "", tuple(range(4, 44)), False) for i in range(8)
    )
    bank = Bank((*clean, Context("c8", "p8", "", (0, 5), "", (5, 60, 6), False)))
    _, tops = scores.score_with_tops(
        assemble("nan", poisoned(make_model(1), 60), make_model(2), make_tokenizer()), bank
    )
    for name in ("student_top", "student_top_p", "teacher_top", "teacher_top_p"):
        assert [len(cell) for cell in tops[name]] == [scores.TOPS] * 320 + [0] * 3


@pytest.fixture
def in_parts(monkeypatch):
    """Few positions and contexts in memory at a time, and every batch on disk at once."""
    monkeypatch.setattr(scores, "POSITIONS_TOGETHER", 16)
    monkeypatch.setattr(types, "CONTEXTS_TOGETHER", 4)
    monkeypatch.setattr(progress, "SHARD_SECONDS", 0.0)


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "on disk"])
def test_tables_in_parts_are_the_whole_ones_bit_for_bit(pair, in_parts, tmp_path, kept):
    judged = make_bank([5, 9, 1, 7, 30, 4, 3])
    judged = Bank((*judged.contexts[:5], replace(judged[5], correct=True), judged[6]))
    config = scores.ScoreConfig(batch_tokens=40)
    shards = Shards(tmp_path / "shards") if kept else None
    measured = scores.measure_bank(pair, judged, config, shards=shards, tops=3)
    tokens, tops = list(measured.tokens()), list(measured.tops())
    assert [len(part) for part in tokens] == [len(part) for part in tops] == [15, 7, 30, 7]
    for name, parts in (("tokens", tokens), ("tops", tops)):
        write_parquet_parts(tmp_path / f"{name}.parquet", parts, types=scores.TOP_TYPES)
    whole = score(pair, judged, config)
    assert pd.concat(tokens, ignore_index=True).equals(whole)
    assert pd.read_parquet(tmp_path / "tokens.parquet").equals(whole)
    assert {part.attrs["scored"]["batch_tokens"] for part in tokens} == {40}
    again = scores.measure_bank(pair, judged, config, shards=Shards(tmp_path / "shards"), tops=3)
    assert pd.concat(again.tokens(), ignore_index=True).equals(whole)


def test_a_bank_is_scored_in_memory_that_does_not_grow_with_what_is_measured(
    pair, in_parts, tmp_path, monkeypatch
):
    """Per position 200 bytes, of the contexts themselves; the two tables have over 1,000."""

    monkeypatch.setattr(scores, "POSITIONS_TOGETHER", 256)

    def peak(contexts):
        folder = tmp_path / str(contexts)
        types.write_bank(folder / "contexts.parquet", make_bank([50] * contexts))
        with counted_memory() as counted:
            bank = types.read_bank(folder / "contexts.parquet")
            measured = scores.measure_bank(
                pair,
                bank,
                scores.ScoreConfig(batch_tokens=1000),
                shards=Shards(folder / "shards"),
                tops=scores.TOPS,
            )
            write_parquet_parts(folder / "scores.parquet", measured.tokens())
            write_parquet_parts(folder / "tops.parquet", measured.tops(), types=scores.TOP_TYPES)
        return counted.bytes

    peak(20)  # what is made once
    small, large = peak(40), peak(120)
    whole = sum(
        pd.read_parquet(tmp_path / "120" / f"{name}.parquet").memory_usage(deep=True).sum()
        for name in ("scores", "tops")
    )
    assert (large - small) / (50 * 80) < 200 < 1000 < whole / (50 * 120)
