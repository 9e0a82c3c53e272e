"""One conversation in the shapes in which TRL, verl, slime, ms-swift, OpenAI's API and Arrow write
it, and what is no conversation.
"""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts.conversations import DEEPEST, as_messages, plain, read_text, row_arguments
from diagnostics.contexts.encoding import special_ids
from diagnostics.contexts.prompts import load_prompts, read_prompts
from diagnostics.contexts.rendering import Renderer
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import missing
from tests.conftest import make_tokenizer
from tests.contexts.test_prompts import TEMPLATE, jsonl

CHATML = (
    "{% if tools %}<|im_start|>tools {{ tools | length }} {{ tools[0].function.name }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% if 'tool_calls' in m %}<call>{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}</call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TALK = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
]
RENDERED = (
    '<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n<call>weather {"city": "Rome"}</call><|im_end|>\n'
    "<|im_start|>tool\nsunny<|im_end|>\n<|im_start|>assistant\n"
)


def chatml(template=CHATML):
    tokenizer = make_tokenizer(["w1", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def tokenizer():
    return chatml()


def rendered(path, tokenizer, **options):
    return [prompt.prompt for prompt in load_prompts(path, tokenizer=tokenizer, **options)]


def test_jsonl_parquet_and_csv_render_alike(tmp_path, tokenizer):
    """Arrow gives every message every key, and None where there was none; a CSV holds JSON text."""
    files = [
        jsonl(tmp_path / "p.jsonl", {"messages": TALK}),
        tmp_path / "p.parquet",
        tmp_path / "text.parquet",
        tmp_path / "p.csv",
    ]
    pd.DataFrame({"messages": [TALK]}).to_parquet(files[1])
    pd.DataFrame({"messages": [json.dumps(TALK)]}).to_parquet(files[2])
    pd.DataFrame({"prompt": [json.dumps(TALK)]}).to_csv(files[3], index=False)
    assert [rendered(file, tokenizer) for file in files] == [[RENDERED]] * 4
    assert (
        tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == RENDERED
    )


def test_a_key_that_is_none_is_left_out_at_every_level():
    given = {
        "role": "user",
        "content": "w1",
        "tool_calls": None,
        "function": {
            "arguments": {"city": "Rome", "day": None},
            "x": np.array([{"a": None, "b": np.int64(2**62 + 1)}], dtype=object),
        },
    }
    assert plain(given, "row 1") == {
        "role": "user",
        "content": "w1",
        "function": {"arguments": {"city": "Rome"}, "x": [{"b": 2**62 + 1}]},
    }
    assert [
        missing(value)
        for value in (None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", 0, "NA")
    ] == [True] * 5 + [False] * 3


def test_content_may_be_null_beside_calls_and_reasoning():
    for more in ({"tool_calls": [CALL]}, {"reasoning_content": "w1"}):
        assert as_messages([{"role": "assistant", "content": None, **more}], "row 1") == [
            {"role": "assistant", **more}
        ]


def test_blocks_of_text_are_one_text_unless_the_template_reads_them(tmp_path, tokenizer):
    blocks = [{"type": "text", "text": "w1", "image_url": None}, {"type": "text", "text": "w2"}]
    file = jsonl(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": blocks}]})
    assert rendered(file, tokenizer) == [
        "<|im_start|>user\nw1\nw2<|im_end|>\n<|im_start|>assistant\n"
    ]
    reads = "{% for m in messages %}[{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}{{ b.text }}|{% endfor %}{% endif %}]{% endfor %}"
    assert rendered(file, chatml(reads.replace("|{%", "{%"))) == [
        "[w1w2]"
    ]  # as the library renders the blocks
    assert rendered(file, chatml(reads)) == [
        "[w1\nw2]"
    ]  # its texts in blocks are not those in strings


@pytest.mark.parametrize(
    "message, error",
    [
        (
            {"role": "user", "content": None},
            r"^row 1, message 2 \(user\) has no content \(None\) and no tool_calls\. Give it text, or remove it\.$",
        ),
        (
            {"role": "user", "content": 5},
            r"^row 1, message 2 \(user\) has the content '5'; it should be text, or a list of blocks of text\.",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
            r"^row 1, message 2 \(user\) holds a block of content that is no text: \"\{'type': 'image_url'",
        ),
        (
            {"from": "human", "value": "w1"},
            r"^row 1, message 2: a message is an object with a role and content; found \"\{'from': 'human'",
        ),
        ({"role": "user", "content": "w1", "x": b"w"}, r"^row 1, message 2 holds a bytes"),
        ("w1", r"^row 1, message 2: a message is an object"),
    ],
)
def test_an_error_names_the_message(message, error):
    with pytest.raises(DiagnosticsError, match=error):
        as_messages([{"role": "user", "content": "w1 " * 60}, message], "row 1")


def test_json_text_and_pythons_notation(tokenizer):
    assert read_text('[{"role": "user", "content": "w1"}]', "row 1") == [
        {"role": "user", "content": "w1"}
    ]
    for text in ("[1, 2]", '[{"a": 1}]', "[{", "w1", "[{'a': 1}]"):
        assert read_text(text, "row 1") == text
    with pytest.raises(
        DiagnosticsError,
        match=r"^row 1 holds chat messages in Python's notation: .*Write them as JSON, with json\.dumps\.$",
    ):
        read_text(str(TALK), "row 1")


def test_nests_too_deep_are_refused(tmp_path, tokenizer):
    for depth, said in (
        (DEEPEST + 5, rf"more than {DEEPEST} levels deep"),
        (100_000, "line 1 is not JSON: its brackets are nested more than 100 deep"),
    ):
        (tmp_path / "deep.jsonl").write_text(
            '{"messages": [{"role": "user", "content": "w1", "x": '
            + "[" * depth
            + "]" * depth
            + "}]}\n"
        )
        with pytest.raises(DiagnosticsError, match=said):
            load_prompts(tmp_path / "deep.jsonl", tokenizer=tokenizer)
    (tmp_path / "deep.csv").write_text("prompt\n" + "[" * 100_000 + "\n")
    with pytest.raises(DiagnosticsError, match="row 1 holds JSON that is nested too deeply"):
        load_prompts(tmp_path / "deep.csv", tokenizer=tokenizer)


# --- what goes into the template beside the messages
# ------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def test_tools_documents_and_arguments_reach_the_template_row_by_row(tmp_path):
    template = (
        "{{ tools | tojson }}{{ documents | tojson }}{{ enable_thinking | default('unset') }}"
        + CHATML
    )
    rows = [
        {
            "messages": TALK[:1],
            "tools": [TOOL],
            "documents": [{"title": "w", "text": "x"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"messages": TALK[:1], "tools": [], "documents": None, "chat_template_kwargs": {}},
    ]
    plain_file = jsonl(tmp_path / "p.jsonl", *rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    as_text = [
        {
            "messages": json.dumps(row["messages"]),
            **{
                name: json.dumps(row[name])
                for name in ("tools", "documents", "chat_template_kwargs")
            },
        }
        for row in rows
    ]
    pd.DataFrame(as_text[:1]).to_csv(tmp_path / "p.csv", index=False)
    expected = chatml(template).apply_chat_template(
        TALK[:1],
        tokenize=False,
        add_generation_prompt=True,
        tools=[TOOL],
        documents=rows[0]["documents"],
        enable_thinking=False,
    )
    found = rendered(plain_file, chatml(template))
    assert (
        found[0] == expected
        and found[1].startswith("nullnullunset<|im_start|>user")
        and rendered(tmp_path / "p.parquet", chatml(template)) == found
    )
    assert rendered(tmp_path / "p.csv", chatml(template)) == found[:1]
    assert rendered(plain_file, chatml(template), chat_template_kwargs={"enable_thinking": True})[
        1
    ].startswith("nullnullTrue")


def test_arguments_that_change_nothing_are_said(tmp_path, caplog):
    rows = [{"prompt": "w1", "tools": [TOOL]}, {"prompt": "w2", "tools": [TOOL]}, {"prompt": "w3"}]
    found = read_prompts(jsonl(tmp_path / "p.jsonl", *rows), tokenizer=chatml(TEMPLATE))
    assert (
        found.counts["arguments_unused"] == 2
        and "2 prompts have tools or documents that are not used" in caplog.text
    )
    assert read_prompts(tmp_path / "p.jsonl", tokenizer=chatml()).counts["arguments_unused"] == 0
    assert (
        read_prompts(tmp_path / "p.jsonl", tokenizer=chatml(), chat=False).counts[
            "arguments_unused"
        ]
        == 2
    )


@pytest.mark.parametrize(
    "name, value, error",
    [
        (
            "tokenize",
            False,
            r"names tokenize, which this program sets itself when it renders a prompt\. Leave it out\.",
        ),
        ("messages", [], "names messages, which"),
        ("add_generation_prompt", False, "names add_generation_prompt, which"),
        ("return_tensors", "pt", "names return_tensors"),
        ("tools", 5, r"tools should be a list of objects; found '5'"),
        ("documents", ["x"], "documents should be a list of objects"),
        ("chat_template", 5, r"chat_template should be a template's name or text; found '5'"),
        ("continue_final_message", "yes", "continue_final_message should be true or false"),
    ],
)
def test_arguments_that_cannot_be_passed_on(tokenizer, name, value, error):
    with pytest.raises(DiagnosticsError, match=f"^--chat-template-kwargs.*{error}"):
        Renderer(tokenizer, kwargs={name: value})
    with pytest.raises(DiagnosticsError, match=f"^row 7.*{error}"):
        row_arguments({"chat_template_kwargs": json.dumps({name: value})}, "row 7")


def test_named_templates_are_chosen_by_name(tmp_path):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"})
    two = chatml({"tool_use": "T{{ messages[0].content }}", "rag": "R{{ messages[0].content }}"})
    with pytest.raises(
        DiagnosticsError,
        match=r"the tokenizer has the chat templates rag, tool_use, and none of them is the default\. "
        r"""Choose one with --chat-template-kwargs '\{"chat_template": "rag"\}'\.$""",
    ):
        load_prompts(file, tokenizer=two)
    assert rendered(file, two, chat_template_kwargs={"chat_template": "rag"}) == ["Rw1"]
    assert rendered(jsonl(tmp_path / "t.jsonl", {"prompt": "w1", "tools": [TOOL]}), two) == ["Tw1"]
    assert rendered(file, chatml({"default": "D{{ messages[0].content }}", "rag": "R"})) == ["Dw1"]
    for tokenizer, names in ((two, "rag, tool_use"), (chatml(), "no named ones")):
        with pytest.raises(
            DiagnosticsError,
            match=rf"asks for the chat template 'other'; the tokenizer has {names}\. Name one",
        ):
            load_prompts(file, tokenizer=tokenizer, chat_template_kwargs={"chat_template": "other"})


# --- rendered already
# -------------------------------------------------------------------------------------


def test_rendered_text_stays_as_it_is(tmp_path, tokenizer, caplog):
    text = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    found = read_prompts(
        jsonl(tmp_path / "p.jsonl", {"prompt": text}, {"prompt": "what is <|im_end|> for?"}),
        tokenizer=tokenizer,
    )
    assert (
        found.prompts[0].prompt == text
        and found.prompts[1].prompt
        == "<|im_start|>user\nwhat is <|im_end|> for?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (found.counts["rendered"], found.counts["special_inside"]) == (
        1,
        1,
    ) and "1 prompts were rendered before: no chat template was put around them" in caplog.text
    plain_frame = chatml(
        "{% for m in messages %}USER: {{ m.content }} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    assert rendered(
        jsonl(tmp_path / "v.jsonl", {"prompt": "USER: w1 ASSISTANT:"}, {"prompt": "w1 ASSISTANT:"}),
        plain_frame,
    ) == ["USER: w1 ASSISTANT:", "USER: w1 ASSISTANT: ASSISTANT:"]


def test_our_own_contexts_are_rendered(tmp_path, tokenizer):
    """By their columns, whatever the template writes; and any text that is that of its
    prompt_ids.
    """
    row = {
        "context_id": "a",
        "prompt_id": "p",
        "prompt": "w1",
        "prompt_ids": [0, 4],
        "response": "w1",
        "response_ids": [4],
        "finished": False,
    }
    found = read_prompts(jsonl(tmp_path / "c.jsonl", row), tokenizer=tokenizer)
    assert [(p.prompt_id, p.prompt) for p in found.prompts] == [("p", "w1")] and found.counts[
        "rendered"
    ] == 1
    ids = jsonl(
        tmp_path / "i.jsonl",
        {"prompt": "w1", "prompt_ids": list(tokenizer("w1")["input_ids"])},
        {"prompt": "w1 w1", "prompt_ids": [4]},
    )
    assert rendered(ids, tokenizer) == [
        "w1",
        "<|im_start|>user\nw1 w1<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_a_hint_has_no_place_in_a_rendered_prompt(tmp_path, tokenizer):
    with pytest.raises(
        DiagnosticsError, match=r"row 1 has a hint, and its prompt is rendered already"
    ):
        load_prompts(
            jsonl(tmp_path / "p.jsonl", {"prompt": RENDERED, "hint": "w1"}), tokenizer=tokenizer
        )


def test_special_tokens_are_those_with_the_flag():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("<|user|>", special=True), AddedToken("<think>", special=False)]
    )
    assert (
        special_ids(tokenizer) == {0, 1, 2, 3, 64}
        and tokenizer.convert_ids_to_tokens(64) == "<|user|>"
    )
    assert Renderer(tokenizer).has_special("a <|user|> b") and not Renderer(tokenizer).has_special(
        "<think>"
    )


# --- a reply that was begun
# -------------------------------------------------------------------------------


def test_a_reply_that_was_begun_is_continued_where_that_is_meant(tmp_path, tokenizer, caplog):
    begun = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "The answer"}]
    open_end = "<|im_start|>user\nw1<|im_end|>\n<|im_start|>assistant\nThe answer"
    file = jsonl(tmp_path / "p.jsonl", {"messages": begun}, {"messages": begun[:1]})
    found = read_prompts(
        file, tokenizer=tokenizer, chat_template_kwargs={"continue_final_message": True}
    )
    assert [p.prompt for p in found.prompts] == [
        open_end,
        open_end.removesuffix("The answer"),
    ] and (found.counts["continued"], found.counts["replies_cut"]) == (1, 0)
    assert (
        "1 chats end with the beginning of the assistant's turn, which the student continues"
        in caplog.text
    )
    prefix = jsonl(
        tmp_path / "x.jsonl",
        {"messages": [begun[0], begun[1] | {"prefix": True}]},
        {"messages": begun, "chat_template_kwargs": {"continue_final_message": True}, "hint": "w9"},
    )
    found = load_prompts(prefix, tokenizer=tokenizer)
    assert [p.prompt for p in found] == [open_end, open_end] and found[
        1
    ].teacher_prompt == open_end.replace("user\nw1", "user\nw9\n\nw1")
    found = read_prompts(file, tokenizer=tokenizer)
    assert found.counts["replies_cut"] == 1 and found.counts["repeated"] == 1


# --- values and columns
# -----------------------------------------------------------------------------------


def test_ids_and_answers_are_exact(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "prompt": ["A", "B", "C"],
        "prompt_id": pa.array([2**62 + 1, 2**62 + 3, None], pa.int64()),
        "answer": pa.array([72, None, 2**60 + 1], pa.int64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    found = load_prompts(tmp_path / "p.parquet", tokenizer=tokenizer)
    assert [p.prompt_id for p in found[:2]] == [str(2**62 + 1), str(2**62 + 3)] and [
        p.answer for p in found
    ] == ["72", None, str(2**60 + 1)]
    pd.DataFrame(
        {"prompt": ["A", "B", "C"], "prompt_id": [1.0, 2.0, None], "answer": [72.0, None, 3.0]}
    ).to_parquet(tmp_path / "f.parquet")
    assert [
        (p.prompt_id, p.answer) for p in load_prompts(tmp_path / "f.parquet", tokenizer=tokenizer)
    ][:2] == [("1", "72"), ("2", None)]
    frame = pd.DataFrame(
        {
            "prompt": ["A", "B"],
            "answer": pd.array([5, pd.NA], "Int64"),
            "prompt_id": pd.array(["x", pd.NA], "string"),
        }
    )
    frame.set_index("prompt_id").to_parquet(tmp_path / "n.parquet")
    found = load_prompts(tmp_path / "n.parquet", tokenizer=tokenizer)
    assert (
        [p.answer for p in found] == ["5", None]
        and found[0].prompt_id == "x"
        and "NA" not in found[1].prompt_id
    )
    pd.DataFrame({"prompt": ["A"], "answer": [[0.5, "x"]]}).astype({"answer": object}).to_json(
        tmp_path / "l.jsonl", orient="records", lines=True
    )
    assert load_prompts(tmp_path / "l.jsonl", tokenizer=tokenizer)[0].answer == '[0.5, "x"]'


def test_ids_that_a_float_cannot_tell_apart_name_nothing(tmp_path, tokenizer, caplog):
    pd.DataFrame({"prompt": ["A", "B", "C"], "prompt_id": [2.0**62, 2.0**62, None]}).to_parquet(
        tmp_path / "p.parquet"
    )
    found = read_prompts(tmp_path / "p.parquet", tokenizer=tokenizer)
    assert len({p.prompt_id for p in found.prompts}) == 3 and found.counts["vague_ids"] == 2
    assert (
        "2 ids are floats of 2**53 and more, which no longer tell whole numbers apart"
        in caplog.text
    )


def test_columns_that_are_not_used_are_named_once(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    load_prompts(
        jsonl(
            tmp_path / "p.jsonl",
            {"prompt": "w1", "level": 3, "messages": TALK},
            {"prompt": "w2", "subject": "x"},
        ),
        tokenizer=tokenizer,
    )
    assert caplog.messages == [
        f"{tmp_path / 'p.jsonl'}: columns that are not used: level, messages, subject"
    ]


def test_a_file_name_that_no_record_can_hold(tmp_path, tokenizer):
    with pytest.raises(
        DiagnosticsError,
        match=r"^The name of the file '.*\\udcff\.jsonl' is not UTF-8, so no record can hold it\. Rename the file\.$",
    ):
        load_prompts(tmp_path / "p\udcff.jsonl", tokenizer=tokenizer)


def test_a_huge_prompt_is_left_out_by_its_beginning(tmp_path, tokenizer, monkeypatch):
    """However long the text, no more than a beginning of it is tokenised."""
    seen = []
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, text, _call=type(tokenizer).__call__, **how: (
            seen.append(len(text)) or _call(self, text, **how)
        ),
    )
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1 " * 10**6}, {"prompt": "w2"})
    found = read_prompts(file, tokenizer=tokenizer, max_prompt_tokens=100, chat=False)
    assert (
        found.counts["over_long"] == 1
        and [p.prompt for p in found.prompts] == ["w2"]
        and max(seen) < 10**5
    )
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"prompt": "w" * 10**6}) + "\n"
    )  # one long word is one unknown token
    assert (
        read_prompts(
            tmp_path / "one.jsonl", tokenizer=tokenizer, max_prompt_tokens=100, chat=False
        ).counts["over_long"]
        == 0
    )
