"""Responses of several turns: which tokens are the student's, and that nothing else is measured."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts.import_rollouts import freeze_rollouts, read_rollouts
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context, read_bank
from diagnostics.models.pair import assemble
from diagnostics.models.topk_teacher import read_lists
from diagnostics.pipeline.cli import main
from diagnostics.probing import scores
from diagnostics.probing.one_step import probe
from diagnostics.probing.step import StepBench
from diagnostics.report.tokenview import show
from tests.conftest import make_model, make_pair
from tests.contexts.factories import jsonl
from tests.models.test_token_bytes import byte_level
from tests.models.test_topk_teacher import listed, teacher_rows

FILES = Path(__file__).parents[1] / "files"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ASKED = [{"role": "user", "content": "What is 6 times 7?"}]
TURNS = [
    {"role": "assistant", "content": "The answer is open: ask."},
    {"role": "tool", "content": "42 is the answer"},
    {"role": "assistant", "content": "42, and the question is open."},
]


def chat_pair(template=MARKED):
    tokenizer = byte_level(300, special=("<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = template
    return assemble("chat", *(make_model(seed, vocabulary=300) for seed in (1, 2)), tokenizer)


def trl(tmp_path, completion=TURNS, prompt=ASKED, **more):
    return jsonl(tmp_path / "t.jsonl", {"prompt": prompt, "completion": completion, **more})


def by_the_library(pair, messages):
    """Ids and mask of a conversation as transformers tells them."""
    found = pair.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(found["assistant_masks"], dtype=bool)
    last = np.flatnonzero(mask)[-1] + 1
    return tuple(found["input_ids"][:last]), tuple(mask[:last].tolist())


def test_turns_are_those_that_the_templates_marks_tell(tmp_path):
    pair = chat_pair()
    bank, counts = freeze_rollouts(pair, trl(tmp_path))
    ids, mask = by_the_library(pair, ASKED + TURNS)
    one = bank[0]
    assert one.ids == ids and one.supervised == mask[len(one.prompt_ids) :]
    assert one.prompt.endswith("<|im_start|>assistant\n")
    written = pair.tokenizer.decode(one.sampled_ids)
    assert written == "".join(m["content"] + "<|im_end|>" for m in TURNS[::2])
    assert one.finished and one.response == "\n".join(turn["content"] for turn in TURNS[::2])
    assert (counts["turns"], counts["cut"], counts["turns_left_out"]) == (1, 0, 0)


def test_earlier_turns_of_the_question_are_no_positions(tmp_path):
    pair = chat_pair()
    asked = [*ASKED, {"role": "assistant", "content": "Six what?"}, *ASKED]
    one = freeze_rollouts(pair, trl(tmp_path, prompt=asked))[0][0]
    ids, mask = by_the_library(pair, asked + TURNS)
    assert one.ids == ids and one.supervised == mask[len(one.prompt_ids) :]
    assert "Six what?" in one.prompt


def test_what_a_tool_says_last_is_cut(tmp_path):
    bank, counts = freeze_rollouts(chat_pair(), trl(tmp_path, TURNS + TURNS[1:2]))
    whole, _ = freeze_rollouts(chat_pair(), trl(tmp_path))
    assert bank[0].response_ids == whole[0].response_ids and counts["cut"] == 1


def test_without_marks_the_first_turn_is_kept_and_that_is_said(tmp_path, caplog):
    bank, counts = freeze_rollouts(chat_pair(PLAIN), trl(tmp_path))
    assert bank[0].response == TURNS[0]["content"] and bank[0].supervised is None
    assert counts["turns_left_out"] == 1 and counts["turns"] == 0
    assert "1 contexts whose further messages were left out, since the chat template has no" in (
        caplog.text
    )


def test_asked_for_all_turns_a_template_without_marks_is_refused(tmp_path):
    path = trl(tmp_path)
    with pytest.raises(DiagnosticsError) as error:
        freeze_rollouts(chat_pair(PLAIN), path, turns="all")
    assert str(error.value) == (
        f"{path}, row 1 has replies in several messages, and the chat template has no"
        " {% generation %} marks, so which tokens are the student's cannot be told. Name a template"
        " with marks, give response_ids with a loss_mask, or take the first message alone with"
        " --turns first."
    )
    named = {"chat_template_kwargs": {"chat_template": MARKED}}
    marked = freeze_rollouts(chat_pair(PLAIN), trl(tmp_path, **named), turns="all")[0]
    assert marked[0].supervised is not None


@pytest.mark.parametrize(
    "prompt, reason",
    [
        ("What is 6?", "its prompt is text, which is not rendered again"),
        (
            [*ASKED, {"role": "assistant", "content": "The ", "prefix": True}],
            "its prompt ends with the beginning of the first of them",
        ),
    ],
)
def test_what_cannot_be_rendered_again_is_refused_or_cut(tmp_path, prompt, reason):
    path = trl(tmp_path, prompt=prompt)
    with pytest.raises(DiagnosticsError, match=reason):
        freeze_rollouts(chat_pair(), path, turns="all")
    assert freeze_rollouts(chat_pair(), path)[1]["turns_left_out"] == 1


def test_the_first_turn_alone_where_that_is_asked_for(tmp_path):
    bank, counts = freeze_rollouts(chat_pair(), trl(tmp_path), turns="first")
    assert bank[0].response == TURNS[0]["content"] and counts["turns_left_out"] == 0
    with pytest.raises(DiagnosticsError, match="turns is one of auto, first, all; got 'some'"):
        freeze_rollouts(chat_pair(), trl(tmp_path), turns="some")


# --- masks of a file


@pytest.mark.parametrize(
    "ids, mask, kept, own",
    [
        ((6, 7, 8, 9), (1, 0, 0, 1), (6, 7, 8, 9), (True, False, False, True)),
        ((6, 7, 8, 9), (1, 0, 1, 0), (6, 7, 8), (True, False, True)),
        ((6, 7, 1, 9), (1, 1, 0, 0), (6, 7), None),
        ((2, 2, 8, 9), (0, 0, 1, 1), (8, 9), None),
        ((6, 7, 8, 9), (0, 1, 1, 1), (6, 7, 8, 9), (False, True, True, True)),
        ((6, 1, 7, 8, 1, 2), (1, 1, 0, 1, 1, 0), (6, 1, 7, 8, 1), (True, True, False, True, True)),
    ],
)
def test_a_masked_response_ends_with_the_students_last_token(tmp_path, ids, mask, kept, own):
    row = {"prompt_ids": [0, 5], "response_ids": list(ids), "loss_mask": list(mask)}
    one = freeze_rollouts(make_pair(), jsonl(tmp_path / "m.jsonl", row))[0][0]
    assert (one.response_ids, one.supervised) == (kept, own)


def test_hidden_tokens_were_never_seen(tmp_path):
    row = {
        "prompt_ids": [0, 5],
        "response_ids": [6, 2, 2, 7, 8, 2],
        "attention_mask": [1, 0, 0, 1, 1, 0],
        "loss_mask": [1, 0, 0, 0, 1, 0],
    }
    one = freeze_rollouts(make_pair(), jsonl(tmp_path / "m.jsonl", row))[0][0]
    assert one.response_ids == (6, 7, 8) and one.supervised == (True, False, True)


def test_our_own_contexts_keep_their_masks(tmp_path):
    bank = Bank((MASKED[0],))
    path = tmp_path / "contexts.parquet"
    bank.to_frame().to_parquet(path)
    assert read_bank(path) == bank
    again = read_rollouts(make_pair(), path)[0]
    assert again.supervised == MASKED[0].supervised and again.ids == MASKED[0].ids


def test_a_debug_rollout_of_slime_keeps_its_later_turn():
    bank, counts = freeze_rollouts(make_pair(), FILES / "slime.jsonl")
    assert bank[1].response_ids == (7, 8, 20, 21, 9)
    assert bank[1].supervised == (True, True, False, False, True)
    assert counts["turns"] == 1 and bank.positions == 6


# --- what is measured

MASKED = Bank(
    tuple(
        Context(
            f"c{i}",
            f"p{i}",
            "?",
            (0, 5 + i),
            "",
            (7 + i, 8, 9 + i, 10, 11 + i),
            False,
            supervised=(True, False, False, True, True),
        )
        for i in range(6)
    )
)
WHOLE = Bank(
    tuple(
        Context(c.context_id, c.prompt_id, c.prompt, c.prompt_ids, "", c.response_ids, False)
        for c in MASKED
    )
)


def test_a_context_counts_its_own_tokens():
    one = MASKED[0]
    assert one.positions == (0, 3, 4) and one.sampled_ids == (7, 10, 11)
    assert MASKED.positions == 18 and WHOLE.positions == 30 and MASKED.masked and not WHOLE.masked
    with pytest.raises(DiagnosticsError, match="2 values in supervised and 3 response tokens"):
        Context("c", "p", "?", (0,), "", (1, 2, 3), False, supervised=(True, False))
    frame = MASKED.to_frame()
    frame["supervised"] = [[2, 1, 1, 1, 1]] * len(frame)
    with pytest.raises(DiagnosticsError, match="position or not: true or false; found '2'"):
        Bank.from_frame(frame)


def test_only_the_students_tokens_are_measured_and_all_are_read():
    """The rows are those of the whole responses at the student's tokens."""
    pair = make_pair()
    masked, whole = scores.score(pair, MASKED), scores.score(pair, WHOLE)
    rows = whole[whole["position"].isin(MASKED[0].positions)].reset_index(drop=True)
    assert masked["response_index"].tolist() == rows["position"].tolist()
    assert masked["position"].tolist() == [0, 1, 2] * 6
    assert set(masked["response_length"]) == {3}
    keys = ["position", "response_length", "response_index"]
    pd.testing.assert_frame_equal(
        masked.drop(columns=keys), rows.drop(columns=keys[:2]), check_exact=False, atol=1e-6
    )


