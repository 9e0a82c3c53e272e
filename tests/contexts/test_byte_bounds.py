"""Bounds over bytes of two models with different tokenizers, against every way to write a text."""

import json
import math

import numpy as np
import pytest
import torch

from diagnostics.contexts import byte_bounds
from diagnostics.contexts.byte_bounds import (
    COLUMNS,
    END,
    SPECIAL,
    Spellings,
    apart,
    least_kl,
    unit_bounds,
)
from diagnostics.contexts.coverage import tokenizer_coverage
from diagnostics.core.tables import write_parquet
from diagnostics.core.types import Bank, Context
from diagnostics.models.readout import Readout
from diagnostics.models.token_bytes import TokenBytes
from diagnostics.pipeline.cli import main
from tests.conftest import make_model
from tests.contexts.test_coverage import STUDENT, TEACHER, context, explicit
from tests.models.test_token_bytes import EOS, TEXT, byte_level, sentence_piece


def spellings(tokenizer, size=None):
    return Spellings(TokenBytes(tokenizer), size or len(tokenizer))


def spread(tokenizer, **shares):
    """Probabilities [V] by the names of tokens; `end` is the end token."""
    p_V = np.zeros(len(tokenizer))
    for name, share in shares.items():
        word = EOS if name == "end" else name
        p_V[tokenizer.convert_tokens_to_ids(word)] = share
    return p_V


# --- by hand


def test_a_string_of_two_letters_by_hand():
    """The student's likeliest token is ab. The teacher writes it as a, then b: from 0 to q(a)."""
    q_V = spread(TEACHER, a=0.3, b=0.2, bc=0.1, end=0.4)
    low, high, part = spellings(TEACHER).intervals(q_V, [b"ab"])
    assert low.tolist() == pytest.approx([0.0, 0.7]) and part == pytest.approx(0.3)
    assert high.tolist() == pytest.approx([0.3, 1.0])
    low, high, part = spellings(TEACHER).intervals(q_V, [b"b", END])
    assert low.tolist() == high.tolist() == pytest.approx([0.3, 0.4, 0.3]) and part == 0


def test_bounds_at_a_position_by_hand():
    """Units b and end: q is 0.3, 0.4 and 0.3 in the bucket, p 0.5, 0.25 and 0.25."""
    p_V = spread(STUDENT, b=0.5, end=0.25, a=0.15, c=0.1)
    q_V = spread(TEACHER, a=0.3, b=0.2, bc=0.1, end=0.4)
    found = unit_bounds(spellings(STUDENT), spellings(TEACHER), p_V, q_V, k=2)
    q, p = (0.3, 0.4, 0.3), (0.5, 0.25, 0.25)
    forward = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    assert found == pytest.approx((0.7, 0.7, forward, reverse))


def test_a_loose_interval_bounds_less():
    """ab in place of b: q is at most 0.3 and p at least 0.5, the nearest ends."""
    p_V = spread(STUDENT, ab=0.5, end=0.25, c=0.25)
    q_V = spread(TEACHER, a=0.3, b=0.2, bc=0.1, end=0.4)
    least, most, forward, _ = unit_bounds(spellings(STUDENT), spellings(TEACHER), p_V, q_V, k=2)
    assert (least, most) == pytest.approx((0.4, 0.7))
    ab = 0.3 * math.log(0.3 / 0.5) - 0.3 + 0.5
    end = 0.4 * math.log(0.4 / 0.25) - 0.4 + 0.25
    rest = 0.3 * math.log(0.3 / 0.25) - 0.3 + 0.25  # its interval is [0.3, 0.6]
    assert forward == pytest.approx(ab + end + rest)


def test_strings_that_begin_with_another_are_one_unit():
    assert apart([b"the", b"t", b"a", END, b"tea", b"a"]) == [b"a", b"t", END]
    assert apart([b"\xff", END, SPECIAL + b"x"]) == [b"\xff", END, SPECIAL + b"x"]


