"""A chat template is a stranger's program: what it may cost, and what its failures become."""

import gc
import os

import pytest

from diagnostics.contexts.prompts import load_prompts
from diagnostics.core.errors import DiagnosticsError
from diagnostics.models import chat_templates
from diagnostics.models.chat_templates import Template
from tests.conftest import make_tokenizer
from tests.contexts.factories import TEMPLATE, jsonl

QUESTION = [{"role": "user", "content": "w1"}]


def template(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return Template(tokenizer)


def children() -> set[str]:
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return set(file.read().split())


def test_what_comes_back_is_the_librarys_own_rendering():
    ours = template(TEMPLATE)
    told = [{"role": "system", "content": "é \ud83d"}, *QUESTION]
    expected = ours.tokenizer.apply_chat_template(
        told, tokenize=False, add_generation_prompt=True, mark="!"
    )
    assert (
        ours(told, "row 1", add_generation_prompt=True, mark="!")
        == expected
        == "[system]é \ud83d[user]w1[go]!"
    )


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{{ raise_exception('System role not supported') }}", r"\(System role not supported\)"),
        ("{{ nothing.at.all }}", r"\('nothing' is undefined\)"),
        ("{% for %}", r"\(Expected an expression"),
        (
            "{{ ''.__class__.__mro__ }}",
            r"\(access to attribute '__class__' of 'str' object is unsafe",
        ),
        (
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            r"\(maximum recursion depth exceeded",
        ),
        ("{% if x %}" * 3000, r"\(maximum recursion depth exceeded"),
        ("{% include 'x' %}", r"\(no loader"),
        (
            "{% for i in range(9000) %}{{ messages[0].content * 1000 }}{% endfor %}",
            r"\(it writes 18000000 characters, and \d+ are the most\)",
        ),
        ("{{ messages[0].content * 10**11 }}", r"\(it needs more than 2 GiB of memory\)"),
        (
            (
                "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{%"
                " endfor %}"
            ),
            r"\(it needs more than 2 GiB of memory\)",
        ),
    ],
)
def test_a_template_that_fails_is_one_sentence(text, reason):
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^row 1: the chat template does not render this conversation {reason}.*\. Fix that"
            r" row, or choose another template"
        ),
    ):
        template(text)(QUESTION, "row 1")


LOOP = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{%"
    " endfor %}{% endfor %}{% endif %}done"
)


def test_a_template_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    ours, before = template(LOOP), children()
    with pytest.raises(DiagnosticsError, match=r"\(it takes longer than 1 seconds\)"):
        ours([{"role": "user", "content": "loop"}], "row 1")
    assert children() == before
    assert ours(QUESTION, "row 2") == "done"  # in a new process


def test_a_template_that_never_ends_is_asked_twice(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    ours, loop = template(LOOP), [{"role": "user", "content": "loop"}]
    for _ in range(chat_templates.ENOUGH):
        with pytest.raises(DiagnosticsError, match="it takes longer than 1 seconds"):
            ours(loop, "row 1")
    monkeypatch.setattr(chat_templates, "_start", pytest.fail)
    with pytest.raises(DiagnosticsError, match="did not end for 2 short conversations"):
        ours(QUESTION, "row 2")


def test_one_that_waits_is_ended_by_the_clock(monkeypatch):
    """Processor time alone would not see a process that is kept from running."""
    monkeypatch.setattr(chat_templates, "PATIENCE", 0.05)
    with pytest.raises(DiagnosticsError, match="it takes longer than 10 seconds"):
        template(LOOP)([{"role": "user", "content": "loop"}], "row 1")


def test_the_process_ends_with_the_template_that_it_renders():
    before = children()
    ours = template(TEMPLATE)
    ours(QUESTION, "row 1")
    assert len(children() - before) == 1
    del ours
    gc.collect()
    assert children() == before


def test_elsewhere_than_on_linux_it_renders_in_this_process(monkeypatch):
    monkeypatch.setattr(chat_templates.sys, "platform", "darwin")
    before = children()
    assert (
        template(TEMPLATE)(QUESTION, "row 1", add_generation_prompt=True) == "[user]w1[go]"
        and children() == before
    )
    with pytest.raises(DiagnosticsError, match="System role"):
        template("{{ raise_exception('System role not supported') }}")(QUESTION, "row 1")


def test_a_template_that_refuses_a_row_names_the_row(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{%"
        " endif %}" + TEMPLATE
    )
    file = jsonl(
        tmp_path / "p.jsonl",
        {"messages": QUESTION},
        {"messages": [{"role": "system", "content": "w2"}, *QUESTION]},
    )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"p\.jsonl, row 2: the chat template does not render this conversation \(System role"
            r" not supported\)"
        ),
    ):
        load_prompts(file, tokenizer=tokenizer)