def test_the_step_is_that_of_the_whole_responses_without_loss_on_the_others():
    pair = make_pair()
    benches = []
    for bank in (MASKED, WHOLE):
        table = scores.score(pair, bank)
        folds = (table["context_id"].str[1:].astype(int) % 2).to_numpy()
        benches.append(StepBench(pair, bank, table, folds))
    masked, whole = benches
    own = whole.tokens["position"].isin(MASKED[0].positions).to_numpy()
    for fold in (0, 1):
        weights = whole.loss_weights(fold) * own
        assert masked.loss_weights(fold).sum() == weights.sum() == 9
        (value, gradient), (other, expected) = (
            bench.gradient(w, loss="reverse_kl", beta=0.5)
            for bench, w in ((masked, masked.loss_weights(fold)), (whole, weights))
        )
        assert value == pytest.approx(other, rel=1e-6)
        for found, want in zip(gradient, expected, strict=True):
            np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_teachers_lists_stand_for_the_whole_response(tmp_path):
    """One list per response token; those of a tool's tokens are read and count for nothing."""
    pair = make_pair()
    teacher = listed(pair, MASKED, 8, tmp_path).teacher
    rows = teacher_rows(pair, MASKED, 8)
    for row in rows:
        row["top_ids"][1], row["top_logprobs"][1] = [3], [-0.1]  # a short list, of a tool's token
    path = jsonl(tmp_path / "short.jsonl", *rows)
    other = read_lists(path, vocabulary=64)
    assert teacher.depth(MASKED) == other.depth(MASKED) == 8
    assert other.depth(WHOLE) == 1
    tables = [
        scores.score(dataclasses.replace(pair, teacher=each), MASKED) for each in (teacher, other)
    ]
    pd.testing.assert_frame_equal(*tables)
    exact = scores.score(pair, MASKED)
    assert (tables[0]["forward_kl"] <= exact["forward_kl"] + 1e-6).all()


