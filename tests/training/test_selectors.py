"""Short trainings under the paper's masks: which cells, on which prompts, and what they leave."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper.cells import (
    KEPT,
    TRAINING,
    read_cells,
    stand_in,
    with_student,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Bank, read_bank
from diagnostics.pipeline.cli import main
from diagnostics.probing.folds import assign_folds
from diagnostics.probing.frozen_bank import FrozenBank
from diagnostics.training import selectors
from diagnostics.training.grid import TrainingCell
from diagnostics.training.run import EngineConfig, TrainConfig, train
from diagnostics.training.selectors import (
    SelectorConfig,
    SelectorJob,
    divide,
    half_prompts,
    kept_positions,
    run_selectors,
    shared_settings,
)
from tests.conftest import make_pair

# --- which trainings


def test_the_trainings_are_those_of_the_three_tables():
    cells = SelectorConfig().cells()
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 56 and names[28] == "teachability-0.01-seed1"
    assert names[:6] == [
        "teachability-0.01-seed0",
        "teachability-0.03-seed0",
        "teachability-0.05-seed0",
        "teachability-0.1-seed0",
        "divergence-0.03-seed0",
        "divergence-0.05-seed0",
    ]
    assert {cell.criterion for cell in cells} == {
        *("teachability", "divergence", "incompatible", "tip", "random"),
        *("teachability_entropy", "entropy", "q3", "q3_compatibility", "q3_compatibility_low"),
        *("q3_teachability", "q3_teachability_low", "q3_incompatible"),
    }


def test_an_alias_and_a_repeated_budget_name_one_training():
    config = SelectorConfig(masks=("dlearn_high", "teachability", "q3"), budgets=(0.2, 0.2))
    assert [cell.name for cell in config.cells()][:6] == [
        *(f"teachability-{budget}-seed0" for budget in (0.01, 0.03, 0.05, 0.1, 0.2)),
        "q3-0.2-seed0",
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"seeds": 1},
            (
                r"^The trainings need masks, a worker and at least 2 seeds, since one training has"
                r" no spread; got 13, 2 and 1\.$"
            ),
        ),
        ({"masks": ()}, r"^The trainings need masks, .*; got 0, 2 and 2\.$"),
        (
            {"masks": ("tip", "full")},
            r"^'full' keeps every position, so it is no mask\. Leave it out of --masks\.$",
        ),
        ({"masks": ("q4",)}, r"^Unknown criterion 'q4'\. Known are "),
        ({"curve": (0.0,)}, r"^A budget is a share of positions in \(0, 1\]; got 0\.0\.$"),
    ],
)
def test_trainings_that_cannot_be_asked_for(options, message):
    with pytest.raises(DiagnosticsError, match=message):
        SelectorConfig(**options)


def test_what_was_kept_is_a_mean_over_positions_not_steps():
    """Step 1 keeps 2 of 20 positions, step 2 keeps 4 of 40, step 3 keeps 3 of 15, none in Q3."""
    metrics = pd.DataFrame(
        {
            "selected": [2, 4, 3],
            "positions": [20, 40, 15],
            "q3/selected": [0.5, 1.0, 0.0],
            "score_teachability/selected": [0.1, 0.4, np.nan],
            "score_incompatible/selected": [0.0, 0.0, 0.3],
            "score_compatibility/selected": [np.nan, np.nan, np.nan],
        }
    )
    found = kept_positions(metrics)
    assert list(found) == list(KEPT)
    assert found["kept_share"] == pytest.approx(9 / 75)
    assert found["q3_share"] == pytest.approx((1 + 4) / 9)
    assert found["mean_teachability"] == pytest.approx((0.2 + 1.6) / 6)
    assert found["mean_incompatible"] == pytest.approx(0.9 / 9)
    assert np.isnan(found["mean_compatibility"])


# --- a run with contexts and scores, and its trainings


@pytest.fixture(scope="module")
def scored(folders, tmp_path_factory):
    """A run directory of the tiny pair: 16 contexts, scored at K = 4 and 2."""
    directory = tmp_path_factory.mktemp("scored")
    pair, prompts = folders
    where = ["--output-dir", str(directory)]
    assert main(["rollout", *pair, *prompts, "--max-new-tokens", "8", *where]) == 0
    assert main(["score", *pair, "--k", "4", "--sweep", "2", *where]) == 0
    return directory


CONFIG = SelectorConfig(
    masks=("teachability", "q3"),
    budgets=(0.2,),
    curve=(),
    steps=3,
    batch=4,
    learning_rate=1e-3,
    workers=1,
)


def job_of(scored, folders, folder, config=CONFIG, **changes):
    pair = dict(zip(("student", "teacher"), (folders[0][1], folders[0][3]), strict=True))
    bank = read_bank(scored / "contexts.parquet")
    usual = {
        "folder": folder,
        "pair": pair | {"device": "cpu"},
        "prompts": {},
        "evaluation": {},
        "grid": shared_settings(config, bank, k=4, sweep=(2,)),
        "run": scored,
    }
    return SelectorJob(**usual | changes)


@pytest.fixture(scope="module")
def trained(scored, folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "paper" / "cells"
    run_selectors(job_of(scored, folders, folder), CONFIG)
    return folder


@pytest.mark.slow
def test_cells_hold_every_position_after_every_training(trained, scored):
    cells, kept = read_cells(trained)
    tokens = pd.read_parquet(scored / "scores.parquet")
    assert list(cells.columns) == [
        *("criterion", "budget", "seed", "context_id", "position"),
        *("forward_kl_after", "reverse_kl_after", "student_entropy_after"),
        *("compatibility_after", "compatibility_k2_after", "seen"),
    ]
    assert len(cells) == 4 * len(tokens) and cells.notna().all(axis=None)
    for _, one in cells.groupby(list(TRAINING)):
        assert one["context_id"].tolist() == tokens["context_id"].tolist()
        assert one["position"].tolist() == tokens["position"].tolist()
    assert (cells["compatibility_k2_after"] <= cells["compatibility_after"] + 1e-12).all()
    assert list(kept.columns) == [*TRAINING, *KEPT] and len(kept) == 4
    assert (kept.loc[kept.criterion == "q3", "q3_share"] == 1).all()
    assert kept.loc[kept.criterion == "teachability", "kept_share"].between(0.2, 0.3).all()


def test_each_position_is_seen_by_one_seed_and_new_to_the_other(trained, scored):
    cells, _ = read_cells(trained)
    tokens = pd.read_parquet(scored / "scores.parquet")
    half = assign_folds(tokens, 2, seed=0)
    for (_, _, seed), one in cells.groupby(list(TRAINING)):
        assert (one["seen"].to_numpy() == (half == seed % 2)).all()
    numbers = tokens.assign(half=half).groupby("half")["prompt_id"].nunique()
    assert numbers.tolist() == [8, 8]


def test_a_cell_is_the_training_that_its_settings_say(trained, scored, tmp_path):
    """Trained by hand on the half's prompts alone, and scored by the frozen bank."""
    cells, _ = read_cells(trained)
    bank = read_bank(scored / "contexts.parquet")
    tokens = pd.read_parquet(scored / "scores.parquet")
    rows = tokens[["context_id"]].assign(half=assign_folds(tokens, 2, seed=0))
    half = dict(zip(rows["context_id"], rows["half"], strict=True))
    pair = make_pair()
    prompts = half_prompts(bank, rows, 1, pair)
    assert [prompt.prompt_id for prompt in prompts] == [
        context.prompt_id for context in bank if half[context.context_id] == 1
    ]
    train(
        pair,
        prompts,
        output_dir=tmp_path,
        config=TrainConfig(
            criterion="q3", budget=0.2, seed=1, steps=3, batch=4, learning_rate=1e-3, k=4
        ),
        engine=EngineConfig(max_new_tokens=8, save_every=0),
    )
    pair.student.model.eval()
    forward, reverse = FrozenBank(pair, bank).divergences()
    one = cells[(cells.criterion == "q3") & (cells.seed == 1)]
    np.testing.assert_allclose(one["forward_kl_after"], forward, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one["reverse_kl_after"], reverse, rtol=0, atol=1e-6)
    assert np.abs(one["forward_kl_after"].to_numpy() - tokens["forward_kl"]).max() > 1e-3


