"""The cell of a decision by the divergences that the decision does not rest on."""

import pandas as pd
import pytest

from diagnostics.report import lead
from diagnostics.report.other_measures import other_measures
from diagnostics.report.run_results import RunResults

CELL = {"criterion": "tip", "budget": 0.05, "horizon": 20, "rollouts": "all"}


def row(measure, over, half, verdict, **more):
    numbers = {"over_random": over, "over_random_low": over - half, "over_random_high": over + half}
    cell = {"measure": measure, "verdict": verdict, "primary": measure == "reverse_kl"}
    return CELL | numbers | cell | {"recommended": False} | more


TRAINED = row("reverse_kl", -0.009, 0.016, "cannot tell")
FORWARD = row("forward_kl", 0.0153, 0.0059, "better")
JS = row("js", 0.0003, 0.002, "cannot tell")


@pytest.mark.parametrize(
    "rows, registered, said",
    [
        (
            [TRAINED, FORWARD, JS],
            ("tip", 0.05),
            "Exploratory, tip at 5 % by another measure: by forward KL better than random"
            " (+0.0153 ± 0.0059).",
        ),
        ([TRAINED, JS], ("tip", 0.05), "The verdict on tip at 5 % is the same by JS divergence."),
        ([TRAINED, FORWARD], None, ""),
        ([TRAINED | {"recommended": True}, FORWARD], None, "Exploratory, tip at 5 %"),
        ([TRAINED, FORWARD], ("entropy", 0.05), ""),
        ([TRAINED, FORWARD | {"horizon": 5}], ("tip", 0.05), ""),
        ([TRAINED, FORWARD | {"rollouts": "right"}], ("tip", 0.05), ""),
        ([TRAINED | {"verdict": "not judged"}, FORWARD], ("tip", 0.05), ""),
    ],
)
def test_what_other_measures_say_of_the_cell(rows, registered, said):
    found = other_measures(pd.DataFrame(rows), registered)
    assert found == said if said.endswith(".") or not said else found.startswith(said)


def test_the_page_says_it_beside_how_sure_the_decision_is():
    sizes = {"prompts": 96, "steps": 2, "smallest_detectable": 0.01, "margin": 0.02, "reason": ""}
    table = pd.DataFrame([TRAINED | sizes, FORWARD | sizes])
    table = table.assign(over_full_low=-1.0, over_full_high=1.0, looks=1)
    choices = {"criterion": "tip", "budget": 0.05}
    run = RunResults({"stages": {}, "primary": {"choices": choices}}, {"decision": table})
    assert "TIP at 5 % by another measure: by forward KL better than random" in lead.sure(run)
