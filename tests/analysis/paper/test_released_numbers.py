"""Every number of the released scripts, once more by this project's functions, from one fixture.

The fixture lies in `tests/files/released`; the variable RELEASED_FIXTURE names the folder of
another one with the same file names. Nothing here depends on the fixture's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.bootstrap import winsorize
from diagnostics.analysis.paper import (
    gap,
    interventions,
    reachability,
    section3,
    support,
    topn,
    within_q3,
)
from diagnostics.analysis.paper.bank import ScriptTable, column_at, released_gain, script_table
from tests.analysis.paper import released_names as names
from tests.analysis.paper.released_fixture import FOLDER, ReleasedFixture

TOLERANCE = 1e-9
SECTIONS = (
    "gain",
    "section3",
    "topn",
    "support_definition",
    "within_q3",
    "interventions",
    "reachability",
)
INPUTS = ("topn_hashes", "_about")
"""Parts of the expected numbers that are none: part of the seeds, and where they come from."""
FIRST_OF_SETS = "compares the first elements that two sets of ids happen to give"
ORDER_OF_EQUALS = (
    "an interval over contexts numbered in the order in which an unstable sort leaves equals"
)


@dataclass(frozen=True)
class Between:
    """A number that a choice among equals decides."""

    least: float
    greatest: float


@dataclass(frozen=True)
class NotDetermined:
    """A number that the definitions leave open, with the reason."""

    why: str


Found = dict[str, "float | Between | NotDetermined"]


@pytest.fixture(scope="module")
def fixture() -> ReleasedFixture:
    return ReleasedFixture(FOLDER)


@pytest.fixture(scope="module")
def found(fixture) -> dict[str, Found]:
    """Our numbers by section and path."""
    functions = {
        "gain": of_gain,
        "section3": of_section3,
        "topn": of_topn,
        "support_definition": of_support_definition,
        "within_q3": of_within_q3,
        "interventions": of_interventions,
        "reachability": of_reachability,
    }
    return {name: dict(function(fixture)) for name, function in functions.items()}


def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, float]]:
    """Paths and numbers of nested dictionaries; null is NaN."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", math.nan if value is None else float(value)


def named(path: str, row: dict | pd.Series, theirs: dict[str, str]) -> Iterator[tuple[str, float]]:
    """The numbers of a row of ours under their names."""
    for ours, name in theirs.items():
        yield f"{path}/{name}", float(row[ours])


def supports(fixture: ReleasedFixture, section: str) -> Iterator[int]:
    """The K of a section."""
    return (int(name.removeprefix("k")) for name in fixture.expected[section])


# --- our numbers, section by section


def of_gain(fixture):
    for k in supports(fixture, "gain"):
        statistics = gap.gain_statistics(fixture.tokens, k=k)
        yield from {
            f"k{k}/q3_tokens": statistics.positions,
            f"k{k}/bootstrap_mean_diff": statistics.gap.estimate,
            f"k{k}/bootstrap_ci_low": statistics.gap.low,
            f"k{k}/bootstrap_ci_high": statistics.gap.high,
            f"k{k}/matching_pairs": statistics.matched.pairs,
            f"k{k}/matching_mean_diff": statistics.matched.mean,
            f"k{k}/matching_median_diff": statistics.matched.median,
            f"k{k}/r2_HD": statistics.r_squared,
            f"k{k}/delta_r2_C": statistics.gained_by_compatibility,
            f"k{k}/delta_r2_split": statistics.gained_by_split,
        }.items()


def of_section3(fixture):
    theirs = {ours: name for name, ours in names.SCORES.items()}
    terms = {ours: name for name, ours in names.TERMS.items()}
    for k in supports(fixture, "section3"):
        table = script_table(fixture.tokens, k=k)
        yield from named(f"k{k}/robust_gain", section3.robust_gain(table).iloc[0], names.ROBUST)
        for row in section3.bucket_gains(table).to_dict("records"):
            place = f"{names.REGIONS[row['region']]}/{theirs[row['score']]}/{row['bucket']}"
            yield from named(f"k{k}/buckets/{place}", row, names.BUCKET)
        for row in section3.residual_bins(table).to_dict("records"):
            place = f"{theirs[row['score']]}/{row['bucket']}"
            yield from named(f"k{k}/residual_bins/{place}", row, names.RESIDUAL)
        for row in section3.regressions(table).to_dict("records"):
            model = f"{names.OUTCOMES[row['winsorized']]}/{names.MODELS[row['model']]}"
            yield f"k{k}/regression/{model}/{terms[row['term']]}", row["coefficient"]
            yield f"k{k}/regression/{model}/r2", row["r_squared"]
        proxies = section3.support_proxies(fixture.tokens, k=k)
        rows = section3.support_gaps(table, proxies).set_index("proxy")
        for name, ours in names.PROXIES.items():
            yield from named(f"k{k}/support/{name}", rows.loc[ours], names.SUPPORT)


