"""The definition of support: percentile ranks, the decomposition and the gap of d*c."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper import support
from diagnostics.analysis.paper.bank import released_gain
from tests.analysis.paper.checkpoint_tokens import checkpoint_tokens, quantile
from tests.factories import message


@pytest.fixture(scope="module")
def tokens():
    return checkpoint_tokens(14, 20)


def test_a_definition_equals_a_loop(tokens):
    proxy = tokens["compatibility_after"].to_numpy()
    row = support.support_definitions(tokens, {"mass": proxy}, draws=40).iloc[0]
    h, d, ht, c = (
        pd.Series(np.asarray(column)).rank().to_numpy() / len(tokens)
        for column in (tokens.student_entropy, tokens.forward_kl, tokens.teacher_entropy, proxy)
    )
    place = (tokens["position"] / (tokens["response_length"] - 1)).to_numpy()
    y = released_gain(tokens)

    def fitted(columns):
        z = [(x - x.mean()) / x.std() for x in [*columns, y]]
        design = np.column_stack([np.ones(len(y)), *z[:-1]])
        beta = np.linalg.lstsq(design, z[-1])[0]
        return beta[1:], 1 - np.mean((z[-1] - design @ beta) ** 2)

    base, split = fitted([h, d, h * d, place, ht]), fitted([h, d * c, d * (1 - c), place, ht])
    assert row["r_squared"] == pytest.approx(base[1])
    assert row["r_squared_gained"] == pytest.approx(split[1] - base[1])
    assert [row["teachability"], row["incompatible"]] == pytest.approx(split[0][1:3])

    inside = (h <= quantile(list(h), 0.5)) & (d >= quantile(list(d), 0.5))
    score = d * c
    low, high = (quantile(list(score[inside]), share) for share in (0.25, 0.75))
    bottom, top = inside & (score <= low), inside & (score >= high)
    assert (row["bottom"], row["top"]) == (bottom.sum(), top.sum())
    assert row["gap"] == pytest.approx(y[top].mean() - y[bottom].mean())

    outer = np.flatnonzero(bottom | top)
    context = tokens["context_id"].to_numpy()
    names, rng, draws = list(dict.fromkeys(context[outer])), np.random.default_rng(17), []
    for _ in range(40):
        taken = [names[i] for i in rng.integers(0, len(names), len(names))]
        rows = np.concatenate([outer[context[outer] == name] for name in taken])
        if top[rows].any() and bottom[rows].any():
            draws.append(y[rows][top[rows]].mean() - y[rows][bottom[rows]].mean())
    assert [row["low"], row["high"]] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_only_the_order_of_a_proxy_matters(tokens):
    proxy = tokens["compatibility_after"].to_numpy() + 0.1
    rows = support.support_definitions(tokens, {"one": proxy, "other": proxy**3}, draws=10)

    one, other = rows.drop(columns=["proxy", "proxy_mean", "proxy_sd"]).to_numpy()
    assert one == pytest.approx(other)
    assert rows["proxy_mean"].to_numpy() == pytest.approx([proxy.mean(), (proxy**3).mean()])


def test_a_constant_proxy_splits_nothing(tokens):
    row = support.support_definitions(tokens, {"one": np.ones(len(tokens))}, draws=5).iloc[0]

    # d*c and d*(1 - c) are one column then, and share its coefficient.
    assert row["teachability"] == pytest.approx(row["incompatible"])


def test_a_gap_in_a_column_is_refused(tokens):
    proxy = np.r_[np.nan, np.ones(len(tokens) - 1)]
    assert message(support.support_definitions, tokens, {"mass": proxy}).startswith(
        f"mass is not finite at 1 of {len(tokens)} positions"
    )
    lacking = tokens.assign(teacher_entropy=np.nan)
    assert message(support.support_definitions, lacking, {}).startswith("teacher_entropy is not")
