import numpy as np
import pandas as pd

from diagnostics.analysis import bounds
from diagnostics.core.schema import SCHEMA, column
from tests.core.test_types import keys


def tokens(**columns):
    return keys(
        teacher_tail_mass=[0.0, 0.2],
        forward_kl=[0.5, 0.7],
        gain=[0.1, 0.2],
        teacher_logprob=[-1.0, np.nan],
        compatibility=[0.9, 0.8],
        bhattacharyya=[np.nan, 0.5],
        student_entropy=[1.0, 2.0],
        compatibility_k4=[0.4, 0.3],
        **columns,
    )


def test_a_teacher_that_was_run_needs_no_word():
    frame = pd.DataFrame({"outcome": ["gain"]})
    plain = keys(gain=[0.1, 0.2], forward_kl=[1.0, 2.0])
    assert (
        not bounds.is_listed(plain)
        and bounds.table(plain).empty
        and bounds.marked({"a": frame}, plain)["a"] is frame
    )


def test_every_measurement_is_gone_through():
    table = bounds.table(tokens()).set_index("measurement")
    assert table.loc["student_entropy", ["exactness", "defined", "exact"]].tolist() == [
        "exact",
        1.0,
        1.0,
    ]
    assert table.loc["forward_kl", ["exactness", "defined", "exact"]].tolist() == [
        "lower bound",
        1.0,
        0.5,
    ]
    assert table.loc["compatibility", ["exactness", "defined", "exact"]].tolist() == [
        "lower bound",
        1.0,
        1.0,
    ]
    assert table.loc["compatibility_k4", ["exactness", "exact"]].tolist() == ["lower bound", 0.5]
    assert table.loc["teacher_logprob", ["exactness", "defined", "exact"]].tolist() == [
        "where listed",
        0.5,
        0.5,
    ]
    assert (
        table.loc["topk_overlap", ["exactness", "defined"]].tolist() == ["impossible", 0.0]
        and table.exactness["topk_overlap_k4"] == "impossible"
    )
    assert (
        table.exactness["gain"] == "change of a bound"
        and "relative_gain" not in table.index
        and "student_dropped_mass" not in table.index
    )
    assert (
        table.exactness["teacher_dropped_mass"] == "impossible"
        and "teacher_tail_mass" not in table.index
    )
    assert set(table.meaning) == set(bounds.MEANING.values())


def test_rows_are_marked_by_what_they_name():
    tables = {
        "correlations": pd.DataFrame(
            {
                "outcome": ["gain", "gain", "gain"],
                "criterion": ["entropy", "teachability", "mine"],
                "estimate": [1, 2, 3],
            }
        ),
        "saturation": pd.DataFrame(
            {
                "measurement": ["student_entropy", "forward_kl", "compatibility_k4"],
                "mean": [1, 2, 3],
            }
        ),
        "nothing": pd.DataFrame({"step_size": [1.0]}),
        "empty": pd.DataFrame({"outcome": []}),
        "numbers": pd.DataFrame({"score": [1.0, 2.0]}),
    }
    made = bounds.marked(tables, tokens())
    assert made["correlations"].exactness.tolist() == [
        "gain: change of a bound",
        "gain: change of a bound; forward_kl: lower bound; compatibility: lower bound",
        "gain: change of a bound",
    ]
    assert made["saturation"].exactness.tolist() == [
        "exact",
        "forward_kl: lower bound",
        "compatibility_k4: lower bound",
    ]
    assert all("exactness" not in made[name] for name in ("nothing", "empty", "numbers"))
    assert bounds.marked(tables, tokens(), otherwise="change of a bound")[
        "nothing"
    ].exactness.tolist() == ["change of a bound"]


def test_the_schema_says_what_each_column_is_worth():
    assert {entry.listed for entry in SCHEMA.values() if entry.stage == "outcome"} == {
        "change of a bound"
    }
    assert {entry.listed for entry in SCHEMA.values() if entry.stage == "key"} == {"exact"}
    assert (
        column("compatibility_k8").listed == "lower bound"
        and column("student_entropy").listed == "exact"
        and column("topk_overlap").listed == "exact"
    )