@pytest.mark.slow
def test_an_interrupted_command_goes_on_with_equal_bytes(
    trained, scored, folders, tmp_path, monkeypatch
):
    done, original = [], selectors.train_cell

    def counting(job, cell):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cell.name)
        return original(job, cell)

    folder = tmp_path / "cells"
    monkeypatch.setattr(selectors, "train_cell", counting)
    with pytest.raises(KeyboardInterrupt):
        run_selectors(job_of(scored, folders, folder), CONFIG)
    monkeypatch.setattr(
        selectors, "train_cell", lambda job, cell: done.append(cell.name) or original(job, cell)
    )
    (folder / ".training-q3-0.2-seed1").mkdir()
    run_selectors(job_of(scored, folders, folder), CONFIG)
    assert done == [cell.name for cell in CONFIG.cells()]
    for path in trained.glob("*.parquet"):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert not list(folder.glob(".training-*"))
    # A table that was cut is noticed, and only that training is done again.
    table = folder / "q3-0.2-seed0.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"q3-0\.2-seed0\.parquet of the training \{'criterion': 'q3', .*\} is not as it was"
            r" written\. Give `paper --train` again: the training is then done anew\.$"
        ),
    ):
        read_cells(folder)
    done.clear()
    run_selectors(job_of(scored, folders, folder), CONFIG)
    assert done == ["q3-0.2-seed0"]
    assert table.read_bytes() == (trained / table.name).read_bytes()
    # More seeds keep the cells that are there.
    done.clear()
    wider = SelectorConfig(**asdict(CONFIG) | {"seeds": 3, "masks": ("q3",)})
    run_selectors(job_of(scored, folders, folder, wider), wider)
    assert done == ["q3-0.2-seed2"]
    cells, kept = read_cells(folder, names=["q3-0.2-seed2"])
    assert set(cells["seed"]) == {2} and kept["seed"].tolist() == [2]
    seen = read_cells(folder, names=["q3-0.2-seed0"])[0]["seen"]
    assert cells["seen"].tolist() == seen.tolist()  # seeds 0 and 2 know the same half
    other = SelectorConfig(**asdict(CONFIG) | {"steps": 4})
    with pytest.raises(
        DiagnosticsError, match=r"was trained with other settings \(steps: was 3, now 4\)"
    ):
        run_selectors(job_of(scored, folders, folder, other), other)


