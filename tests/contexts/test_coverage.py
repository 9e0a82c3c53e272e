"""Coverage of a student's text by a teacher with another tokenizer, against bytes counted out."""

import json

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diagnostics.contexts.byte_bounds import COLUMNS
from diagnostics.contexts.coverage import MEASURES, tokenizer_coverage
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank, Context
from diagnostics.pipeline.cli import main
from tests.factories import message
from tests.models.test_token_bytes import EOS, TEXT, byte_level, sentence_piece


def explicit(words, merges):
    """A byte-level BPE with these tokens and merges, and an end token at id 0."""
    vocabulary = {token: i for i, token in enumerate([EOS, *words])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


UNBOUNDED = set(MEASURES) - set(COLUMNS)
STUDENT = explicit(["a", "b", "c", "d", "ab"], [("a", "b")])
TEACHER = explicit(["a", "b", "c", "d", "bc"], [("b", "c")])


def behind_a_prompt(tokenizer, text):
    """Ids of a text that goes on behind another: SentencePiece puts no space before it there."""
    whole = tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(whole)
    if tokens[0] == "▁" and tokens[1] in ("\n", "<0x0A>"):
        return tuple(whole[2:])
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def context(tokenizer, text, name="c", *, finished=True, supervised=None):
    ids = behind_a_prompt(tokenizer, text)
    ids += (tokenizer.eos_token_id,) * finished
    return Context(name, f"p-{name}", "?", (1,), text, ids, finished, supervised=supervised)


def shares(found, kind="all"):
    table = found.table[found.table["token_type"] == kind]
    return dict(zip(table["measure"], table["estimate"], strict=True))


def test_a_text_of_four_letters_by_hand():
    """ab|c|d for the student, a|bc|d for the teacher: they meet at 0, 3 and 4."""
    found = tokenizer_coverage(STUDENT, TEACHER, Bank((context(STUDENT, "abcd", finished=False),)))
    assert found.positions["comparable"].tolist() == [True, False, True]
    assert found.positions["teacher_tokens"].tolist() == [0, 0, 1]
    assert shares(found) == pytest.approx(
        {
            "positions_comparable": 2 / 3,
            "sampled_spelled": 1 / 3,
            "sampled_one_token": 1 / 3,
            "vocabulary_one_token": 4 / 5,
        }
    )


def test_a_token_may_be_spelled_by_a_chain():
    """ab|d against a|b|d: ab is two of the teacher's tokens."""
    found = tokenizer_coverage(STUDENT, TEACHER, Bank((context(STUDENT, "abd"),)))
    assert found.positions["teacher_tokens"].tolist() == [2, 1, 1]
    assert shares(found)["sampled_spelled"] == 1.0
    assert shares(found)["sampled_one_token"] == pytest.approx(2 / 3)
    assert shares(found, "special")["sampled_spelled"] == 1.0


def brute_force(student, teacher, ids):
    """Comparable positions and spellings from decoded prefixes, one by one."""
    special = student.eos_token_id
    text = student.decode([i for i in ids if i != special])
    of_teacher = behind_a_prompt(teacher, text)
    starts = [teacher.decode(of_teacher[:n]).encode() for n in range(len(of_teacher) + 1)]
    found = []
    for t in range(len(ids)):
        before, after = (student.decode(ids[:n]).replace(EOS, "").encode() for n in (t, t + 1))
        here = before in starts
        if ids[t] == special:
            found.append((here, 1))
        else:
            both = here and after in starts
            found.append((here, starts.index(after) - starts.index(before) if both else 0))
    return found


@pytest.mark.parametrize(
    "student, teacher",
    [
        (byte_level(330), byte_level(290, TEXT[:1])),
        (byte_level(290, TEXT[2:3]), sentence_piece(330)),
        (sentence_piece(320), byte_level(330)),
    ],
)
def test_positions_and_spellings_are_those_of_decoded_prefixes(student, teacher):
    text = "The answer is 42, and the return is open: add a question."
    one = context(student, text)
    found = tokenizer_coverage(student, teacher, Bank((one,)))
    expected = brute_force(student, teacher, list(one.response_ids))
    assert found.positions["comparable"].tolist() == [here for here, _ in expected]
    assert found.positions["teacher_tokens"].tolist() == [length for _, length in expected]
    assert 0 < shares(found)["positions_comparable"] < 1


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_tokenizer_covers_itself(make):
    tokenizer = make(340)
    bank = Bank(tuple(context(tokenizer, text, str(i)) for i, text in enumerate(TEXT[:3])))
    found = tokenizer_coverage(tokenizer, tokenizer, bank)
    assert (found.positions["teacher_tokens"] == 1).all()
    assert found.positions["comparable"].all()
    assert shares(found)["vocabulary_one_token"] == 1.0


def test_bytes_of_several_tokens_in_one_character():
    student, teacher = byte_level(257 + 1), byte_level(400)
    one = context(student, "a é b", finished=False)  # é is two tokens of one byte each
    found = tokenizer_coverage(student, teacher, Bank((one,)))
    merged = [piece for _, piece in zip(range(99), teacher.tokenize("a é b"))]
    assert len(one.response_ids) == 6
    boundary = "é".encode()[:1].decode("latin-1") in merged
    assert found.positions["comparable"].tolist()[3] == boundary


def test_a_character_that_the_end_cut_is_not_comparable_and_counted(caplog):
    student = byte_level(258)
    ids = tuple(student("a😀", add_special_tokens=False)["input_ids"])[:-1]
    one = Context("c", "p", "?", (1,), "a", ids, False)
    found = tokenizer_coverage(student, byte_level(300), Bank((one,)))
    assert found.positions["comparable"].tolist() == [True, True, False, False]
    assert found.counts == {"undecodable": 2, "rewritten": 0, "unreadable": 0, "over_long": 0}
    assert (
        "2 of 4 positions lie in, or behind, bytes that are no UTF-8: not comparable" in caplog.text
    )


def test_nothing_behind_a_special_token_that_the_teacher_lacks_is_comparable(caplog):
    student, teacher = byte_level(300), byte_level(300, special=("<|other|>",))
    one = context(student, "a b")
    both = Context("c", "p", "?", (1,), "", one.response_ids + one.response_ids[:2], False)
    found = tokenizer_coverage(student, teacher, Bank((both,)))
    ends = both.response_ids.index(student.eos_token_id)
    assert found.positions["comparable"].tolist()[: ends + 1] == [True] * (ends + 1)
    assert not found.positions["comparable"].iloc[ends + 1 :].any()
    assert found.positions["teacher_tokens"].iloc[ends] == 0
    assert found.counts["unreadable"] == 2
    assert "2 of 5 positions lie behind a special token" in caplog.text


def test_text_that_the_teacher_rewrites_is_counted():
    from tokenizers import normalizers

    teacher = byte_level(300)
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = tokenizer_coverage(
        byte_level(258), teacher, Bank((context(byte_level(258), "Ab", finished=False),))
    )
    assert found.counts["rewritten"] == 2 and not found.positions["comparable"].any()


def top_lists(bank, ids, shares):
    return pd.DataFrame(
        {
            "context_id": [one.context_id for one in bank for _ in one.positions],
            "position": [place for one in bank for place in range(len(one.positions))],
            "student_top_ids": [ids] * bank.positions,
            "student_top_p": [shares] * bank.positions,
        }
    )


def test_mass_of_the_students_top_by_hand():
    """ab is a chain of two for the teacher, c one token; positions 0 and 2 are comparable."""
    bank = Bank((context(STUDENT, "abcd", finished=False),))
    ab, c = (STUDENT.convert_tokens_to_ids(word) for word in ("ab", "c"))
    tops = top_lists(bank, [ab, c], [0.5, 0.25])
    found = tokenizer_coverage(STUDENT, TEACHER, bank, tops=tops)
    assert found.positions["top_spelled"].tolist() == [0.75] * 3
    assert shares(found)["top_mass_spelled"] == 1.0
    assert shares(found)["top_mass_one_token"] == pytest.approx(1 / 3)
    assert shares(found)["top_mass"] == pytest.approx(0.75)
    short = tokenizer_coverage(STUDENT, TEACHER, bank, tops=tops, chains=1)
    assert shares(short)["top_mass_spelled"] == pytest.approx(1 / 3)
    table = found.table.set_index(["measure", "token_type"])
    assert table.loc[("top_mass", "all"), "positions"] == 2


def test_positions_without_a_list_count_for_no_mass():
    bank = Bank((context(STUDENT, "abd", finished=False),))
    tops = top_lists(bank, [1], [1.0]).head(1)
    found = tokenizer_coverage(STUDENT, TEACHER, bank, tops=tops)
    assert np.isnan(found.positions["top_mass"].iloc[1])
    assert found.table.set_index("measure").loc["top_mass", "positions"].iloc[0] == 1


def test_shares_have_intervals_over_prompts_and_add_up():
    student, teacher = byte_level(330), byte_level(290, TEXT[:1])
    bank = Bank(
        tuple(context(student, f"The answer {i} is open, add {i}.", str(i)) for i in range(8))
    )
    found = tokenizer_coverage(student, teacher, bank, draws=200)
    table = found.table.set_index(["measure", "token_type"])
    row = table.loc[("positions_comparable", "all")]
    by_hand = found.positions.groupby("prompt_id")["comparable"].agg(["sum", "size"]).sum()
    assert row["estimate"] == pytest.approx(by_hand["sum"] / by_hand["size"])
    assert 0 <= row["low"] <= row["estimate"] <= row["high"] <= 1
    assert row["prompts"] == 8 and row["positions"] == len(found.positions)
    kinds = table.loc["positions_comparable"].drop("all")
    assert kinds["positions"].sum() == row["positions"]
    assert np.average(kinds["estimate"], weights=kinds["positions"]) == pytest.approx(
        row["estimate"]
    )
    one = tokenizer_coverage(student, teacher, Bank(bank.contexts[:1]), draws=200)
    assert np.isnan(one.table["low"]).all() and set(one.table["measure"]) < {
        *MEASURES,
        "vocabulary_one_token",
    }


def test_tokens_that_are_no_positions_are_read_and_not_counted():
    one = context(STUDENT, "abcd", finished=False, supervised=(True, False, True))
    found = tokenizer_coverage(STUDENT, TEACHER, Bank((one,)))
    assert found.positions["position"].tolist() == [0, 1]
    assert found.positions["comparable"].tolist() == [True, True]


def test_what_cannot_be_covered_is_refused():
    bank = Bank((context(STUDENT, "abcd"),))
    assert "Sample longer responses" in message(tokenizer_coverage, STUDENT, TEACHER, Bank(()))
    long = Bank((Context("c", "p", "?", (1,), "", (99,), False),))
    assert message(tokenizer_coverage, STUDENT, TEACHER, long) == (
        "The contexts hold token id 99, and the student's tokenizer has 6 tokens. Name the"
        " tokenizer that wrote them as the student's."
    )
    assert "1 or more; got 0" in message(tokenizer_coverage, STUDENT, TEACHER, bank, chains=0)
    lists = pd.DataFrame({"context_id": ["c"], "position": [0]})
    assert "student_top_ids" in message(tokenizer_coverage, STUDENT, TEACHER, bank, tops=lists)


def test_the_command_reads_a_run_or_a_file(tmp_path, capsys):
    student, teacher = byte_level(330), byte_level(290, TEXT[:1])
    for name, tokenizer in (("student", student), ("teacher", teacher)):
        tokenizer.save_pretrained(tmp_path / name)
    bank = Bank(tuple(context(student, text, str(i)) for i, text in enumerate(TEXT[::2])))
    (tmp_path / "run").mkdir()
    write_parquet(tmp_path / "run" / "contexts.parquet", bank.to_frame())
    write_parquet(tmp_path / "run" / "tops.parquet", top_lists(bank, [70, 300], [0.5, 0.25]))
    pair = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    assert main(["coverage", *pair, "--contexts", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["measure"] for row in told["coverage"]} == {*UNBOUNDED, "vocabulary_one_token"}
    assert told["undecodable"] == 0
    path = str(tmp_path / "run" / "contexts.parquet")
    assert main(["coverage", *pair, "--contexts", path, "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "positions_comparable" in shown and "top_mass" not in shown
