"""Prompt files and data sets: what is read, rendered, left out and counted."""

import pandas as pd
import pytest

from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.prompts import NOTED, load_prompts, read_prompts
from diagnostics.core.errors import DiagnosticsError
from tests.conftest import make_tokenizer
from tests.contexts.factories import TEMPLATE, jsonl


@pytest.fixture
def plain():
    return make_tokenizer()


@pytest.fixture
def chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_text_stays_text_without_a_template(tmp_path, plain):
    prompts = load_prompts(
        jsonl(tmp_path / "p.jsonl", {"prompt": "w1 w2", "answer": "3"}, {"prompt": "w4"}),
        tokenizer=plain,
    )
    assert [p.prompt for p in prompts] == ["w1 w2", "w4"] and [p.answer for p in prompts] == [
        "3",
        None,
    ]


def test_ids_depend_on_text_alone(tmp_path, plain):
    first = load_prompts(
        jsonl(tmp_path / "a.jsonl", {"prompt": "w1"}, {"prompt": "w2"}), tokenizer=plain
    )
    second = load_prompts(
        jsonl(tmp_path / "b.jsonl", {"prompt": "w2"}, {"prompt": "w1"}), tokenizer=plain
    )
    assert [p.prompt_id for p in first] == [p.prompt_id for p in second][::-1] and first[
        0
    ].prompt_id != first[1].prompt_id


def test_own_ids_are_kept(tmp_path, plain):
    assert (
        load_prompts(
            jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "prompt_id": "mine"}), tokenizer=plain
        )[0].prompt_id
        == "mine"
    )


def test_templates_render_text_and_messages(tmp_path, chat):
    file = jsonl(
        tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w2"}]}
    )
    assert [p.prompt for p in load_prompts(file, tokenizer=chat)] == [
        "[user]w1[go]",
        "[user]w2[go]",
    ]
    assert load_prompts(file, tokenizer=chat, chat=False)[0].prompt == "w1"
    assert (
        load_prompts(file, tokenizer=chat, chat_template_kwargs={"mark": "!"})[0].prompt
        == "[user]w1[go]!"
    )


def test_other_formats_and_columns(tmp_path, plain, chat):
    frame = pd.DataFrame({"question": ["w1", "w2"]})
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        assert [
            p.prompt
            for p in load_prompts(tmp_path / name, tokenizer=plain, prompt_column="question")
        ] == ["w1", "w2"]
    pd.DataFrame({"messages": [[{"role": "user", "content": "w3"}]]}).to_parquet(
        tmp_path / "m.parquet"
    )
    assert load_prompts(tmp_path / "m.parquet", tokenizer=chat)[0].prompt == "[user]w3[go]"


def test_what_is_left_out_is_counted(tmp_path, plain, caplog):
    file = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "w1"},
        {"prompt": " "},
        {"prompt": "w1"},
        {"prompt": None},
        {"prompt": "w2"},
    )
    assert [p.prompt for p in load_prompts(file, tokenizer=plain)] == ["w1", "w2"]
    assert caplog.messages == [f"{file}: 2 empty, 1 repeated, 0 over-long prompts left out of 5"]
    counts = read_prompts(file, tokenizer=plain, contexts=1).counts
    assert counts == {
        "rows": 5,
        "prompts": 1,
        "empty": 2,
        "repeated": 1,
        "over_long": 0,
        "not_needed": 1,
    } | dict.fromkeys(NOTED, 0)
    assert counts["rows"] == sum(
        counts[name] for name in ("prompts", "empty", "repeated", "over_long", "not_needed")
    )


def test_over_long_prompts_are_left_out_and_counted(tmp_path, plain, caplog):
    file = jsonl(
        tmp_path / "p.jsonl",
        {"prompt": "w1 w2 w3"},
        {"prompt": "w1 w2 w3 w4"},
        {"prompt": "w1", "teacher_prompt": "w1 w2 w3 w4"},
    )
    found = read_prompts(file, tokenizer=plain, max_prompt_tokens=4)
    assert [p.prompt for p in found.prompts] == ["w1 w2 w3"] and found.counts["over_long"] == 2
    assert caplog.messages == [
        f"{file}: 0 empty, 0 repeated, 2 over-long (more than 4 tokens) prompts left out of 3"
    ]
    plain.model_max_length = 4
    assert read_prompts(file, tokenizer=plain).counts["over_long"] == 2
    with pytest.raises(
        DiagnosticsError,
        match=(r"p\.jsonl holds 0 usable prompts \(3 are longer than 1 tokens\)\. Add"),
    ):
        load_prompts(file, tokenizer=plain, max_prompt_tokens=1)