@pytest.mark.slow
def test_two_workers_write_what_one_does(trained, scored, folders, tmp_path):
    config = SelectorConfig(**asdict(CONFIG) | {"workers": 2})
    run_selectors(job_of(scored, folders, tmp_path / "cells", config), config)
    for path in trained.glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "cells" / path.name).read_bytes(), path.name


def test_every_prompt_of_a_half_is_trained_on(scored, folders, tmp_path):
    few = SelectorConfig(**asdict(CONFIG) | {"steps": 1})
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^A training has each of the 8 prompts of its half at least once, and 1 steps of 4"
            r" responses have 4\. Raise --steps to 2 or more, or --batch\.$"
        ),
    ):
        divide(job_of(scored, folders, tmp_path / "cells", few))
    assert not (tmp_path / "cells").exists()


def test_a_minimum_has_to_fit_into_the_smallest_budget(scored, folders, tmp_path):
    asked = SelectorConfig(**asdict(CONFIG) | {"per_context_minimum": 2, "curve": (0.1,)})
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^A minimum of 2 positions per response is more than a budget of 0\.1 keeps of"
            r" responses with \d+ positions on average\. Raise the budgets \(--budgets, --curve\),"
            r" or use --per-context-minimum 0\.$"
        ),
    ):
        run_selectors(job_of(scored, folders, tmp_path / "cells", asked), asked)
    assert not (tmp_path / "cells").exists()


