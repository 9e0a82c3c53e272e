"""The probe's step beside the decision's steps."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.report import lead, page, two_steps
from diagnostics.report.markdown import markdown
from diagnostics.report.run_results import RunResults
from tests.report import made_tables

PROBE = {
    "optimizer": "adamw",
    "step_size": 9e-4,
    "update_norm": 0.026,
    "relative_norm": 0.00058,
    "gradient_norm": 1.2,
    "folds": 6,
}
INTERVENE = {"optimizer": "adamw", "horizon_rate": 1e-6, "minibatch": 16}


def run_of(probe=PROBE, intervene=INTERVENE, table=None, **tables):
    facts = {"rollout": {"contexts": 192, "pair": "custom"}, "probe": probe, "intervene": intervene}
    stages = {
        name: {"settings": {}, "facts": found, "inputs": {}, "files": {}}
        for name, found in facts.items()
        if found is not None
    }
    table = made_tables.decision() if table is None else table
    return RunResults({"format": 1, "stages": stages}, {"decision": table} | tables)


def test_both_steps_are_read_from_the_manifest():
    probe, decision = two_steps.two_steps(run_of()).to_dict("records")
    assert probe["learning_rate"] == 9e-4 and probe["update_norm"] == 0.026
    assert (probe["optimizer"], probe["steps"], probe["contexts"]) == ("AdamW", 1, 32)
    assert (decision["learning_rate"], decision["steps"], decision["contexts"]) == (1e-6, 20, 16)
    assert np.isnan(decision["update_norm"])


def test_the_norm_of_the_decisions_steps_is_the_mean_of_the_selections_at_their_horizon():
    cells = {"criterion": ["full", "full", "tip", "tip"], "budget": [1.0, 1.0, 0.05, 0.05]}
    norms = {"horizon": [0, 20, 20, 20], "update_norm": [9.0, 0.04, 0.12, 0.12]}
    taken = pd.DataFrame(cells | norms)  # a selection has a row for each group and measure
    run = run_of(intervention=taken)
    _, decision = two_steps.two_steps(run).to_dict("records")
    assert decision["update_norm"] == pytest.approx(0.08)
    assert decision["relative_norm"] == pytest.approx(0.08 * 0.00058 / 0.026)
    said = dict(two_steps.in_words(two_steps.two_steps(run)))["norm of the update"]
    assert said == [
        "0.026 (0.058 % of the weights’)",
        "0.08 (0.18 % of the weights’) in the mean of the selections",
    ]


def test_the_sentence_says_what_rests_on_which_and_how_far_apart_the_rates_are():
    assert two_steps.meaning(two_steps.two_steps(run_of())) == (
        "Correlations, captured shares and claims say what the probe’s one step does; which"
        " criterion to train with rests on the other 20 steps, at a rate 900 times lower, so that"
        " the one need not foresee the other."
    )
    same = run_of(intervene=INTERVENE | {"horizon_rate": 9e-4})
    assert two_steps.meaning(two_steps.two_steps(same)).endswith("20 steps, at the same rate.")
    faster = run_of(intervene=INTERVENE | {"horizon_rate": 2.7e-3})
    assert "at a rate 3 times higher" in two_steps.meaning(two_steps.two_steps(faster))


def test_a_step_of_sgd_has_the_rate_that_its_norm_and_gradient_give():
    sgd = PROBE | {"optimizer": "sgd", "step_size": 0.006, "gradient_norm": 1.2}
    table = two_steps.two_steps(run_of(probe=sgd))
    assert table["learning_rate"].tolist() == pytest.approx([0.005, 1e-6])
    assert table["optimizer"].tolist() == ["SGD", "AdamW"]
    assert "of another optimizer" in two_steps.meaning(table)


def test_a_decision_on_one_matched_step_says_that_it_foresees_nothing():
    table = made_tables.decision()
    one = table.assign(horizon=0)
    found = two_steps.two_steps(run_of(table=one))
    assert found["learning_rate"].tolist() == [9e-4, 9e-4]
    assert two_steps.meaning(found).startswith("Both rest on one step of the same norm")


def test_what_is_not_recorded_is_left_out_or_said_to_be():
    assert two_steps.two_steps(run_of(probe=None))["step"].tolist() == ["decision"]
    assert two_steps.meaning(two_steps.two_steps(run_of(probe=None))) == ""
    assert two_steps.two_steps(run_of(probe={}, intervene=None)).empty
    cells = dict(two_steps.in_words(two_steps.two_steps(run_of())))
    assert cells["norm of the update"] == ["0.026 (0.058 % of the weights’)", "not recorded"]
    assert cells["learning rate"] == ["9e-04", "1e-06"]
    assert cells["steps"] == ["1 on each fold", "20"]


def test_page_and_markdown_and_terminal_have_both_rates():
    run = run_of()
    assert lead.taken_at(run).startswith("Learning rate 1e-06 (the probe's: 9e-04), ")
    shown = page.page(run, {}, {})
    assert "<td>9e−4</td><td>1e−6</td>" in shown and ">the decision’s steps</th>" in shown
    assert "| learning rate | 9e−4 | 1e−6 |" in markdown(run, {}, {})
    line = two_steps.in_short(two_steps.two_steps(run), "the default")
    assert line == (
        "the decision rests on 20 of AdamW at rate 1e-06 (training's default, small as its effects;"
        " set yours: --learning-rate), 16 contexts each; correlations and claims on the probe's one"
        " of AdamW at rate 9e-04"
    )
    assert page.steps_beside(run_of(probe=None)) == ""
