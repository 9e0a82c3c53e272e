"""Log-probabilities that came with a bank: under which names, in which forms, for which tokens."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts import sampled_logprobs
from diagnostics.contexts.import_rollouts import freeze_rollouts, read_rollouts
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank
from diagnostics.pipeline.cli import main
from tests.conftest import make_bank
from tests.contexts.factories import jsonl

PLAIN = {"prompt_ids": [0, 7], "response_ids": [8, 9, 10]}


@pytest.mark.parametrize(
    "value",
    [
        [-1.0, -2.0, -3.0],
        np.array([-1.0, -2.0, -3.0]),
        [[-1.0, 8, " x"], [-2.0, 9, None], [-3.0, 10]],
        [{"8": -1.0, "4": -0.5}, {"9": {"logprob": -2.0, "rank": 3}}, {"10": {"logprob": -3.0}}],
        {"token_logprobs": [-1.0, -2.0, -3.0], "tokens": ["a", "b", "c"]},
        {"content": [{"token": "a", "logprob": lp} for lp in (-1.0, -2.0, -3.0)]},
    ],
)
def test_every_form_gives_a_number_per_token(value):
    assert sampled_logprobs.read(value, [8, 9, 10]) == (-1.0, -2.0, -3.0)


def test_gaps_are_nan_and_rounding_above_zero_is_zero():
    first, second, third = sampled_logprobs.read([None, 1e-7, -3.0], [8, 9, 10])
    assert math.isnan(first) and (second, third) == (0.0, -3.0)


@pytest.mark.parametrize(
    "value",
    [
        [-1.0, -2.0],
        [-1.0, -2.0, 0.5],
        [None, None, None],
        [True, -1.0, -1.0],
        ["-1", "-2", "-3"],
        [[-1.0, 8], [-2.0, 8], [-3.0, 10]],
        [{"8": -1.0}, {"7": -1.0}, {"10": -1.0}],
        [{}, {}, {}],
        {"text": "x"},
        "-1",
    ],
)
def test_what_belongs_to_no_token_is_not_taken(value):
    assert sampled_logprobs.read(value, [8, 9, 10]) is None


def test_the_values_of_the_kept_tokens():
    values = (-1.0, -2.0, -3.0, -4.0)
    assert sampled_logprobs.of_kept(values, (2, 8, 9, 2), (8, 9)) == (-2.0, -3.0)
    masked = sampled_logprobs.of_kept(values, (7, 8, 9, 2), (7, 8, 9), (True, False, True, True))
    assert (masked[0], masked[2]) == (-1.0, -3.0) and math.isnan(masked[1])
    assert sampled_logprobs.of_kept(values, (7, 8, 9, 2), (8, 7)) is None


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"logprobs": [-1.0, -2.0, -3.0]},
        PLAIN | {"rollout_log_probs": [-1.0, -2.0, -3.0]},
        {"tokens": [0, 7, 8, 9, 10], "response_length": 3, "rollout_log_probs": [-1.0, -2.0, -3.0]},
        {"input": "w3", "output": "w4 w5 w6", "rollout_log_probs": [-1.0, -2.0, -3.0]},
        PLAIN | {"sampled_logprobs": json.dumps([-1.0, -2.0, -3.0])},
    ],
    ids=["plain", "named", "slime", "verl", "json"],
)
def test_imports_carry_them(pair, tmp_path, row):
    bank, counts = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", row))
    assert bank[0].response_ids == (8, 9, 10)
    assert bank[0].sampled_logprobs == (-1.0, -2.0, -3.0)
    assert counts["logprobs"] == 1 and counts["logprobs_unplaced"] == 0


def test_padding_takes_its_values_along(pair, tmp_path):
    row = {
        "prompt_ids": [0, 7],
        "response_ids": [2, 8, 9, 1, 1],
        "logprobs": [-9.0, -1.0, -2.0, -3.0, -9.0],
    }
    bank = read_rollouts(pair, jsonl(tmp_path / "r.jsonl", row))
    assert bank[0].response_ids == (8, 9, 1) and bank[0].sampled_logprobs == (-1.0, -2.0, -3.0)


def test_values_that_fit_no_token_are_counted_and_the_context_stays(pair, tmp_path, caplog):
    rows = [PLAIN | {"logprobs": [-1.0]}, PLAIN | {"response_ids": [8, 9], "logprobs": None}]
    bank, counts = freeze_rollouts(pair, jsonl(tmp_path / "r.jsonl", *rows))
    assert [context.sampled_logprobs for context in bank] == [None, None]
    assert counts["logprobs_unplaced"] == 1 and "log-probabilities are not one per" in caplog.text


def test_a_table_keeps_them_and_a_bank_without_has_no_column(pair, tmp_path):
    row = PLAIN | {"logprobs": [-1.0, None, -3.0]}
    bank = read_rollouts(pair, jsonl(tmp_path / "r.jsonl", row, PLAIN | {"prompt_ids": [0, 9]}))
    frame = bank.to_frame()
    frame.to_parquet(tmp_path / "c.parquet")
    again = Bank.from_frame(pd.read_parquet(tmp_path / "c.parquet"))
    np.testing.assert_equal(again[0].sampled_logprobs, bank[0].sampled_logprobs)
    assert again[1].sampled_logprobs is None
    assert "sampled_logprobs" not in make_bank([3]).to_frame()
    with pytest.raises(DiagnosticsError, match="has 1 values in sampled_logprobs and 3 response"):
        Bank.from_frame(frame.assign(sampled_logprobs=[[-1.0], [-1.0]]))


@pytest.mark.slow
def test_a_run_of_such_a_bank_has_the_engine_check(pair, folders, finished, tmp_path):
    """The engine sampled at temperature 0.7 here, by construction from the student's own logits."""
    import torch

    from diagnostics.core.types import read_bank

    rows = []
    for context in read_bank(finished / "contexts.parquet"):
        with torch.no_grad():
            logits = pair.student.model(input_ids=torch.tensor([context.ids])).logits[0].double()
        ln_p = (logits / 0.7).log_softmax(-1)
        first = len(context.prompt_ids) - 1
        values = [ln_p[first + t, i].item() for t, i in enumerate(context.response_ids)]
        row = {"prompt_ids": context.prompt_ids, "response_ids": context.response_ids}
        rows.append(row | {"prompt_id": context.prompt_id, "logprobs": values})
    rollouts = jsonl(tmp_path / "rollouts.jsonl", *rows)
    run = ["--device", "cpu", "--quiet", "--output-dir", str(tmp_path / "out")]
    assert main(["rollout", *folders[:4], "--rollouts", str(rollouts), *run]) == 0
    for command in ("score", "probe"):
        assert main([command, *folders[:4], *run]) == 0
    analyze = ["analyze", "--draws", "50", "--quiet", "--output-dir", str(tmp_path / "out")]
    assert main(analyze) == 0
    tables = tmp_path / "out" / "tables"
    check = pd.read_csv(tables / "engine_check.csv")
    causes = pd.read_csv(tables / "engine_causes.csv").set_index("cause")
    assert (
        check.loc[0, "mean_absolute"] > 0.1 and len(pd.read_csv(tables / "engine_worst.csv")) == 20
    )
    assert causes.loc["temperature", "parameter"] == pytest.approx(0.7, abs=0.1)
    warned = pd.read_csv(tables / "warnings.csv")
    assert "engine_mismatch" in set(warned["code"])
    assert not (finished / "tables" / "engine_check.csv").exists()
