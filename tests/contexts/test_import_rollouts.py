"""Imported rollouts: every format's rows become the contexts that the student would have left."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from diagnostics import read_rollouts
from diagnostics.contexts.import_counts import COUNTED
from diagnostics.contexts.import_rollouts import freeze_rollouts
from diagnostics.contexts.prompts import load_prompts
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, Context, read_bank
from diagnostics.pipeline.cli import main
from tests.conftest import make_pair, make_prompts, make_tokenizer
from tests.contexts.factories import TEMPLATE, jsonl

FILES = Path(__file__).parents[1] / "files"


def shown(bank):
    return [(c.context_id, c.prompt_id, c.prompt_ids, c.response_ids, c.finished) for c in bank]


def zero_but(**counts):
    return dict.fromkeys(COUNTED, 0) | {"not_needed": 0} | counts


# --- the example files, one for each format
# ---------------------------------------------------------------


def test_the_released_context_bank(pair):
    bank, counts = freeze_rollouts(pair, FILES / "released.jsonl")
    assert shown(bank) == [
        ("sample-0", "group-0", (0, 5, 6), (7, 8, 1), True),
        ("sample-1", "group-0", (0, 5, 6), (9, 9, 9, 9), False),
        ("sample-2", "group-1", (0, 10), (11,), False),
    ]
    assert bank[1].prompt == "<bos> w1 w2" and bank[1].response == "w5 w5 w5 w5"
    assert counts == zero_but(format="released", rows=3, contexts=3, positions=8)


@pytest.mark.parametrize("name", ["slime.jsonl", "slime.pt"])
def test_debug_rollouts_of_slime(pair, name, caplog):
    """Of the second sample the last three tokens came from a tool or after it: of the first turn
    alone its context ends before them.
    """
    bank, counts = freeze_rollouts(pair, FILES / name, turns="first")
    assert shown(bank) == [
        ("group-3-0", "group-3", (0, 5, 6), (7, 8, 1), True),
        ("group-3-1", "group-3", (0, 5, 6), (7, 8), False),
    ]
    assert [context.correct for context in bank] == [True, False]
    said = {"right": 1, "wrong": 1, "stated_by": "reward"}
    assert counts == zero_but(
        format="slime", rows=2, contexts=2, positions=5, cut=1, logprobs=1
    ) | {"correct": said}
    assert caplog.messages == [
        f"{FILES / name}: 1 contexts cut at the first token that the student did not write"
    ]


def test_rollout_dumps_of_verl(pair):
    bank, counts = freeze_rollouts(pair, FILES / "verl.jsonl")
    assert [(c.prompt_ids, c.response_ids) for c in bank] == [
        ((0, 5, 6), (7, 8)),
        ((0, 5, 6), (9,)),
        ((0, 11), (12, 12, 12)),
    ]
    assert bank[0].prompt_id == bank[1].prompt_id != bank[2].prompt_id and [
        c.context_id[-2:] for c in bank
    ] == ["-0", "-1", "-0"]
    assert [context.correct for context in bank] == [True, False, False]
    said = {"right": 1, "wrong": 2, "stated_by": "score"}
    assert counts == zero_but(
        format="verl", rows=3, contexts=3, positions=6, from_text=3, joined=3
    ) | {"correct": said}


def test_completions_of_trl(pair):
    bank, counts = freeze_rollouts(pair, FILES / "trl.parquet")
    assert [(c.prompt_ids, c.response_ids) for c in bank] == [
        ((0, 5, 6), (7, 8)),
        ((0, 11), (12, 12, 12)),
    ]
    assert counts == zero_but(format="trl", rows=2, contexts=2, positions=5, from_text=2, joined=2)


def test_plain_rows_of_text_and_ids(pair):
    bank, counts = freeze_rollouts(pair, FILES / "plain.jsonl")
    assert [(c.prompt_ids, c.response_ids) for c in bank] == [
        ((0, 5, 6), (7, 8)),
        ((0, 5, 6), (9,)),
        ((0, 5, 6), (7, 8, 1)),
        ((0, 11), (9,)),
    ]
    assert [(c.prompt_id, c.context_id) for c in bank][2:] == [
        ("by-ids", "by-ids-0"),
        ("12", "mixed"),
    ]
    assert counts == zero_but(
        format="plain", rows=4, contexts=4, positions=7, from_text=2, joined=2
    )


# --- round trips: a bank of this project, written as each framework would, comes back
# ----------------------


def as_released(bank, path):
    rows = [
        {
            "sample_index": i,
            "group_index": int(c.prompt_id[1:]),
            "tokens": list(c.ids),
            "prompt_len": len(c.prompt_ids),
            "resp_len": len(c.response_ids),
            "total_len": len(c.ids),
            "truncated": not c.finished,
        }
        for i, c in enumerate(bank)
    ]
    pd.DataFrame(rows).to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def as_slime(bank, path):
    import torch

    rows = [
        {
            "index": i,
            "group_index": int(c.prompt_id[1:]),
            "tokens": list(c.ids),
            "response_length": len(c.response_ids),
            "prompt": c.prompt,
            "response": c.response,
            "loss_mask": [1] * len(c.response_ids),
            "status": "completed" if c.finished else "truncated",
        }
        for i, c in enumerate(bank)
    ]
    torch.save({"rollout_id": 4, "samples": rows}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def text_rows(bank, pair):
    """Prompts and responses as text; the response keeps the space that separates words."""
    return [(c.prompt, " " + pair.tokenizer.decode(c.response_ids)) for c in bank]


def as_verl(bank, path, pair):
    return jsonl(
        path,
        *(
            {"input": prompt, "output": response, "score": 0.0, "step": 1}
            for prompt, response in text_rows(bank, pair)
        ),
    )


def as_trl(bank, path, pair):
    pd.DataFrame(text_rows(bank, pair), columns=["prompt", "completion"]).to_parquet(
        path.with_suffix(".parquet")
    )
    return path.with_suffix(".parquet")


def as_plain(bank, path, pair):
    return jsonl(
        path,
        *({"prompt": prompt, "response": response} for prompt, response in text_rows(bank, pair)),
    )


def as_csv(bank, path, pair):
    pd.DataFrame(text_rows(bank, pair), columns=["prompt", "response"]).to_csv(
        path.with_suffix(".csv"), index=False
    )
    return path.with_suffix(".csv")


def as_ids(bank, path, pair):
    return jsonl(
        path, *({"prompt_ids": c.prompt_ids, "response_ids": c.response_ids} for c in bank)
    )


@pytest.fixture(scope="module")
def sampled(pair):
    return rollout(pair, make_prompts(8), max_new_tokens=12, samples_per_prompt=2)


@pytest.mark.parametrize("write", [as_released, as_slime])
def test_ids_make_the_round_trip(pair, sampled, tmp_path, write):
    found = read_rollouts(pair, write(sampled, tmp_path / "r.x"))
    assert [(c.ids, c.response_ids, c.finished) for c in found] == [
        (c.ids, c.response_ids, c.finished) for c in sampled
    ]
    assert [c.prompt_id for c in found] == [f"group-{c.prompt_id[1:]}" for c in sampled]


@pytest.mark.parametrize("write", [as_verl, as_trl, as_plain, as_csv, as_ids])
def test_text_makes_the_round_trip(pair, sampled, tmp_path, write):
    found, counts = freeze_rollouts(pair, write(sampled, tmp_path / "r.jsonl", pair))
    assert [(c.prompt_ids, c.response_ids, c.finished) for c in found] == [
        (c.prompt_ids, c.response_ids, c.finished) for c in sampled
    ]
    assert counts["retokenised"] == counts["other_text"] == counts["joined"] == 0 and counts[
        "from_text"
    ] == (0 if write is as_ids else 16)
    groups = pd.Series([c.prompt_id for c in found])
    assert (
        groups.nunique() == 8
        and (groups.iloc[::2].to_numpy() == groups.iloc[1::2].to_numpy()).all()
    )


def test_our_own_contexts_make_the_round_trip(pair, sampled, tmp_path):
    sampled.to_frame().to_parquet(tmp_path / "contexts.parquet", index=False)
    assert read_rollouts(pair, tmp_path / "contexts.parquet") == sampled


# --- what goes wrong in silence elsewhere
# --------------------------------------------------------------------


@pytest.fixture
def merging():
    """A pair whose tokenizer writes ab as one token: its ids and its text need not agree."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {
        token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *"abcdefghij:", "ab", "ba"])
    }
    core = Tokenizer(models.BPE(words, [("a", "b"), ("b", "a")]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    return dataclasses.replace(make_pair(), tokenizer=tokenizer)


def test_retokenisation_drift_is_counted(merging, tmp_path, caplog):
    """a b as two tokens reads as one: the student never saw the position after ab."""
    a, b, ab, c = (merging.tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "ab", "c"))
    file = jsonl(
        tmp_path / "r.jsonl",
        {"prompt_ids": [c], "response_ids": [a, b]},
        {"prompt_ids": [c], "response_ids": [ab]},
        {"prompt_ids": [c, a, b], "response_ids": [c]},
    )
    bank, counts = freeze_rollouts(merging, file)
    assert (
        [x.response_ids for x in bank] == [(a, b), (ab,), (c,)]
        and counts["retokenised"] == 2
        and counts["other_text"] == 0
    )
    assert caplog.messages == [
        f"{file}: 2 contexts whose ids decode to a text that encodes to other ids (re-tokenization"
        " drift)"
    ]


def test_a_token_across_the_border_is_counted(merging, tmp_path):
    """Prompt ca and response b would be c ab together; the response stays the response."""
    bank, counts = freeze_rollouts(
        merging,
        jsonl(
            tmp_path / "r.jsonl",
            {"prompt": "ca", "response": "b"},
            {"prompt": "cc", "response": "ba"},
        ),
    )
    tokens = merging.tokenizer.convert_ids_to_tokens
    assert [(tokens(x.prompt_ids), tokens(x.response_ids)) for x in bank] == [
        (["c", "a"], ["b"]),
        (["c", "c"], ["ba"]),
    ]
    assert counts["joined"] == 1 and counts["retokenised"] == 1


def test_text_that_the_ids_do_not_spell(merging, pair, tmp_path):
    c, d = (merging.tokenizer.convert_tokens_to_ids(t) for t in "cd")
    rows = [{"prompt_ids": [c], "response_ids": [d], "response": text} for text in ("d", "d", "e")]
    assert freeze_rollouts(merging, jsonl(tmp_path / "a.jsonl", *rows))[1]["other_text"] == 1
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"b\.jsonl: 2 of 3 responses decode to another text than the file's, so another"
            r" tokenizer wrote their ids\. Use the model"
        ),
    ):
        freeze_rollouts(merging, jsonl(tmp_path / "b.jsonl", *rows[1:], rows[2]))
    lossy = freeze_rollouts(
        pair, jsonl(tmp_path / "c.jsonl", {"prompt": "w1", "response": " w2 nowhere"})
    )
    assert lossy[0][0].response_ids == (6, 3) and lossy[1]["other_text"] == 1