def test_a_probe_of_several_turns_and_its_token_view():
    pair = make_pair()
    result = probe(pair, MASKED, folds=2, step="1e-3", placebos=1, horizon=(), nulls=())
    assert len(result.tokens) == 18 and result.tokens["gain"].notna().all()
    view = show(MASKED, result.tokens, "c0")
    assert len(view.printed.tokens) == 3


def test_rollout_and_score_take_masked_rollouts(tmp_path):
    pair = make_pair()
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    rows = [
        {
            "prompt_ids": list(c.prompt_ids),
            "response_ids": list(c.response_ids),
            "loss_mask": list(map(int, c.supervised)),
        }
        for c in MASKED
    ]
    models = [f"--{name}={tmp_path / name}" for name in ("student", "teacher")]
    out = ["--output-dir", str(tmp_path / "run"), "--device", "cpu", "--quiet"]
    path = str(jsonl(tmp_path / "m.jsonl", *rows))
    assert main(["rollout", *models, "--rollouts", path, *out]) == 0
    assert main(["score", *models, *out]) == 0
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]
    assert facts["rollout"]["facts"]["rollouts"]["turns"] == 6
    assert facts["rollout"]["facts"]["positions"] == 18
    table = pd.read_parquet(tmp_path / "run" / "tokens.parquet")
    assert len(table) == 18 and table["response_index"].tolist() == [0, 3, 4] * 6