def test_one_id_for_two_prompts_is_refused(tmp_path, plain):
    file = jsonl(
        tmp_path / "p.jsonl", {"prompt": "w1", "prompt_id": 7}, {"prompt": "w2", "prompt_id": 7}
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"p\.jsonl: prompt_id '7' names two prompts \('w1' and 'w2'\)\. Give each its own id\.$"
        ),
    ):
        load_prompts(file, tokenizer=plain)


def test_a_reply_at_the_end_of_a_chat_is_cut_off_and_counted(tmp_path, chat, caplog):
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    found = read_prompts(
        jsonl(tmp_path / "p.jsonl", {"messages": talk}, {"messages": talk[:1] + talk}),
        tokenizer=chat,
    )
    assert [p.prompt for p in found.prompts] == [
        "[user]w1[go]",
        "[user]w1[user]w1[go]",
    ] and found.counts["replies_cut"] == 2
    assert "2 chats end with the assistant's turn, which was cut off" in caplog.text


def test_a_teacher_may_read_more(tmp_path, plain, chat):
    rows = (
        {"prompt": "w1", "hint": "w9"},
        {"prompt": "w2", "teacher_prompt": "w8 w2"},
        {"prompt": "w3"},
    )
    assert [
        p.teacher_prompt for p in load_prompts(jsonl(tmp_path / "p.jsonl", *rows), tokenizer=plain)
    ] == ["w9\n\nw1", "w8 w2", None]
    talk = [{"role": "system", "content": "w5"}, {"role": "user", "content": "w1"}]
    found = load_prompts(
        jsonl(
            tmp_path / "m.jsonl", {"messages": talk, "hint": "w9"}, {"messages": talk, "hint": "w7"}
        ),
        tokenizer=chat,
    )
    assert [p.teacher_prompt for p in found] == [
        "[system]w5[user]w9\n\nw1[go]",
        "[system]w5[user]w7\n\nw1[go]",
    ]
    assert {p.prompt for p in found} == {"[system]w5[user]w1[go]"} and found[0].prompt_id != found[
        1
    ].prompt_id
    with pytest.raises(DiagnosticsError, match=r"row 1 has a teacher_prompt and a hint\. Give one"):
        load_prompts(
            jsonl(tmp_path / "b.jsonl", {"prompt": "w1", "hint": "w9", "teacher_prompt": "w8"}),
            tokenizer=plain,
        )
    with pytest.raises(
        DiagnosticsError, match=r"row 1 has a hint and no user message to put it before"
    ):
        load_prompts(
            jsonl(tmp_path / "c.jsonl", {"prompt": talk[:1], "hint": "w9"}), tokenizer=chat
        )


def test_a_csv_keeps_its_words(tmp_path, plain):
    (tmp_path / "p.csv").write_text("prompt,answer\nNA,007\n12,\n,3\n")
    found = read_prompts(tmp_path / "p.csv", tokenizer=plain)
    assert [(p.prompt, p.answer) for p in found.prompts] == [
        ("NA", "007"),
        ("12", None),
    ] and found.counts["empty"] == 1


def test_whole_numbers_stay_whole_beside_a_gap(tmp_path, plain):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "answer": 7}, {"prompt": "w2"})
    assert [p.answer for p in load_prompts(file, tokenizer=plain)] == ["7", None]


def test_a_start_token_stands_once(plain):
    assert encode_prompt(plain, "w1") == (0, 5) == encode_prompt(
        plain, "<bos> w1"
    ) and encode_prompt(plain, "<bos> <bos> w1") == (0, 0, 5)