@pytest.fixture
def chatty():
    """A pair whose chat template writes special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<go>"]})
    tokenizer.chat_template = "{% for m in messages %}<user> {{ m.content }} {% endfor %}<go>"
    from diagnostics.models.pair import assemble
    from tests.conftest import make_model

    return assemble("chat", make_model(1, vocabulary=66), make_model(2, vocabulary=66), tokenizer)


def test_lost_special_tokens_are_seen_and_put_back(chatty, tmp_path, caplog):
    file = jsonl(
        tmp_path / "verl.jsonl",
        {"input": "w1 w2", "output": " w3"},
        {"input": "w7", "output": " w8"},
    )
    bank, counts = freeze_rollouts(chatty, file)
    assert (
        bank[0].prompt_ids == (0, 5, 6)
        and counts["without_special"] == 2
        and counts["restored"] == 0
    )
    assert (
        "2 contexts whose prompt has no special token although the chat template writes some"
        in caplog.text
    )
    prompts = load_prompts(
        jsonl(tmp_path / "p.jsonl", {"prompt": "w1 w2"}, {"prompt": "w9"}),
        tokenizer=chatty.tokenizer,
    )
    bank, counts = freeze_rollouts(chatty, file, prompts=prompts)
    assert (
        bank[0].prompt_ids == (64, 5, 6, 65)
        and bank[0].prompt == "<user> w1 w2 <go>"
        and bank[0].prompt_id == prompts[0].prompt_id
    )
    assert (
        counts["restored"] == 1 and counts["without_special"] == 1 and bank[1].prompt_ids == (0, 11)
    )


def test_plain_text_takes_the_template_unless_it_has_it(chatty, tmp_path):
    file = jsonl(
        tmp_path / "r.jsonl",
        {"prompt": "w1", "response": " w2"},
        {"prompt": "<user> w1 <go>", "response": " w2"},
        {"messages": [{"role": "user", "content": "w1"}], "response": " w2"},
    )
    bank, counts = freeze_rollouts(chatty, file)
    assert (
        {c.prompt_ids for c in bank} == {(64, 5, 65)}
        and counts["repeated"] == 2
        and counts["without_special"] == 0
    )
    assert freeze_rollouts(chatty, file, chat=False)[0][0].prompt_ids == (0, 5)


def test_a_teachers_prompt_comes_along(pair, chatty, tmp_path):
    bank = read_rollouts(
        pair,
        jsonl(
            tmp_path / "r.jsonl",
            {"prompt": "w1", "response": " w2", "teacher_prompt": "w9 w1"},
            {"prompt": "w1", "response": " w3"},
        ),
    )
    assert [c.teacher_prompt_ids for c in bank] == [(0, 13, 5), None] and [
        c.teacher_prompt for c in bank
    ] == ["w9 w1", None]
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet")
    assert read_rollouts(pair, tmp_path / "contexts.parquet") == bank
    prompts = load_prompts(
        jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "hint": "w9"}), tokenizer=chatty.tokenizer
    )
    found = read_rollouts(
        chatty, jsonl(tmp_path / "v.jsonl", {"input": "w1", "output": " w2"}), prompts=prompts
    )
    assert found[0].prompt_ids == (64, 5, 65) and found[0].teacher_prompt_ids == (64, 13, 5, 65)


def test_messages_of_trl(pair, tmp_path):
    pair = dataclasses.replace(pair, tokenizer=make_tokenizer())
    pair.tokenizer.chat_template = TEMPLATE.replace("]", "] ").replace("[go]", " [go]")
    talk = {
        "prompt": [{"role": "user", "content": "w1"}],
        "completion": [{"role": "assistant", "content": " w2"}],
    }
    bank, _ = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", talk))
    assert bank[0].prompt == "[user] w1 [go] " and bank[0].response_ids == (6,)


def test_empty_long_and_repeated_contexts_are_counted(pair, tmp_path, caplog):
    ids = {"prompt_ids": [0, 5]}
    file = jsonl(
        tmp_path / "r.jsonl",
        ids | {"response_ids": []},
        ids | {"response_ids": [6]},
        ids | {"response_ids": [6]},
        ids | {"response_ids": [6] * 300},
        ids | {"response_ids": [7]},
    )
    bank, counts = freeze_rollouts(pair, file, contexts=2)
    assert [c.response_ids for c in bank] == [(6,), (6,)] and pair.window == 256
    assert counts == zero_but(
        format="plain",
        rows=5,
        contexts=2,
        positions=2,
        empty=1,
        over_long=1,
        repeated=1,
        not_needed=1,
    )
    assert [message.split(": ", 1)[1] for message in caplog.messages] == [
        "1 contexts without response tokens, left out",
        "1 contexts longer than the models' window, left out",
        "1 contexts with the same tokens as an earlier one",
    ]
    with pytest.raises(
        DiagnosticsError, match=r"r\.jsonl holds 3 usable contexts of 5, and 4 are asked for"
    ):
        freeze_rollouts(pair, file, contexts=4)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "w1"},
            (
                r"holds no rollouts: it has prompt, and needed are contexts: context_id,"
                r" prompt_ids, response_ids, finished; slime: .*; plain: prompt, response\. Rename"
            ),
        ),
        ({"prompt": "w1", "response": 5}, r"row 1: response should be text; found '5'"),
        (
            {"prompt": 5, "response": "w1"},
            r"row 1: a prompt is text or a list of \{role, content\} messages; found '5'",
        ),
        ({"prompt": None, "response": "w1"}, r"row 1 lacks a prompt\. Fix or remove that row\."),
        ({"prompt": "w1", "response": None}, r"row 1 lacks a response\."),
        (
            {"prompt": "w1", "response_ids": [1.5]},
            r"row 1: response_ids should be a list of token ids; found '\[1\.5\]'",
        ),
        (
            {"prompt": "w1", "response_ids": "[1, -2]"},
            r"row 1: response_ids should be a list of token ids",
        ),
        (
            {"prompt": "w1", "response_ids": [64]},
            (
                r"row 1 holds token id 64, and the shared vocabulary has 64\. Another tokenizer"
                r" wrote it"
            ),
        ),
        (
            {"tokens": [1, 2], "response_length": 2},
            r"row 1: 2 tokens with a response of 2 do not fit together",
        ),
        (
            {"tokens": [1, 2, 3], "response_length": 2, "loss_mask": [1]},
            r"row 1: 3 tokens with a response of 2 and a loss mask of 1 do not fit together",
        ),
        ({"tokens": None, "response_length": 2}, r"row 1 lacks tokens"),
        (
            {"tokens": [1, 2, 3], "prompt_len": 2, "resp_len": 2},
            r"row 1: 3 tokens cannot be a prompt of 2 and a response of 2 \(total_len None\)",
        ),
        (
            {"tokens": [1, 2, 3], "prompt_len": 2, "resp_len": 1, "total_len": 4},
            r"row 1: 3 tokens cannot be a prompt of 2 and a response of 1 \(total_len 4\)",
        ),
        (
            {"tokens": [1, 2], "resp_len": "many"},
            r"row 1: resp_len should be a whole number; found 'many'",
        ),
    ],
)
def test_rows_that_cannot_be_used(pair, tmp_path, row, message):
    with pytest.raises(DiagnosticsError, match=message):
        freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", row))


def test_files_that_cannot_be_used(pair, tmp_path):
    import torch

    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(
        DiagnosticsError,
        match=r"list\.pt holds no list of samples, so it is no debug rollout of slime",
    ):
        freeze_rollouts(pair, tmp_path / "list.pt")
    torch.save(
        {"samples": [{"tokens": torch.tensor([1, 2]), "response_length": 1}]},
        tmp_path / "tensor.pt",
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"row 1: tokens should be a list of token ids; found 'a value that needs code to be"
            r" built'"
        ),
    ):
        freeze_rollouts(pair, tmp_path / "tensor.pt")
    torch.save(
        {"samples": [{"prompt": torch.tensor([1, 2]), "response": "w1"}]}, tmp_path / "opaque.pt"
    )
    with pytest.raises(
        DiagnosticsError,
        match=r"row 1 holds a value that only code could build\. Write the rows as JSONL",
    ):
        freeze_rollouts(pair, tmp_path / "opaque.pt")
    two = {"prompt": "w1", "response": "w2", "context_id": "c"}
    with pytest.raises(
        DiagnosticsError,
        match=r"two\.jsonl: two contexts are named 'c'\. Give every row its own id, or none\.",
    ):
        freeze_rollouts(pair, jsonl(tmp_path / "two.jsonl", two, two))
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"two\.jsonl holds no rollouts of format verl: it has prompt, response, context_id, and"
            r" needed are verl: input, output\."
        ),
    ):
        freeze_rollouts(pair, tmp_path / "two.jsonl", rollouts_format="verl")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Unknown format 'x' of rollouts\. Known are auto, contexts, slime, released, verl,"
            r" trl, plain\.$"
        ),
    ):
        freeze_rollouts(pair, tmp_path / "two.jsonl", rollouts_format="x")


def test_the_command_line_freezes_a_file(folders, tmp_path, capsys):
    models = [*folders[:4], "--device", "cpu", "--quiet", "--output-dir", str(tmp_path / "out")]
    shutil.copy(FILES / "plain.jsonl", tmp_path / "mine.jsonl")
    assert main(["rollout", *models, "--rollouts", str(tmp_path / "mine.jsonl")]) == 0
    assert len(read_bank(tmp_path / "out" / "contexts.parquet")) == 4
    stage = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["rollout"]
    assert (
        stage["facts"]["rollouts"]["format"] == "plain"
        and stage["facts"]["rollouts"]["from_text"] == 2
        and len(stage["settings"]["rollouts_sha256"]) == 64
    )
    assert main(["score", *models]) == 0
    assert len(pd.read_parquet(tmp_path / "out" / "scores.parquet")) == 7
    (tmp_path / "mine.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n')
    assert main(["rollout", *models, "--rollouts", str(tmp_path / "mine.jsonl")]) == 2
    assert "rollouts_sha256" in capsys.readouterr().err


def test_a_bank_keeps_an_end_token_it_was_given(pair, tmp_path):
    Bank((Context("a", "p", "", (0, 5), "w2", (6, 1), True),)).to_frame().to_parquet(
        tmp_path / "c.parquet"
    )
    assert read_rollouts(pair, tmp_path / "c.parquet")[0].finished


# --- what a row holds beside text
# ---------------------------------------------------------------------------

CALLS = (
    "{% for m in messages %}<user> {% if m.reasoning_content %}w8 {{ m.reasoning_content }} {%"
    " endif %}{{ m.content }} {% if 'tool_calls' in m %}w9 {{ m.tool_calls[0].function.name }} {%"
    " endif %}<eos> {% endfor %}{% if add_generation_prompt %}<user> {% endif %}"
)
QUESTION = [{"role": "user", "content": "w1"}]
CALLING = {
    "role": "assistant",
    "content": "w2",
    "tool_calls": [{"type": "function", "function": {"name": "w3", "arguments": {"x": None}}}],
}
TOOL, ANSWER = (
    {"role": "tool", "name": "w3", "content": "w4"},
    {"role": "assistant", "content": "w5"},
)
THOUGHT = {"role": "assistant", "reasoning_content": "w6", "content": "w7"}


@pytest.fixture
def calling(chatty):
    chatty.tokenizer.chat_template = CALLS
    return chatty


def words(pair, bank):
    return [pair.tokenizer.decode(context.response_ids) for context in bank]


def test_a_tools_words_are_not_the_students(calling, tmp_path):
    """The reply ends before the tool's message; calls and reasoning are what the template writes of
    them.
    """
    rows = [
        {"step": 1, "prompt": QUESTION, "completion": reply}
        for reply in ([CALLING, TOOL, ANSWER], [THOUGHT], [ANSWER], [TOOL])
    ]
    pd.DataFrame(rows[:2]).to_parquet(tmp_path / "t.parquet")
    pd.DataFrame(
        [
            {"prompt": json.dumps(row["prompt"]), "completion": json.dumps(row["completion"])}
            for row in rows[:2]
        ]
    ).to_csv(tmp_path / "t.csv", index=False)
    for file in (tmp_path / "t.parquet", tmp_path / "t.csv", jsonl(tmp_path / "t.jsonl", *rows)):
        bank, counts = freeze_rollouts(calling, file, contexts=2)
        assert (
            words(calling, bank) == ["w2 w9 w3", "w8 w6 w7"]
            and bank[0].prompt == "<user> w1 <eos> <user> "
        )
        assert (
            counts["cut"] == (2 if file.suffix == ".jsonl" else 1)
            and counts["rewritten"] == 2
            and counts["unwritten"] == 0
            and counts["format"] == "trl"
        )
    bank, counts = freeze_rollouts(calling, tmp_path / "t.jsonl")
    assert words(calling, bank)[2:] == ["w5"] and counts["empty"] == 1
    plain, _ = freeze_rollouts(
        calling, jsonl(tmp_path / "p.jsonl", {"messages": QUESTION, "response": [CALLING, TOOL]})
    )
    assert words(calling, plain) == ["w2 w9 w3"]


def test_what_the_template_does_not_write_is_counted(chatty, tmp_path, caplog):
    """A lost call ends the reply before it; after lost reasoning nothing is what the student
    saw.
    """
    rows = [
        {"prompt": QUESTION, "completion": [CALLING, TOOL]},
        {"prompt": QUESTION, "completion": [THOUGHT]},
        {"prompt": "<user> w1", "completion": [THOUGHT]},
    ]
    bank, counts = freeze_rollouts(chatty, jsonl(tmp_path / "t.jsonl", *rows))
    assert words(chatty, bank) == ["w2"] and counts["unwritten"] == 3 and counts["rewritten"] == 0
    assert (
        "3 contexts with tool calls or reasoning that the chat template does not write: left out"
        " where the reasoning is lost" in caplog.text
    )
    with pytest.raises(DiagnosticsError, match=r"n\.jsonl holds 0 usable contexts of 2"):
        freeze_rollouts(chatty, jsonl(tmp_path / "n.jsonl", *rows[1:]))


def test_a_begun_reply_is_continued_as_trl_does(calling, tmp_path):
    prompt = [*QUESTION, {"role": "assistant", "content": "w2"}]
    bank, counts = freeze_rollouts(
        calling, jsonl(tmp_path / "t.jsonl", {"prompt": prompt, "completion": [ANSWER]})
    )
    assert (
        bank[0].prompt.rstrip() == "<user> w1 <eos> <user> w2"
        and words(calling, bank) == ["w5"]
        and counts["prompts_continued"] == 1
    )
    bank, counts = freeze_rollouts(
        calling, jsonl(tmp_path / "p.jsonl", {"messages": prompt, "response": " w2"})
    )
    assert bank[0].prompt == "<user> w1 <eos> <user> " and counts["prompts_replies_cut"] == 1


def test_tools_of_a_row_reach_its_prompt(calling, tmp_path):
    calling.tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].function.name }} {% endif %}" + CALLS
    )
    tool = {"type": "function", "function": {"name": "w3"}}
    bank, counts = freeze_rollouts(
        calling,
        jsonl(
            tmp_path / "t.jsonl",
            {"prompt": QUESTION, "completion": [CALLING], "tools": json.dumps([tool])},
        ),
    )
    assert (
        bank[0].prompt == "w3 <user> w1 <eos> <user> "
        and words(calling, bank) == ["w2 w9 w3"]
        and counts["prompts_arguments_unused"] == 0
    )


@pytest.mark.parametrize(
    "prompt, response, found, counted",
    [
        ([2, 2, 0, 5], [6, 1, 2, 2], ((0, 5), (6, 1)), {"padded": 1}),
        ([1, 1, 5], [6, 1, 1, 1], ((5,), (6, 1)), {"padded": 1}),
        ([0, 0, 0, 5], [6], ((0, 0, 0, 5), (6,)), {}),
        ([1, 5], [6], ((1, 5), (6,)), {}),
        ([5, 2, 2], [2, 2, 6, 2], ((5,), (6,)), {"padded": 1}),
        ([5], [6, 1, 7, 8], ((5,), (6, 1)), {"after_end": 1}),
        ([5], [6, 1, 2, 8], ((5,), (6, 1)), {"after_end": 1}),
        ([5], [2, 2], ((5,), ()), {"padded": 1, "empty": 1}),
        ([2, 2], [6], ((2, 2), (6,)), {}),
    ],
)
def test_filler_and_what_follows_an_end_are_no_part_of_a_context(
    pair, tmp_path, prompt, response, found, counted
):
    """0 begins, 1 ends, 2 fills. One end token before a prompt may be its own; a start token that
    does not fill is.
    """
    good = {"prompt_ids": [9], "response_ids": [9]}
    bank, counts = freeze_rollouts(
        pair, jsonl(tmp_path / "r.jsonl", {"prompt_ids": prompt, "response_ids": response}, good)
    )
    assert [(c.prompt_ids, c.response_ids) for c in bank][:-1] == ([found] if found[1] else [])
    assert counts == zero_but(
        format="plain", rows=2, contexts=len(bank), positions=bank.positions, **counted
    )


def test_text_beyond_an_end_token_is_cut(pair, tmp_path, caplog):
    bank, counts = freeze_rollouts(
        pair,
        jsonl(
            tmp_path / "r.jsonl",
            {"prompt": "w1", "response": " w2 <eos> w3"},
            {"prompt_ids": [5], "response_ids": [6, 1, 7], "response": "w2 <eos> w3"},
        ),
    )
    assert (
        [c.response_ids for c in bank] == [(6, 1), (6, 1)]
        and all(c.finished for c in bank)
        and counts["after_end"] == 2
        and counts["other_text"] == 0
    )
    assert (
        "2 contexts cut after their first end token: what follows it does not belong to the"
        " response" in caplog.text
    )


def test_a_mask_may_be_of_truth_values_and_come_with_plain_rows(pair, tmp_path):
    rows = [
        {"prompt_ids": [5], "response_ids": [6, 7, 8], "loss_mask": [True, False, True]},
        {"prompt_ids": [5], "response_ids": [7, 2, 2], "response_mask": [1.0, 0, 0]},
    ]
    bank, counts = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", *rows), turns="first")
    assert [c.response_ids for c in bank] == [(6,), (7,)] and (counts["cut"], counts["padded"]) == (
        1,
        1,
    )
    bank, counts = freeze_rollouts(pair, tmp_path / "r.jsonl")
    assert [(c.response_ids, c.supervised) for c in bank] == [
        ((6, 7, 8), (True, False, True)),
        ((7,), None),
    ]
    assert (counts["turns"], counts["cut"], counts["padded"]) == (1, 0, 1)
    assert bank.positions == 3 and bank[0].sampled_ids == (6, 8)
    for mask, message in (
        ([1], r"row 1: loss_mask has 1 values for 3 response_ids"),
        ([1, 2, 3], r"row 1: loss_mask should be a list of 0 and 1"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            freeze_rollouts(pair, jsonl(tmp_path / "b.jsonl", {**rows[0], "loss_mask": mask}))


def test_ids_in_a_column_with_a_gap_are_exact(pair, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"prompt": ["w1", "w2", "w3"], "response": [" w4"] * 3}
    pq.write_table(
        pa.table(columns | {"prompt_id": pa.array([2**62 + 1, 2**62 + 3, None], pa.int64())}),
        tmp_path / "i.parquet",
    )
    assert [c.prompt_id for c in read_rollouts(pair, tmp_path / "i.parquet")][:2] == [
        str(2**62 + 1),
        str(2**62 + 3),
    ]
    pd.DataFrame(columns | {"prompt_id": [2.0**62, 2.0**62, None]}).to_parquet(
        tmp_path / "f.parquet"
    )
    bank, counts = freeze_rollouts(pair, tmp_path / "f.parquet")
    assert len({c.prompt_id for c in bank}) == 3 and counts["prompts_vague_ids"] == 2


def test_a_response_that_is_json_stays_the_students(pair, tmp_path):
    text = '[{"role": "user", "content": "w1"}]'
    bank, counts = freeze_rollouts(
        pair, jsonl(tmp_path / "r.jsonl", {"prompt": "w1", "response": text})
    )
    assert len(bank) == 1 and counts["from_text"] == 1 and counts["rewritten"] == counts["cut"] == 0


def test_columns_that_nothing_was_read_from_are_named(pair, tmp_path, caplog):
    caplog.set_level("INFO")
    freeze_rollouts(
        pair,
        jsonl(tmp_path / "r.jsonl", {"prompt": "w1", "response": " w2", "reward": 1.0, "uid": "x"}),
    )
    assert f"{tmp_path / 'r.jsonl'}: columns that are not used: uid" in caplog.messages


def test_a_huge_row_is_left_out_by_its_beginning(pair, tmp_path, monkeypatch):
    seen, kind = [], type(pair.tokenizer)
    monkeypatch.setattr(
        kind,
        "__call__",
        lambda self, text, _call=kind.__call__, **how: (
            seen.append(len(text)) or _call(self, text, **how)
        ),
    )
    rows = (
        {"prompt": "w1 " * 10**6, "response": "w2"},
        {"prompt": "w1", "response": "w2 " * 10**6},
        {"prompt": "w1", "response": "w2"},
    )
    bank, counts = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", *rows))
    assert len(bank) == 1 and counts["over_long"] == 2 and max(seen) < 10**5


def test_special_tokens_are_told_by_their_flag(chatty, tmp_path):
    """Phi's turn tokens are flagged special and named nowhere: a dump without them has lost
    them.
    """
    from tokenizers import AddedToken

    chatty.tokenizer.chat_template = "{% for m in messages %}<turn> {{ m.content }} {% endfor %}"
    chatty.tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    assert "<turn>" not in chatty.tokenizer.all_special_tokens
    pair = dataclasses.replace(chatty, tokenizer=chatty.tokenizer)
    assert (
        freeze_rollouts(pair, jsonl(tmp_path / "v.jsonl", {"input": "w1", "output": " w2"}))[1][
            "without_special"
        ]
        == 1
    )


# --- contexts of another run


def test_contexts_of_another_run_stay_to_the_last_token(pair, tmp_path, caplog):
    """Padding and end tokens that the student sampled are positions like any other."""
    written = (
        ("final padding", (0, 5), (6, 7, 2, 2)),
        ("first padding", (0, 5), (2, 6, 7)),
        ("nothing but padding", (0, 5), (2, 2)),
        ("an end within", (0, 5), (6, 1, 7)),
        ("two ends", (0, 5), (6, 1, 1)),
        ("a prompt with both", (0, 2, 5, 1, 1), (6, 1)),
    )
    bank = Bank(
        tuple(
            Context(
                name,
                f"p{i}",
                "w1",
                prompt_ids,
                pair.tokenizer.decode(ids, skip_special_tokens=True),
                ids,
                ids[-1] in pair.end_ids,
                domain="math",
                correct=bool(i % 2),
                sampled_logprobs=tuple(-float(t + 1) for t in range(len(ids))),
            )
            for i, (name, prompt_ids, ids) in enumerate(written)
        )
    )
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet")
    found, counts = freeze_rollouts(pair, tmp_path / "contexts.parquet")
    assert found == bank
    assert (counts["padded"], counts["after_end"], counts["cut"]) == (0, 0, 0)
    assert counts["positions"] == sum(len(ids) for *_, ids in written)


def test_contexts_with_masks_and_padding_at_their_end_stay_too(pair, tmp_path):
    ids, own = (2, 6, 20, 7, 2), (True, True, False, True, True)
    bank = Bank((Context("a", "p", "w1", (0, 5), "w2\nw3", ids, False, supervised=own),))
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet")
    again = read_rollouts(pair, tmp_path / "contexts.parquet")[0]
    assert (again.response_ids, again.supervised) == (ids, own)


def test_padding_of_another_program_s_ids_is_still_removed(pair, tmp_path):
    row = {"prompt": "w1", "prompt_ids": [0, 5], "response_ids": [6, 7, 2, 2]}
    found, counts = freeze_rollouts(pair, jsonl(tmp_path / "plain.jsonl", row))
    assert found[0].response_ids == (6, 7) and counts["padded"] == 1
