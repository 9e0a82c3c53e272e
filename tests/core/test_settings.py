"""Settings objects whose fields are keywords as well."""

import dataclasses
import inspect

import pytest

from diagnostics.core.settings import with_settings


@dataclasses.dataclass(frozen=True)
class Shape:
    """Two settings with defaults."""

    sides: int = 4
    names: tuple = dataclasses.field(default_factory=lambda: ("a",))


@with_settings(Shape)
def draw(x, *, shape: Shape = Shape(), **more):
    """Return everything that arrived."""
    return x, shape, more


def test_a_field_may_be_given_as_a_keyword_and_the_rest_keeps_its_default():
    assert draw(1) == (1, Shape(), {})
    assert draw(1, sides=5, other=2) == (1, Shape(sides=5), {"other": 2})


def test_a_keyword_replaces_the_field_of_a_given_object():
    given = Shape(sides=3, names=("b",))
    assert draw(1, shape=given) == (1, given, {})
    assert draw(1, shape=given, sides=6)[1] == Shape(sides=6, names=("b",))


def test_the_signature_shows_the_fields_with_their_defaults():
    shown = inspect.signature(draw).parameters
    assert list(shown) == ["x", "shape", "sides", "names", "more"]
    assert shown["sides"].default == 4
    assert shown["names"].default == ("a",)
    assert draw.__doc__ == "Return everything that arrived."


def test_a_function_without_such_an_object_is_refused():
    with pytest.raises(
        TypeError, match=r"^plain has 0 parameters with a Shape for a default; give it one\.$"
    ):

        @with_settings(Shape)
        def plain(x):
            return x