def of_topn(fixture):
    ours = {ours: name for name, ours in names.SELECTORS.items()}
    for k in supports(fixture, "topn"):
        table, rows = selections(fixture, k, "random")
        y = winsorize(table.gain, 0.01)
        columns = {
            "mean": y,
            "q3_share": table.in_q3.astype(float),
            "entropy": table.entropy,
            "divergence": table.divergence,
            "compatibility": table.compatibility,
        }
        for row in rows:
            path, n = f"k{k}/{row['budget']:g}/{ours[row['selector']]}", row["positions"]
            numbers = dict(named(path, row, names.TOP))
            if row["selector"] != "random":
                score = table.score(row["selector"])
                if row["tied"] > row["taken"]:
                    for column, name in names.TOP_MEANS.items():
                        ties = topn.under_ties(score, columns[column], n)
                        numbers[f"{path}/{name}"] = Between(ties.least, ties.greatest)
                    share = n / len(table)
                    numbers[f"{path}/gain_per_keep_ratio"] = Between(
                        row["least"] / share, row["greatest"] / share
                    )
                if has_equals(score, n):
                    for end in ("low", "high"):
                        numbers[f"{path}/ci_{end}"] = NotDetermined(ORDER_OF_EQUALS)
            yield from numbers.items()


def selections(fixture, k: int, order: topn.Order) -> tuple[ScriptTable, list[dict]]:
    """The exact selections at one K, with the seeds of the fixture's run."""
    table = script_table(fixture.tokens, compatibility="after", k=k)
    hashes = fixture.expected["topn_hashes"]
    salts = {names.SELECTORS[name]: int(salt) for name, salt in hashes.items()}
    return table, topn.top_gains(table, k=k, salts=salts, order=order).to_dict("records")


def has_equals(score: np.ndarray, count: int) -> bool:
    """Whether two of the best scores are equal, or the best one left equals the last."""
    best = np.sort(score)[::-1][: count + 1]
    return len(np.unique(best)) < len(best)


def of_support_definition(fixture):
    for k in supports(fixture, "support_definition"):
        proxies = {
            name: fixture.tokens[column_at(fixture.tokens, ours, k, "after")]
            for name, ours in names.DEFINED_PROXIES.items()
        }
        if k == fixture.tokens.attrs["k"]:
            of_lists = names.LISTED_PROXIES.items()
            proxies |= {name: fixture.tokens[f"{ours}_after"] for name, ours in of_lists}
            for name in names.DEFINITION.values():
                yield f"k{k}/top1_match/{name}", NotDetermined(FIRST_OF_SETS)
        for row in support.support_definitions(fixture.tokens, proxies).to_dict("records"):
            yield from named(f"k{k}/{row['proxy']}", row, names.DEFINITION)


def of_within_q3(fixture):
    theirs = {ours: name for name, ours in names.SCORES.items()}
    ks = sorted({int(path.split("/")[0]) for path in fixture.expected["within_q3"]})
    tables = within_q3.within_q3(fixture.tokens, ks=ks)
    for row in tables["buckets"].to_dict("records"):
        label = names.QUARTILES[row["bucket"]] if row["buckets"] > 1 else "all"
        path = f"{row['k']}/bucket/{theirs[row['score']]}/{label}"
        yield from named(path, row, names.QUARTILE_BUCKET)
    for row in tables["gaps"].to_dict("records"):
        yield from named(f"{row['k']}/high_low/{theirs[row['score']]}", row, names.QUARTILE_GAP)


def of_interventions(fixture):
    theirs = {ours: name for name, ours in names.MASKS.items()}
    trained = interventions.trainings(fixture.tokens, fixture.cells, fixture.kept)
    number = trained.groupby("criterion")["seed"].rank().astype(int)
    for run, row in zip(number, trained.to_dict("records")):
        yield from named(f"{theirs[row['criterion']]}/{run}", row, names.TRAINING)
    for row in interventions.over_seeds(trained).to_dict("records"):
        for statistic in ("mean", "sd"):
            name = names.OVER_SEEDS.get((row["quantity"], statistic))
            if name:
                yield f"{theirs[row['criterion']]}/aggregate/{name}", row[statistic]


def of_reachability(fixture):
    bank = fixture.bank
    ours = {"C_norm": fixture.scores["compatibility"]}
    proxies = {name: ours.get(name, bank.get(name)) for name in fixture.expected["reachability"]}
    rows = reachability.reachability(
        fixture.scores["entropy"],
        fixture.scores["divergence"],
        bank["reach_t1"] == 1,
        bank["sample_index"],
        proxies,
    )
    for row in rows.to_dict("records"):
        yield from named(row["proxy"], row, names.REACH)


# --- the comparison


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_of_a_section_is_computed_again(fixture, found, section):
    wrong = [
        f"{path}: the script has {want}, here {found[section].get(path, 'nothing')}"
        for path, want in leaves(fixture.expected[section])
        if not agrees(want, found[section].get(path))
    ]

    assert not wrong, "\n".join([f"{len(wrong)} numbers differ", *wrong[:20]])


