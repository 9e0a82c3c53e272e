"""How a bootstrap is set: one object, or its three fields as keywords."""

import dataclasses
import inspect

import numpy as np
import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.analysis.bootstrap import PromptClusters
from diagnostics.analysis.config import AnalysisConfig, Bootstrap, PrimaryChoices
from diagnostics.core.errors import DiagnosticsError
from tests.made_tokens import made_tokens

PUBLIC = (
    "agreement",
    "compare",
    "correlate",
    "q3_contrast",
    "q3_groups",
    "selection_curves",
    "selection_overlap",
    "selection_profile",
    "selection_summary",
    "study",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_show_one_object_and_its_fields(name):
    shown = inspect.signature(getattr(dx, name)).parameters
    assert "Bootstrap" in str(shown["bootstrap"].annotation)
    fields = dataclasses.asdict(Bootstrap())
    assert {field: shown[field].default for field in fields} == fields


def test_the_flags_and_the_object_share_their_defaults():
    assert dataclasses.asdict(Bootstrap()) == {**dataclasses.asdict(AnalysisConfig()), "seed": 0}


def test_the_object_and_its_keywords_give_the_same_numbers():
    tokens, whole = made_tokens(6, 10), Bootstrap(draws=7, level=0.8, seed=3)
    pd.testing.assert_frame_equal(
        dx.correlate(tokens, bootstrap=whole), dx.correlate(tokens, draws=7, level=0.8, seed=3)
    )
    first, second = (
        PromptClusters(list("aabb"), **options).weights
        for options in ({"bootstrap": whole}, {"draws": 7, "seed": 3})
    )
    np.testing.assert_array_equal(first, second)


# primary choices


def test_choices_are_hashed_whatever_their_order():
    default = PrimaryChoices()
    assert len(default.sha256()) == 64
    assert PrimaryChoices.parse(default.as_text()) == default == PrimaryChoices.parse(None)
    assert PrimaryChoices.parse("").sha256() == default.sha256()
    other = PrimaryChoices.parse(" budget=0.1 , horizon=5")
    assert (other.budget, other.horizon) == (0.1, 5) and other.sha256() != default.sha256()
    assert PrimaryChoices.parse("horizon=5,budget=0.1") == other


@pytest.mark.parametrize(
    "text, said",
    [
        ("shape=1", "got 'shape=1'. Names, each at most once: outcome, population, criterion"),
        ("budget", "got 'budget'"),
        ("budget=0.1,budget=0.2", "got 'budget=0.2'"),
        ("budget=much", "budget takes float; got 'much'"),
        ("budget=0", r"budget=0.0 \(above 0, at most 1\)"),
        ("minimum_prompts=19", r"minimum_prompts=19 \(20 or more\)"),
        ("outcome=gain", "another has no null to fail against"),
        ("population=all,margin=1", r"population='all' \(held_out or step\); margin=1.0"),
    ],
)
def test_choices_that_cannot_be_are_refused(text, said):
    with pytest.raises(DiagnosticsError, match=said):
        PrimaryChoices.parse(text)