def test_intervals_that_meet_bound_nothing_and_apart_ones_are_the_kl():
    q, p = np.array([0.2, 0.8]), np.array([0.6, 0.4])
    exact = float((q * np.log(q / p)).sum())
    assert least_kl((q, q), (p, p)) == pytest.approx(exact)
    assert least_kl((q, q), (q, q)) == 0.0
    assert least_kl((q - 0.1, q + 0.5), (p - 0.1, p + 0.3)) == 0.0
    assert least_kl((np.array([0.0]), np.array([0.0])), (p[:1], p[:1])) == pytest.approx(0.6)
    assert least_kl((q[:1], q[:1]), (np.zeros(1), np.zeros(1))) == math.inf


def test_wider_intervals_never_bound_more():
    rng = np.random.default_rng(0)
    for _ in range(200):
        q, p = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
        widths = rng.uniform(0, 0.1, size=(4, 5))
        exact = float((q * np.log(q / p)).sum())
        loose = least_kl((q - widths[0], q + widths[1]), ((p - widths[2]).clip(0), p + widths[3]))
        assert -1e-12 <= loose <= exact + 1e-12


def test_special_tokens_are_the_same_by_name_or_as_the_end():
    other = explicit(["a", "b"], [])
    other.add_special_tokens({"additional_special_tokens": ["<|x|>"]})
    found = spellings(other)
    assert found.unit(other.eos_token_id) == END
    assert found.unit(other.convert_tokens_to_ids("<|x|>")) == SPECIAL + b"<|x|>"
    p_V = np.array([0.1, 0.2, 0.3, 0.4])
    alone = unit_bounds(found, spellings(STUDENT), p_V, spread(STUDENT, a=0.5, end=0.5), k=4)
    # the teacher has no <|x|>, whose mass belongs to the bucket
    q, p = (0.5, 0.0, 0.5), (0.2, 0.3, 0.1)
    assert alone[0] == pytest.approx(1.0)
    assert alone[2] == pytest.approx(
        sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a)
        + 0.4  # the bucket: q is 0, p 0.4
        - sum(q)
        + sum(p)
    )


# --- against every way to write a string


def chance(model, tokens, ids, unit):
    """Probability that a model's text goes on with these bytes: every sequence of tokens that
    writes them, followed one token at a time; or that it ends.
    """
    with torch.no_grad():
        p_V = model(torch.tensor([list(ids)])).logits[0, -1].double().softmax(-1).tolist()
    if unit == END:
        return p_V[tokens.tokenizer.eos_token_id]
    total = 0.0
    for token_id in range(len(tokens)):
        piece = tokens.of(token_id)
        if token_id in tokens.special or not piece:
            continue
        if piece.startswith(unit):
            total += p_V[token_id]
        elif unit.startswith(piece):
            total += p_V[token_id] * chance(model, tokens, (*ids, token_id), unit[len(piece) :])
    return total


PAIRS = [
    (byte_level(290), byte_level(275, TEXT[:1])),
    (byte_level(280, TEXT[2:3]), sentence_piece(300)),
    (sentence_piece(300), byte_level(280)),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_bounds_hold_the_chances_of_bytes(student, teacher):
    tokenizers = student, teacher
    models = [
        make_model(seed, vocabulary=len(each), layers=1)
        for seed, each in zip((1, 2), tokenizers, strict=True)
    ]
    one = context(student, "The ans", finished=False)
    bank = Bank((Context("c", "p", "a", (5, 6), "", one.response_ids, False),))
    found = tokenizer_coverage(
        *tokenizers, bank, models=tuple(Readout(model) for model in models), k=3
    )
    rows = found.positions
    assert rows["comparable"].any()
    for row, t in zip(rows.itertuples(), range(len(rows)), strict=True):
        if not row.comparable:
            assert all(math.isnan(getattr(row, name)) for name in COLUMNS)
            continue
        text = b"".join(TokenBytes(student).of(i) for i in one.response_ids[:t])
        written = TokenBytes(teacher).encode(text)
        ids = (
            (5, 6, *one.response_ids[:t]),
            (*byte_bounds.teacher_prompt_ids(teacher, bank[0]), *(i for i, _ in written)),
        )
        with torch.no_grad():
            p_V = models[0](torch.tensor([list(ids[0])])).logits[0, -1].double().softmax(-1)
        top = p_V.topk(3).indices.tolist()
        units = apart([spellings(student).unit(i) for i in top])
        p, q = (
            [chance(model, TokenBytes(each), own, unit) for unit in units]
            for model, each, own in zip(models, tokenizers, ids, strict=True)
        )
        assert row.compatibility_least <= math.fsum(q) + 1e-6
        assert row.compatibility_most >= math.fsum(q) - 1e-6
        q, p = [*q, 1 - sum(q)], [*p, 1 - sum(p)]
        forward = sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))
        reverse = sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        assert -1e-9 <= row.forward_kl_least <= forward + 1e-6
        assert -1e-9 <= row.reverse_kl_least <= reverse + 1e-6


