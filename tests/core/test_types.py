"""Prompts, contexts and banks as nouns and as tables."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import diagnostics
from diagnostics.core import types
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank, Context, read_bank, write_bank
from tests.conftest import make_bank
from tests.counted_memory import counted_memory


def test_bank_survives_the_table():
    bank = make_bank([3, 1])
    assert Bank.from_frame(bank.to_frame()) == bank
    assert bank.positions == 4 and bank[0].ids == bank[0].prompt_ids + bank[0].response_ids


def test_a_bank_shows_a_summary_and_escapes_its_text():
    one = Context("c0", "p0", "<b>why</b>", (0, 5), "because <i>", (6, 7, 1), True)
    text = Bank((one, Context("c1", "p0", "x", (0,), "y", (4,), False)))._repr_html_()
    assert (
        text == "<p>2 contexts of 1 prompts, 4 response positions, 1 ended by themselves.</p>"
        "<p>c0: <i>&lt;b&gt;why&lt;/b&gt;</i> because &lt;i&gt;</p>"
    )
    assert Bank(())._repr_html_() == "<p>A bank without contexts.</p>"


def test_bank_survives_parquet(tmp_path):
    bank = make_bank([3, 1])
    bank.to_frame().to_parquet(tmp_path / "contexts.parquet", index=False)
    assert read_bank(tmp_path / "contexts.parquet") == bank


def test_a_bank_in_parts_is_the_bank_whatever_its_first_contexts_lack(tmp_path, monkeypatch):
    plain = make_bank([2, 1, 3, 2])
    known = {"correct": True, "domain": "code", "sampled_logprobs": (-0.5, float("nan"), -1.0)}
    hinted = {"teacher_prompt": "hint", "teacher_prompt_ids": (1, 2)}
    told = replace(plain[2], supervised=(True, False, True), **known, **hinted)
    for bank in (plain, Bank((*plain.contexts[:2], told, plain[3]))):
        whole = write_bank(tmp_path / "whole.parquet", bank).read_bytes()
        assert whole == write_parquet(tmp_path / "one.parquet", bank.to_frame()).read_bytes()
        monkeypatch.setattr(types, "CONTEXTS_TOGETHER", 2)
        path = write_bank(tmp_path / "parts.parquet", bank)
        monkeypatch.undo()
        assert pq.read_metadata(path).num_row_groups == 2
        assert repr(read_bank(path).contexts) == repr(bank.contexts)
        assert str([vars(c) for c in read_bank(path)]) == str([vars(c) for c in bank])


def test_a_bank_is_written_and_read_a_part_at_a_time(tmp_path, monkeypatch):
    """Per further token of a response 30 bytes; in one part a bank takes 50."""
    monkeypatch.setattr(types, "CONTEXTS_TOGETHER", 50)

    def peak(contexts):
        path, bank = tmp_path / f"{contexts}.parquet", make_bank([60] * contexts)
        with counted_memory() as counted:
            write_bank(path, bank)
            assert read_bank(path) == bank
        return counted.bytes

    peak(50)  # what is made once
    small, large = peak(200), peak(600)
    assert (large - small) / (400 * 60) < 30


def test_equal_token_ids_are_one_object():
    bank = Bank.from_frame(make_bank([40, 40]).to_frame().map(deepcopy))
    large = [i for context in bank for i in context.ids]
    assert len({id(i) for i in large}) == len(set(large)) and set(map(type, large)) == {int}


@pytest.mark.parametrize("value", [np.array([]), [True], "False", None, float("nan"), pd.NA, 2])
def test_finished_is_true_or_false(value):
    frame = make_bank([3]).to_frame().astype({"finished": object})
    frame.at[0, "finished"] = value
    with pytest.raises(
        DiagnosticsError, match=r"^A context is finished or not: true or false; found "
    ):
        Bank.from_frame(frame)
    for known in (True, np.True_, 1, 1.0, False, np.False_, 0):
        frame.at[0, "finished"] = known
        assert Bank.from_frame(frame)[0].finished is bool(known)


def test_repeated_context_is_refused():
    frame = pd.concat([make_bank([2]).to_frame()] * 2)
    with pytest.raises(
        DiagnosticsError,
        match=r"^context_id 'c0' appears more than once\. Give every context its own id\.$",
    ):
        Bank.from_frame(frame)


@pytest.mark.parametrize(
    "first",
    [
        "diagnostics",
        "diagnostics.probing.one_step, diagnostics.criteria, diagnostics.analysis.rank_agreement",
    ],
)
def test_functions_named_like_their_module_can_be_called_again_and_again(first):
    """`dx.probe` is a function until something imports the module of that name, which then stands
    in its place.
    """
    code = (
        f"import {first}; import diagnostics as dx\n"
        "print(len(dx.list_criteria()) == len(dx.list_criteria()) > 10)\n"
        "for f in (dx.probe, dx.probe, dx.agreement, dx.agreement):\n    try: f()\n   "
        " except TypeError as e: print('missing' in str(e))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
        ).stdout.split()
        == ["True"] * 5
    )


def test_import_is_light():
    code = "import sys, diagnostics; print('torch' in sys.modules, 'pandas' in sys.modules)"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    ).stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = diagnostics.nothing