@pytest.fixture
def folder(tmp_path):
    """A local data set with two splits, as files and as `save_to_disk` writes it."""
    (tmp_path / "files").mkdir()
    jsonl(
        tmp_path / "files" / "train.jsonl",
        {"question": "w1", "answer": "1"},
        {"question": "w2", "answer": "2"},
    )
    jsonl(tmp_path / "files" / "test.jsonl", {"question": "w3", "answer": "3"})
    return tmp_path


def test_data_sets_open_by_split(folder, plain, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    source, options = f"hf:{folder / 'files'}", {"tokenizer": plain, "prompt_column": "question"}
    assert [(p.prompt, p.answer) for p in load_prompts(source, **options)] == [
        ("w1", "1"),
        ("w2", "2"),
    ]
    assert [p.prompt for p in load_prompts(source, prompts_split="test", **options)] == ["w3"]
    whole = datasets.load_dataset(str(folder / "files"), cache_dir=str(folder / "cache"))
    whole.save_to_disk(folder / "saved")
    whole["test"].save_to_disk(folder / "one")
    assert [
        p.prompt for p in load_prompts(f"hf:{folder / 'saved'}", prompts_split="test", **options)
    ] == ["w3"]
    assert [p.prompt for p in load_prompts(f"hf:{folder / 'one'}", **options)] == ["w3"]
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^hf:.*files, split 'dev', cannot be read \(.*dev.*\)\. Check name, configuration and"
            r" --prompts-split"
        ),
    ):
        load_prompts(source, prompts_split="dev", **options)


def test_data_sets_that_cannot_be_had(tmp_path, plain, monkeypatch):
    import datasets

    def unreachable(name, configuration, *, split, revision):
        raise ConnectionError(f"no way to {name} {configuration} {split} {revision}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^hf:who/what:main@abc, split 'test', cannot be read \(no way to who/what main test"
            r" abc\)\."
        ),
    ):
        load_prompts("hf:who/what:main@abc", tokenizer=plain, prompts_split="test")
    with pytest.raises(
        DiagnosticsError,
        match=r"^--prompts-split test belongs to a data set, and .*p\.jsonl is a file\. Write hf:",
    ):
        load_prompts(tmp_path / "p.jsonl", tokenizer=plain, prompts_split="test")


def test_the_first_so_many(tmp_path, plain):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": "w2"})
    assert len(load_prompts(file, tokenizer=plain, contexts=1)) == 1
    for wanted in (3, 0):
        with pytest.raises(
            DiagnosticsError, match=rf"holds 2 usable prompts, and {wanted} are asked for"
        ):
            load_prompts(file, tokenizer=plain, contexts=wanted)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.jsonl", None, r"none\.jsonl cannot be read \(No such file or directory\)"),
        ("empty.jsonl", "", r"empty\.jsonl holds no rows"),
        ("empty.csv", "", r"empty\.csv cannot be read \(No columns"),
        ("bad.jsonl", '{"prompt": "w1"}\n{"prompt":', r"line 2 is not JSON"),
        ("list.jsonl", "[1, 2]", r"line 1 holds a list, not an object"),
        ("bytes.jsonl", b"\xff\xfe\x00", r"bytes\.jsonl cannot be read"),
        ("bad.parquet", "nope", r"bad\.parquet cannot be read as parquet"),
        ("p.txt", "w1", r"ends in '\.txt'; prompt files are \.jsonl"),
        (
            "col.jsonl",
            '{"text": "w1"}',
            (
                r"has no column 'prompt' or 'messages'; it has text\. Name the column with"
                r" --prompt-column"
            ),
        ),
        (
            "type.jsonl",
            '{"prompt": 5}',
            r"row 1: a prompt is text or a list of \{role, content\} messages; found '5'",
        ),
        (
            "chat.jsonl",
            '{"prompt": [{"role": "user", "content": "w1"}]}',
            r"row 1 holds chat messages, and the tokenizer has no chat template",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, plain, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DiagnosticsError, match=message):
        load_prompts(tmp_path / name, tokenizer=plain)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The text 'a\\ud83d b' holds half a surrogate pair at character 1, which is no"
            r" character\. Write the file again as UTF-8\.$"
        ),
    ):
        encode_prompt(make_tokenizer(), "a\ud83d b")