def test_prompts_that_training_would_read_otherwise_are_refused(scored):
    bank, pair = read_bank(scored / "contexts.parquet"), make_pair()
    rows = pd.DataFrame({"context_id": [context.context_id for context in bank], "half": 0})
    hint = {"teacher_prompt": "w1", "teacher_prompt_ids": (0, 5)}
    hinted = Bank(tuple(type(c)(**c.__dict__ | hint) for c in bank))
    with pytest.raises(
        DiagnosticsError, match=r"^The teacher of these contexts reads prompts of its own; "
    ):
        half_prompts(hinted, rows, 0, pair)
    other = Bank(tuple(type(c)(**c.__dict__ | {"prompt_ids": (0, 9)}) for c in bank))
    with pytest.raises(
        DiagnosticsError,
        match=r"^The frozen prompt 'w.*' has other ids than this tokenizer gives it, ",
    ):
        half_prompts(other, rows, 0, pair)
    # A rendered prompt has no start token of the tokenizer's.
    bare = Bank(tuple(type(c)(**c.__dict__ | {"prompt_ids": c.prompt_ids[1:]}) for c in bank))
    assert all(prompt.rendered for prompt in half_prompts(bare, rows, 0, pair))
    assert not any(prompt.rendered for prompt in half_prompts(bank, rows, 0, pair))


def test_the_first_seed_under_teachability_stands_for_a_checkpoint():
    """Three trainings of two positions; only a table without a checkpoint takes one in."""
    tokens = pd.DataFrame(
        {
            "context_id": ["a", "a"],
            "position": [0, 1],
            "forward_kl": [3.0, 1.0],
            "reverse_kl": [2.0, 1.0],
        }
    )
    cells = pd.concat(
        pd.DataFrame(
            {
                "criterion": criterion,
                "budget": 0.05,
                "seed": seed,
                "context_id": ["a", "a"],
                "position": [1, 0],
                "forward_kl_after": [value, 2 * value],
                "reverse_kl_after": 0.5,
                "student_entropy_after": 0.25,
                "seen": seed == 1,
            }
        )
        for criterion, seed, value in (
            ("teachability", 3, 0.1),
            ("teachability", 1, 0.2),
            ("tip", 0, 9.0),
        )
    )
    assert stand_in(cells) == ("teachability", 0.05, 1)
    found = with_student(tokens, cells)
    assert found["forward_kl_after"].tolist() == [0.4, 0.2] and found["seen"].all()
    assert found["gain"].tolist() == pytest.approx([2.6, 0.8])
    assert not set(TRAINING) & set(found)
    probed = tokens.assign(gain=0.7, forward_kl_after=9.0)
    joined = with_student(probed, cells)
    assert (joined["gain"] == 0.7).all() and joined["forward_kl_after"].tolist() == [0.4, 0.2]
    own = tokens.assign(student_entropy_after=1.0)
    assert with_student(own, cells) is own and with_student(tokens, None) is tokens
    others = cells[cells["criterion"] == "tip"]
    assert stand_in(others) is None and with_student(tokens, others) is tokens


def test_no_trainings_are_two_empty_tables(tmp_path):
    cells, kept = read_cells(tmp_path / "nowhere")
    assert cells.empty and kept.empty and list(kept.columns) == [*TRAINING, *KEPT]


def test_a_record_that_is_no_training_is_named(trained, tmp_path):
    name = "q3-0.2-seed0.json"
    record = json.loads((trained / name).read_text())
    del record["kept"]["q3_share"]
    (tmp_path / name).write_text(json.dumps(record))
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"q3-0\.2-seed0\.json should be the record of a training, and cannot be read as one"
            r" \(KeyError: 'q3_share'\)\. Remove it and give `paper --train` again"
        ),
    ):
        read_cells(tmp_path)


def test_a_cell_is_named_like_a_grids():
    assert TrainingCell("q3", 0.03, 1).name == "q3-0.03-seed1"
