"""Pairs that differ in the names of special tokens: what is dropped, renormalized, left out and
said.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from diagnostics.contexts.import_rollouts import read_rollouts
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context
from diagnostics.models.pair import assemble, load_pair, stop_tokens
from diagnostics.models.special_tokens import (
    STOP_COLUMNS,
    count_dropped,
    differing_special_ids,
    gradable,
    stop_rows,
    turn_end,
)
from diagnostics.probing import scores
from diagnostics.probing.attribution import attribute
from diagnostics.probing.intervention import interventions
from diagnostics.probing.one_step import probe
from diagnostics.training.trl_trainer import _check_pair
from tests.conftest import WORDS, make_model, make_tokenizer
from tests.contexts.factories import jsonl
from tests.factories import message

ORDINARY = WORDS[:56]
DROPPED = (60, 61)
"""The ids at which the two tokenizers below have other special tokens."""


def with_specials(*names, plain=(), words=ORDINARY):
    """A tokenizer of 60 ordinary tokens and these added ones behind them, from id 60 on."""
    tokenizer = make_tokenizer(words)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    tokenizer.add_tokens(list(plain))
    return tokenizer


STUDENT = ("<|im_start|>", "<|im_end|>")
TEACHER = ("<|User|>", "<|Assistant|>")


def pair_of(dropped=DROPPED, *, seeds=(1, 2), vocabularies=(64, 70)):
    models = [
        make_model(seed, vocabulary=size) for seed, size in zip(seeds, vocabularies, strict=True)
    ]
    return assemble("tiny", *models, with_specials(*STUDENT), dropped=dropped)


def context(name, response, prompt=(0, 5, 6)):
    return Context(name, f"p-{name}", "w1 w2", tuple(prompt), "text", tuple(response), True)


BANK = Bank(
    (
        context("a", (7, 8, 61, 9, 10, 61)),
        context("b", (11, 12, 13)),
        context("c", (60, 14, 15, 1), prompt=(0, 60, 16)),
    )
)


def brute_force(pair, bank, dropped):
    """Both distributions from whole models in float64, renormalized without the dropped ids."""
    kept = [v for v in range(pair.vocabulary) if v not in dropped]
    rows = []
    for one in bank:
        sides = []
        for readout in (pair.student, pair.teacher):
            model = copy.deepcopy(readout.model).double()
            with torch.no_grad():
                logits = model(torch.tensor([list(one.ids)])).logits[0]
            sides.append(logits.softmax(-1))
        for t, token in enumerate(one.response_ids):
            if token in dropped:
                continue
            p, q = (side[len(one.prompt_ids) + t - 1].tolist() for side in sides)
            inside = [math.fsum(x[v] for v in kept) for x in (p, q)]
            p1, q1 = ([x[v] / s for v in kept] for x, s in zip((p, q), inside, strict=True))
            mine = kept.index(token)
            rows.append(
                {
                    "context_id": one.context_id,
                    "response_index": t,
                    "student_dropped_mass": 1 - inside[0],
                    "teacher_dropped_mass": 1 - inside[1],
                    "forward_kl": math.fsum(b * math.log(b / a) for a, b in zip(p1, q1)),
                    "reverse_kl": math.fsum(a * math.log(a / b) for a, b in zip(p1, q1)),
                    "student_entropy": -math.fsum(a * math.log(a) for a in p1),
                    "student_logprob": math.log(p1[mine]),
                    "teacher_logprob": math.log(q1[mine]),
                }
            )
    return rows


def test_what_differs_in_name_alone_is_listed():
    assert differing_special_ids(with_specials(*STUDENT), with_specials(*TEACHER)) == DROPPED
    assert differing_special_ids(with_specials(*STUDENT), with_specials(*STUDENT)) == ()
    same = with_specials(*STUDENT)
    assert differing_special_ids(same, same) == ()


def test_a_token_that_was_added_without_the_flag_counts_as_special():
    plain = with_specials("<|im_start|>", plain=("<think>",))
    assert differing_special_ids(plain, with_specials("<|im_start|>", "<|box|>")) == (61,)


def test_both_ids_of_a_name_that_has_two_are_dropped():
    swapped = with_specials("<|im_end|>", "<|im_start|>")
    assert differing_special_ids(with_specials(*STUDENT), swapped) == DROPPED
    # <think> is 60 for one side and 62 for the other, which has other tokens at 60 and 61
    found = differing_special_ids(with_specials("<think>"), with_specials("<a>", "<b>", "<think>"))
    assert found == (60, 62)


def test_ordinary_tokens_must_agree():
    other = with_specials(*TEACHER, words=[*ORDINARY[:-1], "other"])
    assert message(differing_special_ids, with_specials(*STUDENT), other) == (
        "The tokenizers differ in 2 tokens ('other' is None for the student and 59 for the teacher,"
        " 'w55' is 59 for the student and None for the teacher). On-policy scores need one"
        " token-to-id map; choose a teacher with the student's tokenizer."
    )


def test_an_id_that_is_ordinary_for_one_side_alone_is_refused():
    longer = make_tokenizer([*ORDINARY, "word"])  # 60 is a word there and <|im_start|> here
    with pytest.raises(DiagnosticsError, match=r"'<\|im_start\|>' is 60 for the student"):
        differing_special_ids(with_specials(*STUDENT), longer)


def test_measurements_are_those_of_the_renormalized_distributions(caplog):
    pair = pair_of()
    table = scores.score(pair, BANK, k=4, sweep=())
    expected = brute_force(pair, BANK, {*DROPPED, *range(64, 70)})
    assert len(table) == len(expected) == 10
    for row, want in zip(table.to_dict("records"), expected, strict=True):
        for name, value in want.items():
            assert row[name] == (
                pytest.approx(value, rel=1e-6, abs=2e-6) if name[-2:] != "id" else value
            )
    assert (table["student_dropped_mass"] > 1e-4).any()
    assert "3 of 13 sampled tokens are special tokens that the teacher knows by another" in (
        caplog.text
    )
    assert "the teacher reads 4 tokens of the contexts as other special tokens" in caplog.text


def test_position_and_length_are_those_of_the_positions_that_are_left():
    table = scores.score(pair_of(), BANK, k=4, sweep=())
    first = table[table["context_id"] == "a"]
    assert first["position"].tolist() == [0, 1, 2, 3]
    assert first["response_index"].tolist() == [0, 1, 3, 4]
    assert set(first["response_length"]) == {4}


def test_without_such_tokens_nothing_changes():
    plain, tolerant = pair_of(()), pair_of(())
    bank = Bank((context("b", (11, 12, 13)),))
    assert scores.score(plain, bank).equals(scores.score(tolerant, bank))
    same = pair_of((), vocabularies=(64, 64))
    found = scores.score(same, bank)
    assert not {"student_dropped_mass", "teacher_dropped_mass", "response_index"} & set(found)


def test_dropping_an_id_that_has_no_mass_changes_no_measurement():
    """An invariant: only what an id weighs is renormalized away."""
    pairs = []
    for dropped in ((), (60,)):
        models = [make_model(seed) for seed in (1, 2)]
        for model in models:
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
            model.lm_head.bias.data[60] = -1e4
        pairs.append(assemble("tiny", *models, with_specials(*STUDENT), dropped=dropped))
    bank = Bank((context("b", (11, 12, 13)),))
    tables = [scores.score(pair, bank, k=4, sweep=()) for pair in pairs]
    for name in ("forward_kl", "reverse_kl", "js", "student_logprob", "compatibility"):
        np.testing.assert_allclose(tables[0][name], tables[1][name], atol=1e-6)


def test_a_probe_leaves_such_positions_out_and_restores_the_student():
    pair = pair_of(vocabularies=(64, 64))
    bank = Bank(
        tuple(
            context(f"c{i}", (5 + i, 61, 6 + i, 7 + i, 60)) for i in range(6)
        )  # two of five tokens are dropped ids
    )
    result = probe(pair, bank, folds=2, step="1e-3", placebos=1, horizon=(), nulls=())
    assert len(result.tokens) == 18
    assert result.tokens["gain"].notna().all() and (result.tokens["gain"].abs() > 0).all()
    assert set(result.tokens["token_id"]).isdisjoint(DROPPED)
    assert sum(step.step_positions for step in result.steps) == 18


def test_interventions_attribution_and_new_text_leave_them_out_too():
    pair = pair_of(vocabularies=(64, 64))
    bank = Bank(tuple(context(f"c{i}", (5 + i, 61, 6 + i, 7 + i, 60)) for i in range(6)))
    found = probe(pair, bank, folds=2, step="1e-3", placebos=0, horizon=(1,), nulls=())
    assert found.tokens["gain_h1"].notna().any()
    cells = interventions(
        pair,
        bank,
        tokens=found.tokens,
        criteria=("entropy",),
        budgets=(0.5,),
        horizon=(1,),
        folds=2,
        step="1e-3",
    )
    assert cells.by_prompt()["positions"].sum() > 0
    masked = gradable(bank, DROPPED)
    same = probe(pair, masked, folds=2, step="1e-3", placebos=0, horizon=(), nulls=())
    np.testing.assert_allclose(same.tokens["gain"], found.tokens["gain"], atol=1e-9)
    table = attribute(pair, bank, tokens=found.tokens, folds=2, step="1e-3", sample=4).tokens
    assert len(table) == 18 and table["first_order_gain"].notna().all()


def test_gradients_flow_through_the_excluded_logits():
    readout = pair_of().student
    hidden = torch.randn(3, 32, requires_grad=True)
    logits = readout.logits(hidden)
    logits.log_softmax(-1)[:, 7].sum().backward()
    assert torch.isneginf(logits[:, list(DROPPED)]).all()
    assert hidden.grad.isfinite().all() and (hidden.grad != 0).any()


def test_training_such_a_pair_is_refused_and_says_why():
    assert message(_check_pair, pair_of()) == (
        "The student's tokenizer names 2 special tokens otherwise than the other model's (id 60 is"
        " the first), and the loss of training has them in both distributions. Such a pair can be"
        " scored and probed; give both models one tokenizer for training."
    )


def test_a_pair_comes_from_folders_and_says_what_differs(tmp_path, caplog):
    for name, seed, names in (("student", 1, STUDENT), ("teacher", 2, TEACHER)):
        make_model(seed).save_pretrained(tmp_path / name)
        with_specials(*names).save_pretrained(tmp_path / name)
    pair = load_pair(
        student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), device="cpu"
    )
    assert pair.dropped == DROPPED == pair.teacher.excluded
    assert pair.facts["special_tokens"] == [
        {"id": 60, "student": "<|im_start|>", "teacher": "<|User|>"},
        {"id": 61, "student": "<|im_end|>", "teacher": "<|Assistant|>"},
    ]
    assert (
        "the tokenizers differ in 2 special tokens alone (student and teacher at 60: '<|im_start|>'"
        " and '<|User|>', 61: '<|im_end|>' and '<|Assistant|>')" in caplog.text
    )
    table = stop_tokens(pair)
    assert tuple(table) == STOP_COLUMNS
    assert table["token_id"].tolist() == [1] and table["note"].tolist() == [""]


def test_the_teacher_reads_prompts_of_its_own_in_its_own_tokens(tmp_path):
    frame = "{{% for m in messages %}}{} {{{{ m.content }}}} {{% endfor %}}"
    for name, seed, names in (("student", 1, STUDENT), ("teacher", 2, TEACHER)):
        make_model(seed).save_pretrained(tmp_path / name)
        tokenizer = with_specials(*names)
        tokenizer.chat_template = frame.format(names[0])
        tokenizer.save_pretrained(tmp_path / name)
    pair = load_pair(
        student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), device="cpu"
    )
    asked = [{"role": "user", "content": "w1 w2"}]
    row = {"prompt": asked, "teacher_prompt": asked}
    sampled = rollout(pair, [row], max_new_tokens=3)
    frozen = read_rollouts(pair, jsonl(tmp_path / "r.jsonl", row | {"response": [ANSWER]}))
    for bank in (sampled, frozen):
        one = bank[0]
        assert one.prompt.startswith("<|im_start|> w1") and one.prompt_ids == (60, 5, 6)
        assert one.teacher_prompt.startswith("<|User|> w1")
        assert one.teacher_prompt_ids == (60, 5, 6)
    assert frozen[0].response_ids == (7,)
    assert count_dropped(frozen, pair.dropped)["read_otherwise"] == 0


ANSWER = {"role": "assistant", "content": "w3"}


def test_counts_are_worked_by_hand():
    assert count_dropped(BANK, DROPPED) == {"positions": 3, "responses": 2, "read_otherwise": 4}
    own = Bank((dataclasses.replace(BANK[2], teacher_prompt="x", teacher_prompt_ids=(0, 3)),))
    assert count_dropped(own, DROPPED)["read_otherwise"] == 1
    assert gradable(BANK, ()) is BANK
    assert gradable(BANK, DROPPED)[1] is BANK[1]
    assert gradable(gradable(BANK, DROPPED), DROPPED) == gradable(BANK, DROPPED)


def test_stop_tokens_of_both_models_and_what_a_mismatch_touches():
    student, teacher = with_specials(*STUDENT), with_specials(*TEACHER)
    rows = stop_rows(student, teacher, ends=((1, 61), (1, 5)), turn_end=61, dropped=DROPPED)
    by_id = {row["token_id"]: row for row in rows}
    assert list(by_id) == [1, 5, 61] and by_id[1]["note"] == ""
    assert by_id[1]["ends_student"] and by_id[1]["ends_teacher"]
    assert (by_id[5]["ends_student"], by_id[5]["ends_teacher"]) == (False, True)
    assert by_id[5]["note"].startswith("the teacher stops here and the student does not")
    assert by_id[61]["ends_turn"] and by_id[61]["dropped"]
    assert by_id[61]["student_token"] == "<|im_end|>"
    assert by_id[61]["teacher_token"] == "<|Assistant|>"
    assert by_id[61]["note"].startswith("another token for the teacher")


@pytest.mark.parametrize(
    ("ends", "turn", "note"),
    [
        (((60,), ()), None, "the student stops here and the teacher does not"),
        (((), (60,)), None, "the teacher stops here and the student does not"),
        (((), ()), 60, "the template ends a turn here and no response ends"),
        (((60,), (60,)), 60, ""),
    ],
)
def test_each_mismatch_has_its_own_note(ends, turn, note):
    tokenizer = with_specials(*STUDENT)
    row = stop_rows(tokenizer, tokenizer, ends=ends, turn_end=turn)[-1]
    assert (
        row["token_id"] == 60 and row["note"].startswith(note) and bool(row["note"]) == bool(note)
    )


def test_the_end_of_a_turn_is_what_the_template_writes():
    tokenizer = with_specials(*STUDENT)
    assert turn_end(tokenizer) is None
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|> {% endfor %}"
    )
    assert turn_end(tokenizer) == 61
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} w1 {% endfor %}"
    assert turn_end(tokenizer) is None
