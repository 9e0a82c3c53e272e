"""Right and wrong responses alone: which positions are either's, and what is made of them."""

import numpy as np
import pandas as pd

import diagnostics as dx
from diagnostics.analysis import prompt_groups
from diagnostics.analysis.claims import claim_tables
from diagnostics.analysis.config import Bootstrap, PrimaryChoices
from diagnostics.analysis.prompt_groups import read_studied
from diagnostics.analysis.responses import count_responses, of_responses, too_few
from diagnostics.core.tables import write_parquet
from tests.factories import message
from tests.made_tokens import made_tokens


def by_hand() -> pd.DataFrame:
    """Three responses of two prompts: right, wrong, and not judged."""
    return pd.DataFrame(
        {
            "context_id": ["a", "a", "b", "c"],
            "prompt_id": ["p", "p", "p", "q"],
            "correct": [1.0, 1.0, 0.0, np.nan],
        }
    )


def test_a_side_has_the_rows_of_its_responses_numbered_anew():
    tokens = by_hand()
    assert of_responses(tokens, "right").context_id.tolist() == ["a", "a"]
    wrong = of_responses(tokens, "wrong")
    assert wrong.context_id.tolist() == ["b"] and wrong.index.tolist() == [0]
    assert of_responses(tokens, "all") is tokens


def test_a_prompt_with_both_kinds_counts_on_both_sides():
    found = count_responses(by_hand())
    assert found["right"] == {"prompts": 1, "contexts": 1, "positions": 2}
    assert found["wrong"] == {"prompts": 1, "contexts": 1, "positions": 1}
    assert found["not judged"] == {"prompts": 1, "contexts": 1, "positions": 1}
    unjudged = count_responses(by_hand().drop(columns="correct"))
    assert unjudged["not judged"]["positions"] == 4 and unjudged["right"]["prompts"] == 0


def test_too_few_prompts_are_said_with_their_number():
    assert too_few("right", 20, 20) == ""
    said = "Not judged: 19 prompts have a right response, of at least 20."
    assert too_few("right", 19, 20) == said
    assert "1 prompt has a wrong response" in too_few("wrong", 1, 20)


def test_what_cannot_be_divided_is_refused():
    assert "Unknown responses 'rigth'. Did you mean 'right'?" in message(
        of_responses, by_hand(), "rigth"
    )
    no_right = by_hand().assign(correct=0.0)
    assert "No position is of a right response: 4 of 4 positions are judged" in message(
        of_responses, no_right, "right"
    )
    assert "correct" in message(of_responses, by_hand().drop(columns="correct"), "wrong")


def test_a_study_of_one_side_is_that_of_a_table_without_the_other():
    """Every number to the last bit; only why a verdict is exploratory differs."""
    tokens = made_tokens(24, 8, seed=3)
    order = tokens.context_id.unique()
    tokens["correct"] = tokens.context_id.map({name: i % 3 > 0 for i, name in enumerate(order)})
    alone = tokens[tokens.correct].reset_index(drop=True)
    tokens["correct"] = tokens["correct"].astype(float)
    how = {"draws": 10, "criteria": ["teachability", "random"]}
    side, expected = dx.study(tokens, responses="right", **how), dx.study(alone, **how)
    assert list(side) == list(expected)
    for name, table in side.items():
        other = expected[name]
        if name == "verdicts":
            said = table["exploratory"].astype(bool)
            assert said.all()
            assert table["sentence"].str.contains("the right responses alone").all()
            table, other = (one.drop(columns="sentence") for one in (table, other))
        if name == "warnings":
            assert not table["message"].str.contains("no primary choices were recorded").any()
            table, other = (one[one["code"] != "exploratory"] for one in (table, other))
        pd.testing.assert_frame_equal(table, other, check_exact=True)


def test_what_was_registered_is_of_all_responses():
    tokens = made_tokens(24, 8).assign(correct=1.0)
    choices = PrimaryChoices()
    sealed = {"choices": choices, "registered": choices.sha256(), "base_k": 16}
    how = {"bootstrap": Bootstrap(draws=5), **sealed}
    whole = claim_tables(tokens, **how)["verdicts"]
    side = claim_tables(tokens, responses="right", **how)["verdicts"]
    assert not whole[whole.primary].exploratory.all()
    assert side.exploratory.all()


def test_a_long_table_is_sampled_from_the_side_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_groups, "STUDIED", 60)
    monkeypatch.setattr(prompt_groups, "LEAST_PROMPTS", 10)
    tokens = made_tokens(40, 8)
    order = tokens.context_id.unique()
    tokens["correct"] = tokens.context_id.map({n: float(i % 2) for i, n in enumerate(order)})
    write_parquet(tmp_path / "tokens.parquet", tokens)
    found = read_studied(tmp_path / "tokens.parquet", 0, correct=1.0)
    alone = tokens[tokens.correct == 1].reset_index(drop=True)
    write_parquet(tmp_path / "alone.parquet", alone)
    expected = read_studied(tmp_path / "alone.parquet", 0)
    pd.testing.assert_frame_equal(found, expected)
    assert 0 < len(found) < len(alone)
