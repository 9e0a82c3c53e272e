"""What a row of prompts or rollouts holds is used, refused or counted: columns beside the prompt,
parts of messages that a template leaves out, masks of every name."""

import json

import pytest

from diagnostics.contexts.encoding import encode_prompt
from diagnostics.contexts.import_rollouts import freeze_rollouts
from diagnostics.contexts.prompts import read_prompts
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models.pair import assemble
from tests.conftest import make_model, make_tokenizer

PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WHOLE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ m.reasoning_content or '' }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONLY_USERS = (
    "{% for m in messages if m.role == 'user' %}{{ 'User: ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)
UPPER = "{% for m in messages %}{{ m.content | upper }}{% endfor %}:"
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
USER, AGAIN = {"role": "user", "content": "w1 w2"}, {"role": "user", "content": "w3"}


def tokenizer(template=PLAIN):
    made = make_tokenizer()
    made.chat_template = template
    return made


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reply(**more):
    return {"role": "assistant", "content": "w4"} | more


@pytest.mark.parametrize(
    "template, between, lost",
    [
        (PLAIN, reply(tool_calls=CALLS), True),
        (WHOLE, reply(tool_calls=CALLS), False),
        (WHOLE, {"role": "assistant", "content": None, "tool_calls": CALLS}, False),
        (WHOLE, reply(function_call={"name": "add"}), True),
        (PLAIN, reply(reasoning_content="w5"), True),
        (WHOLE, reply(reasoning_content="w5"), False),
        (PLAIN, reply(content="<think>w9</think> w4"), False),
        (PLAIN, {"role": "tool", "content": "w7"}, False),
        (ONLY_USERS, {"role": "tool", "content": "w7"}, True),
        (ONLY_USERS, {"role": "developer", "content": "w7"}, True),
        (UPPER, {"role": "tool", "content": "w7"}, False),
    ],
)
def test_what_a_template_leaves_out_is_counted(tmp_path, template, between, lost):
    path = write(tmp_path, {"messages": [USER, between, AGAIN]})
    assert read_prompts(path, tokenizer=tokenizer(template)).counts["unwritten"] == lost


@pytest.mark.parametrize(
    "row, counted",
    [
        ({"system": "w5"}, 1),
        ({"history": [["w5", "w6"]]}, 1),
        ({"input": "w5"}, 1),
        ({"images": ["a.png"]}, 1),
        ({"functions": [{"name": "add"}]}, 1),
        ({"system": None, "history": [], "input": "", "images": None}, 0),
        ({"source": "w5"}, 0),
    ],
)
def test_more_of_a_conversation_beside_the_prompt_is_counted(tmp_path, row, counted):
    path = write(tmp_path, {"prompt": "w1 w2"} | row)
    assert read_prompts(path, tokenizer=tokenizer()).counts["beside"] == counted
    path = write(tmp_path, {"prompt": "w1 w2", "response": "w3"} | row)
    pair = assemble("made", make_model(1), make_model(2), tokenizer(None))
    assert freeze_rollouts(pair, path)[1]["prompts_beside"] == counted


def test_messages_in_an_object_and_images_in_a_message(tmp_path):
    made = tokenizer()
    path = write(tmp_path, {"prompt": json.dumps({"messages": [USER]})}, {"prompt": '{"a": 1}'})
    one, other = read_prompts(path, tokenizer=made).prompts
    assert one.prompt == "<user> w1 w2 <assistant>" and '{"a": 1}' in other.prompt
    path = write(tmp_path, {"messages": [{"role": "user", "content": "w1", "images": ["a.png"]}]})
    with pytest.raises(DiagnosticsError, match=r"message 1 \(user\) holds images\. Only text"):
        read_prompts(path, tokenizer=made)


@pytest.mark.parametrize("name", ["loss_mask", "action_mask", "assistant_masks", "tool_mask"])
def test_a_mask_of_any_name_cuts(tmp_path, name):
    pair = assemble("made", make_model(1), make_model(2), tokenizer())
    row = {"prompt_ids": [10, 11], "response_ids": [12, 13, 14]}
    bank, counts = freeze_rollouts(pair, write(tmp_path, row | {name: [1, 1, 0]}))
    assert bank.contexts[0].response_ids == (12, 13) and counts["cut"] == 1
    both = row | {name: [1, 1, 0], "response_mask": [1, 0, 1]}
    assert freeze_rollouts(pair, write(tmp_path, both))[0].contexts[0].response_ids == (12,)
    with pytest.raises(DiagnosticsError, match=rf"{name} has 2 values for 3 response_ids"):
        freeze_rollouts(pair, write(tmp_path, row | {name: [1, 1]}))


@pytest.mark.parametrize(
    "mask, prompt, response",
    [
        ([0, 1, 1, 1, 0], (11,), (12, 13)),
        ([0, 1], (11,), (12, 13, 14)),
        ([1, 1, 0], (10, 11), (12, 13)),
        ([1, 1, 1, 1, 1], (10, 11), (12, 13, 14)),
    ],
)
def test_an_attention_mask_takes_filler_off(tmp_path, mask, prompt, response):
    pair = assemble("made", make_model(1), make_model(2), tokenizer())
    row = {"prompt_ids": [10, 11], "response_ids": [12, 13, 14], "attention_mask": mask}
    context = freeze_rollouts(pair, write(tmp_path, row))[0].contexts[0]
    assert (context.prompt_ids, context.response_ids) == (prompt, response)
    with pytest.raises(DiagnosticsError, match="attention_mask has 4 values"):
        freeze_rollouts(pair, write(tmp_path, row | {"attention_mask": [1, 1, 1, 1]}))


def test_rendered_text_without_special_tokens_is_no_question(tmp_path):
    """As logs have it, of a template without special tokens but its start."""
    template = "{{ bos_token }}{% for m in messages %}User: {{ m.content }}\n{% endfor %}Assistant:"
    made = tokenizer(template)
    made.bos_token = made.convert_ids_to_tokens(0)
    path = write(tmp_path, {"prompt": "User: w1\nAssistant:"})
    found = read_prompts(path, tokenizer=made)
    assert found.prompts[0].prompt == "User: w1\nAssistant:" and found.counts["rendered"] == 1
    adds = encode_prompt(made, "User: w1") != encode_prompt(made, "User: w1", rendered=True)
    assert found.counts["start_missing"] == (not adds)
