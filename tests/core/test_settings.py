"""Fields of configuration objects as keywords: signature, help, merging and refusals."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import diagnostics as dx
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.settings import with_settings


@dataclasses.dataclass(frozen=True)
class Step:
    loss: str = dataclasses.field(default="kl", metadata={"help": "the loss", "choices": ("kl",)})
    size: float = 0.5

    def __post_init__(self):
        if self.size < 0:
            raise DiagnosticsError(f"size is {self.size}.")


@dataclasses.dataclass(frozen=True)
class Cells:
    names: tuple[str, ...] = ("a",)


@with_settings(step=Step, cells=Cells)
def take(pair: int, step: Step = Step(), cells: Cells = Cells(), *, tokens=None, **settings: Any):
    """Take a step.

    Args:
        pair: A number.
    """
    assert not settings
    return pair, step, cells, tokens


def test_defaults_are_those_of_the_dataclass():
    assert take(3) == take(3, None) == (3, Step(), Cells(), None)


def test_keywords_replace_fields_of_what_was_passed():
    assert take(3, Step(loss="other"), size=2, tokens=4) == (3, Step("other", 2), Cells(), 4)
    assert take(pair=3, cells=Cells(("x",)), loss="jsd")[1:3] == (Step("jsd"), Cells(("x",)))


def test_a_list_stands_for_a_tuple_and_one_text_for_a_list_of_one():
    assert take(1, names=["b", "c"])[2] == Cells(("b", "c"))
    assert take(1, names=(name for name in "bc"))[2] == Cells(("b", "c"))
    assert take(1, names="bc")[2].names == ("bc",)


def test_the_dataclass_checks_its_values():
    with pytest.raises(DiagnosticsError, match=r"^size is -1\.$"):
        take(1, size=-1)


def test_an_unknown_keyword_names_the_nearest():
    with pytest.raises(
        DiagnosticsError, match=r"^take\(\) takes no setting 'los'\. Did you mean 'loss'\?$"
    ):
        take(1, los="kl")
    with pytest.raises(
        DiagnosticsError,
        match=r"^take\(\) takes no setting 'zzz'\. Known are pair, step, cells, tokens, loss, s",
    ):
        take(1, zzz=1)


def test_another_object_is_refused():
    with pytest.raises(
        DiagnosticsError,
        match=r"^step takes a Step; got 'kl'\. Pass Step\(\.\.\.\), or its fields as keywords\.$",
    ):
        take(1, "kl")


def test_a_missing_or_doubled_argument_is_a_type_error():
    with pytest.raises(TypeError, match="missing a required argument: 'pair'"):
        take()
    with pytest.raises(TypeError, match="multiple values for argument 'pair'"):
        take(1, pair=1)


def test_signature_and_help_show_every_field():
    signature = inspect.signature(take)
    assert list(signature.parameters) == [
        "pair",
        "step",
        "cells",
        "tokens",
        "loss",
        "size",
        "names",
    ]
    assert signature.parameters["size"].default == 0.5
    assert signature.parameters["size"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["size"].annotation is float
    assert signature.parameters["step"].default is None
    assert "    loss: the loss. One of kl. Field of `step` (Step), default 'kl'." in take.__doc__
    assert take.__doc__.startswith("Take a step.\n\nArgs:\n    pair: A number.")


def test_a_name_may_not_mean_two_things():
    with pytest.raises(ValueError, match="duplicate parameter name: 'size'"):

        @with_settings(step=Step)
        def twice(step: Step = Step(), *, size=1, **settings): ...


@pytest.mark.parametrize(
    "name", ["probe", "score", "score_with_tops", "intervene", "interventions", "attribute"]
)
def test_public_functions_show_their_settings(name):
    """Real keywords with the dataclass's defaults, and every one of them documented."""
    function = getattr(dx, name)
    parameters = inspect.signature(function).parameters
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    assert "batch_tokens" in parameters
    if name not in ("score", "score_with_tops"):
        assert parameters["loss"].default == "reverse_kl" and parameters["seed"].default == 0
    missing = [each for each in parameters if f"    {each}: " not in function.__doc__]
    assert not missing
