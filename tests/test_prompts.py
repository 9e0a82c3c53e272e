import json

import pandas as pd
import pytest

from diagnostics.prompts import load_prompts
from diagnostics.types import DiagnosticsError
from tests.conftest import make_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}{{ mark | default('') }}"


@pytest.fixture
def plain():
    return make_tokenizer()


@pytest.fixture
def chat():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def jsonl(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_text_stays_text_without_a_template(tmp_path, plain):
    prompts = load_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "w1 w2", "answer": "3"}, {"prompt": "w4"}), tokenizer=plain)
    assert [p.prompt for p in prompts] == ["w1 w2", "w4"] and [p.answer for p in prompts] == ["3", None]


def test_ids_depend_on_text_alone(tmp_path, plain):
    first = load_prompts(jsonl(tmp_path / "a.jsonl", {"prompt": "w1"}, {"prompt": "w2"}), tokenizer=plain)
    second = load_prompts(jsonl(tmp_path / "b.jsonl", {"prompt": "w2"}, {"prompt": "w1"}), tokenizer=plain)
    assert [p.prompt_id for p in first] == [p.prompt_id for p in second][::-1] and first[0].prompt_id != first[1].prompt_id


def test_own_ids_are_kept(tmp_path, plain):
    assert load_prompts(jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "prompt_id": "mine"}), tokenizer=plain)[0].prompt_id == "mine"


def test_templates_render_text_and_messages(tmp_path, chat):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": [{"role": "user", "content": "w2"}]})
    assert [p.prompt for p in load_prompts(file, tokenizer=chat)] == ["[user]w1[go]", "[user]w2[go]"]
    assert load_prompts(file, tokenizer=chat, chat=False)[0].prompt == "w1"
    assert load_prompts(file, tokenizer=chat, chat_template_kwargs={"mark": "!"})[0].prompt == "[user]w1[go]!"


def test_other_formats_and_columns(tmp_path, plain, chat):
    frame = pd.DataFrame({"question": ["w1", "w2"]})
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    for name in ("p.csv", "p.parquet"):
        assert [p.prompt for p in load_prompts(tmp_path / name, tokenizer=plain, prompt_column="question")] == ["w1", "w2"]
    pd.DataFrame({"messages": [[{"role": "user", "content": "w3"}]]}).to_parquet(tmp_path / "m.parquet")
    assert load_prompts(tmp_path / "m.parquet", tokenizer=chat)[0].prompt == "[user]w3[go]"


def test_what_is_left_out_is_counted(tmp_path, plain, caplog):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": " "}, {"prompt": "w1"}, {"prompt": None}, {"prompt": "w2"})
    assert [p.prompt for p in load_prompts(file, tokenizer=plain)] == ["w1", "w2"]
    assert "2 empty and 1 repeated prompts left out of 5" in caplog.text


def test_the_first_so_many(tmp_path, plain):
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": "w2"})
    assert len(load_prompts(file, tokenizer=plain, contexts=1)) == 1
    for wanted in (3, 0):
        with pytest.raises(DiagnosticsError, match=rf"holds 2 usable prompts, and {wanted} are asked for"):
            load_prompts(file, tokenizer=plain, contexts=wanted)


@pytest.mark.parametrize("name, content, message", [
    ("none.jsonl", None, r"none\.jsonl cannot be read \(No such file or directory\)"),
    ("empty.jsonl", "", r"empty\.jsonl holds no rows"),
    ("empty.csv", "", r"empty\.csv cannot be read \(No columns"),
    ("bad.jsonl", '{"prompt": "w1"}\n{"prompt":', r"line 2 is not JSON"),
    ("list.jsonl", "[1, 2]", r"line 1 holds a list, not an object"),
    ("bytes.jsonl", b"\xff\xfe\x00", r"bytes\.jsonl cannot be read"),
    ("bad.parquet", "nope", r"bad\.parquet cannot be read as parquet"),
    ("p.txt", "w1", r"ends in '\.txt'; prompt files are \.jsonl"),
    ("col.jsonl", '{"text": "w1"}', r"has no column 'prompt' or 'messages'; it has text\. Name the column with --prompt-column"),
    ("type.jsonl", '{"prompt": 5}', r"row 1: a prompt is text or a list of \{role, content\} messages; found '5'"),
    ("chat.jsonl", '{"prompt": [{"role": "user", "content": "w1"}]}', r"row 1 holds chat messages, and the tokenizer has no chat template"),
])
def test_files_that_cannot_be_used(tmp_path, plain, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DiagnosticsError, match=message):
        load_prompts(tmp_path / name, tokenizer=plain)
