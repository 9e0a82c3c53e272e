"""The tests of the pages draw them whole."""

import pytest

from tests import outlines


@pytest.fixture(autouse=True, scope="module")
def whole_pages():
    """Figures are laid out and drawn."""
    with outlines.instead(outlines.WHOLE):
        yield


@pytest.fixture
def in_outline():
    """A test that asks which figures there are, and not how they look."""
    with outlines.instead(outlines.OUTLINES):
        yield