def agrees(want: float, have) -> bool:
    if have is None:
        return False
    if isinstance(have, NotDetermined):
        return True
    if isinstance(have, Between):
        return have.least - TOLERANCE <= want <= have.greatest + TOLERANCE
    return (math.isnan(want) and math.isnan(have)) or abs(want - have) <= TOLERANCE


@pytest.mark.parametrize("section", [name for name in SECTIONS if name != "interventions"])
def test_no_row_is_made_that_the_scripts_do_not_have(fixture, found, section):
    theirs = {path for path, _ in leaves(fixture.expected[section])}
    ours = {
        path
        for path, have in found[section].items()
        if not (isinstance(have, float) and math.isnan(have))
    }

    assert ours <= theirs


def test_the_comparison_notices_a_number_that_is_off_by_a_millionth(fixture, found):
    for section in SECTIONS:
        for path, want in leaves(fixture.expected[section]):
            have = found[section][path]
            if isinstance(have, Between):
                assert not agrees(have.greatest + 1e-6, have), path
            elif not isinstance(have, NotDetermined):
                assert not agrees(want + 1e-6 if math.isfinite(want) else 0.0, have), path


def test_every_expected_number_is_compared_once_and_what_is_left_open_is_named(fixture, found):
    assert set(fixture.expected) == {*SECTIONS, *INPUTS}
    expected = {
        f"{section}/{path}" for section in SECTIONS for path, _ in leaves(fixture.expected[section])
    }
    ours = {
        f"{section}/{path}": have for section in SECTIONS for path, have in found[section].items()
    }
    kinds = {path: type(ours[path]).__name__ for path in expected}
    open_ones = {path: ours[path].why for path in expected if kinds[path] == "NotDetermined"}
    exact = [path for path in expected if kinds[path] not in ("NotDetermined", "Between")]
    bounded = [path for path in expected if kinds[path] == "Between"]
    print(
        f"\n{len(expected)} numbers: {len(exact)} to {TOLERANCE:g}, {len(bounded)} within the range"
        f" that ties leave, {len(open_ones)} not determined"
    )

    assert len(exact) + len(bounded) + len(open_ones) == len(expected)
    assert set(open_ones.values()) <= {FIRST_OF_SETS, ORDER_OF_EQUALS}
    # Ties are a matter of the exact selections alone, and sets of ids of one proxy alone.
    assert all(path.startswith("topn/") for path in bounded)
    assert all(
        path.startswith("topn/") and path.rpartition("/")[2] in ("ci_low", "ci_high")
        if why == ORDER_OF_EQUALS
        else path.split("/")[2] == "top1_match"
        for path, why in open_ones.items()
    )
    of_other_sections = sum(not path.startswith("topn/") for path in expected)
    assert len(exact) > of_other_sections - len(names.DEFINITION)


def test_with_the_scripts_own_sort_exact_selections_agree_to_the_last_interval(fixture):
    """The unstable sort of another machine may leave equals in another order. Then a tied mean
    differs, and the intervals cannot be expected to agree.
    """
    ours = {ours: name for name, ours in names.SELECTORS.items()}
    expected = dict(leaves(fixture.expected["topn"]))
    numbers, tied = {}, []
    for k in supports(fixture, "topn"):
        _, rows = selections(fixture, k, "script")
        for row in rows:
            path = f"k{k}/{row['budget']:g}/{ours[row['selector']]}"
            numbers |= dict(named(path, row, names.TOP))
            tied += [f"{path}/mean_G"] if row["tied"] > row["taken"] else []
    if any(abs(numbers[path] - expected[path]) > TOLERANCE for path in tied):
        pytest.skip("this machine's unstable sort orders equals otherwise than the fixture's did")

    assert numbers.keys() == expected.keys()
    assert [path for path in expected if not agrees(expected[path], numbers[path])] == []


# --- the training code's bank, and the columns of the files


def test_the_training_banks_scores_and_quadrants_are_computed_again(fixture):
    for theirs, ours in names.BANK_SCORES.items():
        assert np.abs(fixture.bank[theirs] - fixture.scores[ours]).max() <= TOLERANCE, theirs
    quadrant = fixture.bank["quadrant"].str.slice(1, 2).astype(int)
    assert (quadrant.to_numpy() == fixture.scores["quadrant"].to_numpy()).all()


def test_every_training_mask_keeps_the_same_positions(fixture):
    columns = [name for name in fixture.bank if name.startswith("keep_")]
    wrong = {}
    for column in columns:
        minimum = 0 if column.startswith("keep_nomin_") else 1
        mask, _, budget = column.removeprefix("keep_").removeprefix("nomin_").rpartition("_")
        kept = fixture.mask(names.MASKS[mask], float(budget), minimum=minimum)
        wrong[column] = int((kept != (fixture.bank[column] == 1)).sum())

    assert {
        column.removeprefix("keep_").removeprefix("nomin_").rpartition("_")[0] for column in columns
    } == set(names.MASKS)
    assert {column: count for column, count in wrong.items() if count} == {}


def test_the_gain_of_the_files_is_the_gain_of_the_table(fixture):
    assert np.array_equal(fixture.trained["G_KLf"].to_numpy(), released_gain(fixture.tokens))