def test_one_tokenizer_gives_the_exact_values():
    """Two models of one tokenizer, and units that no shorter token begins: the bounds are exact."""
    models = [make_model(seed, vocabulary=260, layers=1) for seed in (1, 2)]
    tokenizer = byte_level(257)  # single bytes and the end
    one = context(tokenizer, "abc", finished=False)
    bank = Bank((Context("c", "p", "a", (5,), "", one.response_ids, False),))
    found = tokenizer_coverage(
        tokenizer, tokenizer, bank, models=tuple(map(Readout, models)), k=8
    ).positions
    prompt = byte_bounds.teacher_prompt_ids(tokenizer, bank[0])
    with torch.no_grad():
        p_TV, q_TV = (
            model(torch.tensor([[*before, *one.response_ids]])).logits[0].double().softmax(-1)
            for model, before in zip(models, ((5,), prompt), strict=True)
        )
    for t, row in enumerate(found.itertuples()):
        p_V, q_V = p_TV[t], q_TV[len(prompt) - 1 + t]
        top = p_V.topk(8).indices
        top = top[top < 257]
        q, p = (torch.cat([x[top], (1 - x[top].sum())[None]]) for x in (q_V, p_V))
        assert row.compatibility_least == pytest.approx(float(q[:-1].sum()), abs=1e-6)
        assert row.compatibility_most == pytest.approx(row.compatibility_least)
        assert row.forward_kl_least == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-6)
        assert row.reverse_kl_least == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_a_context_beyond_a_window_is_not_bounded_and_counted(caplog):
    tokenizer = byte_level(258)
    models = [make_model(seed, vocabulary=258, layers=1) for seed in (1, 2)]
    bank = Bank((context(tokenizer, "a" * 300, finished=False),))
    found = tokenizer_coverage(tokenizer, tokenizer, bank, models=tuple(map(Readout, models)))
    assert found.counts["over_long"] == 300 and found.positions[COLUMNS[0]].isna().all()
    assert "300 of 300 positions are beyond a model's window: not bounded" in caplog.text


def test_the_command_runs_both_models_where_it_is_asked_to(tmp_path, capsys):
    for name, tokenizer in (("student", PAIRS[0][0]), ("teacher", PAIRS[0][1])):
        tokenizer.save_pretrained(tmp_path / name)
        make_model(1, vocabulary=len(tokenizer), layers=1).save_pretrained(tmp_path / name)
    bank = Bank((context(PAIRS[0][0], "The answer is 42", finished=False),))
    write_parquet(tmp_path / "contexts.parquet", bank.to_frame())
    pair = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    where = ["--contexts", str(tmp_path / "contexts.parquet"), "--device", "cpu", "--json"]
    assert main(["coverage", *pair, *where, "--k", "4"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["measure"]: row for row in told["coverage"] if row["token_type"] == "all"}
    assert set(COLUMNS) <= set(rows)
    assert rows["compatibility_least"]["estimate"] <= rows["compatibility_most"]["estimate"] <= 1
    comparable = rows["positions_comparable"]
    assert rows["forward_kl_least"]["positions"] == round(
        comparable["estimate"] * comparable["positions"]
    )
