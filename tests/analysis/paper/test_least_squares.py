"""Least squares of the released scripts."""

import numpy as np
import pytest

from diagnostics.analysis.paper.least_squares import fit


def test_a_line_is_found():
    x = np.array([0.0, 1.0, 2.0])
    found = fit(2 * x + 1, [x])

    assert found.coefficients == pytest.approx([2]) and found.r_squared == pytest.approx(1)
    assert found.residual == pytest.approx(np.zeros(3), abs=1e-12)


def test_residuals_are_orthogonal_to_every_term():
    rng = np.random.default_rng(0)
    y, terms = rng.normal(size=50), list(rng.normal(size=(3, 50)))
    found = fit(y, terms)

    assert [term @ found.residual for term in (np.ones(50), *terms)] == pytest.approx(
        np.zeros(4), abs=1e-10
    )
    assert found.r_squared == pytest.approx(1 - found.residual.var() / y.var())


def test_of_dependent_terms_the_shortest_solution_is_taken():
    x = np.array([-1.0, 0.0, 1.0])
    found = fit(4 * x, [x, x])

    assert found.coefficients == pytest.approx([2, 2]) and found.r_squared == pytest.approx(1)


def test_a_constant_outcome_has_no_explained_share():
    assert np.isnan(fit(np.ones(4), [np.arange(4.0)]).r_squared)
