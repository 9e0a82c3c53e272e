import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diagnostics.analysis import training_outcomes
from diagnostics.analysis.training_outcomes import (
    Outcomes,
    SeedPromptEstimate,
    cells_table,
    outcome_table,
    verdict_table,
)
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from diagnostics.training import grid as grid_module
from diagnostics.training.grid import TrainingCell, ValidateConfig, grid
from tests.effect_tables import PROMPTS, outcome_rows

FIVE = {
    ("full", 1.0): 0.5,
    ("teachability", 0.05): 0.5,
    ("entropy", 0.05): 0.3,
    ("divergence", 0.05): 0.2,
    ("tip", 0.05): 0.3,
    ("random", 0.05): 0.35,
}


def test_the_grid_goes_seed_by_seed_and_full_has_one_cell():
    cells = grid(ValidateConfig(criteria=("full", "tip"), budgets=(0.05, 0.3), seeds=2))
    assert [cell.name for cell in cells] == [
        "full-1-seed0",
        "tip-0.05-seed0",
        "tip-0.3-seed0",
        "full-1-seed1",
        "tip-0.05-seed1",
        "tip-0.3-seed1",
    ]
    assert len(grid(ValidateConfig())) == 57


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"criteria": ("teachable",)},
            r"^Unknown criterion 'teachable'\. Did you mean 'teachability'\?",
        ),
        (
            {"budgets": (0.05, 1.5)},
            r"^A budget is a share of positions in \(0, 1\]; got 1\.5\. ",
        ),
        ({"seeds": 0}, r"^A grid needs criteria, seeds and workers; got 7, 0 and 2\.$"),
    ],
)
def test_a_grid_that_cannot_be_trained(options, message):
    with pytest.raises(DiagnosticsError, match=message):
        ValidateConfig(**options)


def test_an_interval_crosses_seeds_and_prompts():
    rows = outcome_rows(FIVE)
    outcomes = Outcomes(rows, draws=300, seed=4)
    found = outcomes.of("reverse_kl", "tip", 0.05)
    part = rows[(rows["criterion"] == "tip")]
    weights = np.random.default_rng(4).multinomial(PROMPTS, np.full(PROMPTS, 1 / PROMPTS), size=300)
    by_seed, draws = [], []
    for _, single in part.groupby("seed"):
        total, count = single["total"].to_numpy(), single["count"].to_numpy()
        by_seed.append(total.sum() / count.sum())
        draws.append([(w * total).sum() / (w * count).sum() for w in weights])
    assert found.value == pytest.approx(np.mean(by_seed)) and found.prompts == PROMPTS
    e_s, e_g = (
        np.var(by_seed, ddof=1) / 3,
        np.var(np.mean(draws, 0), ddof=1) * PROMPTS / (PROMPTS - 1),
    )
    assert found.errors == (pytest.approx(e_s), pytest.approx(e_g))
    freedom = (e_s + e_g) ** 2 / (e_s**2 / 2 + e_g**2 / (PROMPTS - 1))
    reach = stats.t.ppf(0.95, freedom) * np.sqrt(e_s + e_g)
    assert found.interval(0.9) == (
        pytest.approx(found.value - reach),
        pytest.approx(found.value + reach),
    )


def test_differences_are_paired_by_prompt():
    outcomes = Outcomes(outcome_rows(FIVE), draws=300)
    one, other = (outcomes.of("reverse_kl", name, 0.05) for name in ("tip", "random"))
    paired = one - other
    assert paired.value == pytest.approx(one.value - other.value)
    assert paired.errors[1] < 0.1 * (one.errors[1] + other.errors[1])
    gain = outcomes.gain("reverse_kl", "divergence", 0.05)
    assert gain.value == pytest.approx(0.2, abs=0.02) and gain.interval()[0] > 0.15
    assert outcomes.gain("reverse_kl", "divergence", 0.05).errors[1] < one.errors[1]


def test_accuracy_gains_upwards_and_divergence_downwards():
    rows = pd.concat(
        [outcome_rows({("full", 1.0): 0.2}), outcome_rows({("full", 1.0): 0.2}, measure="accuracy")]
    )
    outcomes = Outcomes(rows, draws=50)
    assert outcomes.gain("reverse_kl", "full", 1.0).value == pytest.approx(0.2, abs=0.02)
    assert outcomes.gain("accuracy", "full", 1.0).value == pytest.approx(-0.2, abs=0.02)


def test_one_seed_has_no_interval():
    found = Outcomes(outcome_rows(FIVE, seeds=1), draws=50).of("reverse_kl", "tip", 0.05)
    assert (
        np.isnan(found.errors[0]) and np.isnan(found.interval()).all() and np.isfinite(found.value)
    )


def test_untouched_has_no_spread_over_seeds():
    found = Outcomes(outcome_rows(FIVE), draws=200).of("reverse_kl", "untouched", 0.0)
    assert found.fixed and found.errors[0] == 0
    low, high = found.interval()
    reach = stats.t.ppf(0.975, PROMPTS - 1) * np.sqrt(found.errors[1])
    assert (low, high) == (pytest.approx(found.value - reach), pytest.approx(found.value + reach))


def test_coverage_of_a_paired_difference():
    """Seeds and prompts both move the difference; 95 % intervals hold the truth at least about that
    often.
    """
    generator, held, repeats = np.random.default_rng(0), 0, 200
    for _ in range(repeats):
        seed, prompt, both = (
            generator.normal(0, 0.05, (3, 1)),
            generator.normal(0, 0.3, (1, 30)),
            generator.normal(0, 0.2, (3, 30)),
        )
        values_SG = 0.1 + seed + prompt + both
        weights = generator.multinomial(30, np.full(30, 1 / 30), size=100)
        low, high = SeedPromptEstimate(values_SG.mean(1), weights @ values_SG.T / 30, 30).interval()
        held += low <= 0.1 <= high
    assert held / repeats >= 0.92


def test_cells_that_cannot_be_paired_or_found():
    rows = outcome_rows(FIVE)
    rows = rows[~((rows["criterion"] == "tip") & (rows["seed"] == 2))]
    outcomes = Outcomes(rows, draws=20)
    with pytest.raises(
        DiagnosticsError, match=r"^Cells with 2 and 3 seeds cannot be paired\. Finish the grid\.$"
    ):
        outcomes.of("reverse_kl", "tip", 0.05) - outcomes.of("reverse_kl", "full", 1.0)
    with pytest.raises(
        DiagnosticsError,
        match=r"^The grid holds no reverse_kl of tip at 0\.3\. Train that cell first\.$",
    ):
        outcomes.of("reverse_kl", "tip", 0.3)


def test_outcome_table_says_what_each_cell_is_paired_against():
    table = outcome_table(Outcomes(outcome_rows(FIVE), draws=100)).set_index("criterion")
    assert table.loc["untouched", "mean"] == pytest.approx(1.0, abs=0.05) and np.isnan(
        table.loc["untouched", "gain"]
    )
    assert table.loc["teachability", "gain"] == pytest.approx(0.5, abs=0.02)
    assert (
        table.loc["teachability", "minus_random"] == pytest.approx(0.15, abs=0.02)
        and table.loc["teachability", "minus_random_low"] > 0.1
    )
    assert table.loc["entropy", "minus_full"] == pytest.approx(-0.2, abs=0.02) and np.isnan(
        table.loc["full", "minus_full"]
    )
    assert (
        np.isnan(table.loc["random", "minus_random"])
        and (table.drop("untouched")["seeds"] == 3).all()
    )
    single = cells_table(Outcomes(outcome_rows(FIVE), draws=2))
    mean = single[single["criterion"] == "tip"]["value"].mean()
    assert len(single) == 1 + 6 * 3 and mean == pytest.approx(table.loc["tip", "mean"])


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {},
            {
                "all": "supported",
                "full": "supported",
                "entropy": "supported",
                "divergence": "supported",
                "tip": "supported",
            },
        ),
        ({("entropy", 0.05): 0.52}, {"all": "supported", "entropy": "supported"}),
        ({("entropy", 0.05): 0.9}, {"all": "refuted", "entropy": "refuted", "tip": "supported"}),
        ({("full", 1.0): -0.1, ("tip", 0.05): 0.6}, {"full": "supported", "tip": "refuted"}),
    ],
)
def test_verdicts_follow_the_intervals(changes, expected):
    table = verdict_table(Outcomes(outcome_rows(FIVE | changes), draws=100)).set_index("rival")
    assert (table["claim"] == "C5").all() and {
        rival: table.loc[rival, "verdict"] for rival in expected
    } == expected
    assert table.loc["full", "margin"] == pytest.approx(
        max(0.0, 0.1 * changes.get(("full", 1.0), 0.5)), abs=0.005
    )
    assert table.loc["divergence", "beats"] and table.loc["divergence", "low"] > 0


def test_other_budgets_are_named_apart():
    wide = {**FIVE, **{(name, 0.3): effect for (name, _), effect in FIVE.items() if name != "full"}}
    table = verdict_table(Outcomes(outcome_rows(wide), draws=50))
    assert list(dict.fromkeys(table["claim"])) == ["C5", "C5 at 0.3"]


def command(folders, directory, *more):
    return [
        "validate",
        *folders[0],
        *folders[1],
        "--eval-contexts",
        "6",
        "--eval-samples",
        "2",
        "--steps",
        "2",
        "--batch",
        "4",
        "--max-new-tokens",
        "8",
        "--seeds",
        "2",
        "--criteria",
        "full,random,teachability",
        "--budgets",
        "0.2",
        "--learning-rate",
        "0.001",
        "--draws",
        "50",
        "--workers",
        "1",
        "--output-dir",
        str(directory),
        *more,
    ]


@pytest.mark.slow
def test_an_interrupted_grid_goes_on_where_it_was(folders, tmp_path, monkeypatch, capsys):
    trained, original = [], grid_module.run_cell

    def counting(job, cell):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(cell)
        return original(job, cell)

    monkeypatch.setattr(grid_module, "run_cell", counting)
    assert main(command(folders, tmp_path)) == 130
    monkeypatch.setattr(
        grid_module, "run_cell", lambda job, cell: trained.append(cell) or original(job, cell)
    )
    assert main(command(folders, tmp_path)) == 0
    assert [cell.name for cell in trained] == [
        cell.name
        for cell in grid(
            ValidateConfig(criteria=("full", "random", "teachability"), budgets=(0.2,), seeds=2)
        )
    ]
    tables = {
        name: pd.read_csv(tmp_path / "tables" / f"validation_{name}.csv")
        for name in ("cells", "outcomes", "verdicts", "agreement", "foreseen")
    }
    assert set(tables["foreseen"]["answer"]) == set(training_outcomes.FIRST_STEP)
    assert (
        set(tables["outcomes"]["criterion"]) == {"untouched", "full", "random", "teachability"}
        and (tables["verdicts"]["verdict"] == "not identified").all()
    )
    record = json.loads((tmp_path / "cells/teachability-0.2-seed1.json").read_text())
    assert (
        record["cell"] == {"criterion": "teachability", "budget": 0.2, "seed": 1}
        and record["settings"]["steps"] == 2
    )
    assert {"loss", "reverse_kl/all"} <= set(
        pd.read_parquet(tmp_path / "cells/full-1-seed0.curve.parquet")
    )
    assert not [path for path in (tmp_path / "cells").iterdir() if path.name.startswith(".")]

    before = (tmp_path / "cells/full-1-seed0.parquet").read_bytes()
    assert main(command(folders, tmp_path, "--budgets", "0.2,0.4")) == 0  # a wider grid adds to it
    assert [cell.budget for cell in trained[6:]] == [0.4] * 4 and (
        tmp_path / "cells/full-1-seed0.parquet"
    ).read_bytes() == before
    assert main(command(folders, tmp_path, "--steps", "3")) == 2
    assert (
        "was trained with other settings (steps: was 2, now 3). Choose another --output-dir."
        in capsys.readouterr().err
    )


def test_equal_seeds_meet_equal_prompts_and_random_numbers(folders, tmp_path):
    assert main(command(folders, tmp_path, "--seeds", "1")) == 0
    curves = [
        pd.read_parquet(tmp_path / f"cells/{name}-seed0.curve.parquet")
        for name in ("full-1", "random-0.2", "teachability-0.2")
    ]
    assert (
        len({curve["reverse_kl/all"][0] for curve in curves}) == 1
        and len({curve["loss"][0] for curve in curves}) == 3
    )


def test_a_verifier_without_answers_is_refused_before_anything_is_sampled(
    folders, tmp_path, capsys
):
    assert main(command(folders, tmp_path, "--verifier", "sums")) == 2
    assert "no held-out prompt has an answer" in capsys.readouterr().err
    assert not (tmp_path / "cells" / "contexts.parquet").exists()


@pytest.mark.slow
def test_workers_give_the_same_cells(folders, tmp_path):
    for workers in ("1", "2"):
        assert main(command(folders, tmp_path / workers, "--seeds", "1", "--workers", workers)) == 0
    for name in ("untouched", "full-1-seed0", "teachability-0.2-seed0"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(tmp_path / workers / f"cells/{name}.parquet") for workers in "12"),
            rtol=1e-5,
        )


@pytest.mark.slow
def test_lora_in_workers_gives_the_same_cells_as_alone(folders, tmp_path):
    """Adapters and further TRL fields reach every training, wherever it runs."""
    pytest.importorskip("peft")
    (tmp_path / "trl.json").write_text('{"warmup_steps": 1}')
    for workers in ("1", "2"):
        options = (
            "--seeds",
            "1",
            "--workers",
            workers,
            "--lora-rank",
            "2",
            "--trl",
            str(tmp_path / "trl.json"),
            "--criteria",
            "full,random",
        )
        assert main(command(folders, tmp_path / workers, *options)) == 0
    for name in ("full-1-seed0", "random-0.2-seed0"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(tmp_path / workers / f"cells/{name}.parquet") for workers in "12"),
            rtol=1e-5,
        )
    assert set(json.loads((tmp_path / "2/cells/full-1-seed0.json").read_text())["engine"]) == {
        "lora_rank",
        "trl",
    }


def test_tables_need_no_torch():
    code = (
        "import sys; from diagnostics.analysis import decision, foresight; print('torch' in"
        " sys.modules, 'trl' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_cell_has_a_name():
    assert TrainingCell("tip", 0.05, 2).name == "tip-0.05-seed2"


# --- finished cells
# ---------------------------------------------------------------------------------

TIP = TrainingCell("tip", 0.2, 0)


def made_job(folder, **changes):
    """A grid's job of which the untouched student and one cell are finished."""
    usual = {
        "pair": {"student": "s"},
        "prompts": {},
        "evaluation": {},
        "grid": {"steps": 2, "workers": 2},
        "sources": {"student": "1"},
        "code": "c1",
    }
    return grid_module.Job(folder, **usual | changes)


def finished_job_of(folder, **changes):
    job, rows = made_job(folder, **changes), pd.DataFrame({"measure": ["m"], "total": [1.0]})
    folder.mkdir(exist_ok=True)
    rows.to_parquet(folder / "contexts.parquet")
    grid_module.finish_cell(job, "untouched", rows)
    rows.to_parquet(folder / "tip-0.2-seed0.curve.parquet")
    grid_module.finish_cell(
        job, TIP.name, rows, cell={"criterion": "tip", "budget": 0.2, "seed": 0}
    )
    assert job.finished("untouched") and job.finished(TIP.name) and not job.finished("full-1-seed0")
    return job


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit(path):
    pd.read_parquet(path).assign(total=9.0).to_parquet(path)


def edit_record(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "harm, reason",
    [
        (
            lambda folder: edit(folder / "tip-0.2-seed0.parquet"),
            r"tip-0\.2-seed0\.parquet is not as it was written",
        ),
        (
            lambda folder: cut(folder / "tip-0.2-seed0.parquet"),
            r"tip-0\.2-seed0\.parquet is not as it was written",
        ),
        (
            lambda folder: (folder / "tip-0.2-seed0.parquet").unlink(),
            r"tip-0\.2-seed0\.parquet is lost",
        ),
        (
            lambda folder: edit(folder / "tip-0.2-seed0.curve.parquet"),
            r"curve\.parquet is not as it was written",
        ),
        (lambda folder: cut(folder / "tip-0.2-seed0.json"), r"its record cannot be read"),
        (lambda folder: (folder / "tip-0.2-seed0.json").unlink(), r"its record is lost"),
        (
            lambda folder: (folder / "tip-0.2-seed0.json").write_text("[" * 100_000),
            r"its record cannot be read",
        ),
        (
            lambda folder: (folder / "tip-0.2-seed0.json").write_text("[]"),
            r"its record has no settings",
        ),
        (
            lambda folder: (folder / "tip-0.2-seed0.json").write_bytes(b"\xff"),
            r"its record cannot be read",
        ),
        (
            lambda folder: edit_record(
                folder / "tip-0.2-seed0.json", cell={"criterion": "full", "budget": 1.0, "seed": 0}
            ),
            r"its record is of another cell, full-1-seed0",
        ),
        (
            lambda folder: edit_record(folder / "tip-0.2-seed0.json", cell=3),
            r"its record is of another cell, None",
        ),
        (
            lambda folder: edit_record(folder / "tip-0.2-seed0.json", bank="0"),
            r"it was evaluated on another frozen bank",
        ),
    ],
)
def test_a_cell_that_was_changed_or_lost_is_measured_again(tmp_path, caplog, harm, reason):
    job = finished_job_of(tmp_path / "cells")
    harm(job.folder)
    assert not job.finished(TIP.name)
    assert len(caplog.records) == 1 and caplog.messages[0].startswith(
        f"{job.folder / TIP.name} is measured again: "
    )
    assert re.search(reason, caplog.messages[0])


def test_a_bank_that_was_changed_is_frozen_again(tmp_path, caplog):
    job = finished_job_of(tmp_path / "cells")
    edit(job.folder / "contexts.parquet")
    assert (
        not job.finished("untouched") and "contexts.parquet is not as it was written" in caplog.text
    )


def test_a_cell_that_is_not_the_manifests_is_measured_again(tmp_path, caplog):
    """File and record were replaced together; the manifest has the hash of what the tables were
    made from.
    """
    finished_job_of(tmp_path / "cells")
    job = made_job(tmp_path / "cells", known={"tip-0.2-seed0.parquet": "0" * 64})
    assert (
        not job.finished(TIP.name)
        and job.finished("untouched")
        and "tip-0.2-seed0.parquet is not as it was written" in caplog.text
    )


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"grid": {"steps": 3}}, "steps: was 2, now 3"),
        ({"sources": {"student": "2"}}, "student: was '1', now '2'"),
        ({"engine": {"lora_rank": 4}}, "lora_rank: was None, now 4"),
    ],
)
def test_a_cell_of_other_settings_models_or_engine_is_refused(tmp_path, changes, difference):
    finished_job_of(tmp_path / "cells")
    with pytest.raises(
        DiagnosticsError,
        match=rf"was trained with other settings \({difference}\)\. Choose another --output-dir\.$",
    ):
        made_job(tmp_path / "cells", **changes).finished(TIP.name)


def inputs_in(place):
    return {"pair": {"student": f"/{place}/student"}, "prompts": {"prompts": f"/{place}/prompts"}}


def test_a_grid_that_was_moved_goes_on_where_its_inputs_have_the_same_content(tmp_path):
    known = {"student": "1", "prompts_sha256": "2"}
    finished_job_of(tmp_path / "cells", **inputs_in("here"), sources=known)
    assert made_job(tmp_path / "cells", **inputs_in("there"), sources=known).finished(TIP.name)
    other = known | {"prompts_sha256": "3"}
    with pytest.raises(DiagnosticsError, match=r"settings \(prompts_sha256: was '2', now '3'\)"):
        made_job(tmp_path / "cells", **inputs_in("there"), sources=other).finished(TIP.name)


def test_inputs_without_a_hash_are_known_by_their_place(tmp_path):
    finished_job_of(tmp_path / "cells", **inputs_in("here"), sources={"student": "1"})
    with pytest.raises(DiagnosticsError, match=r"settings \(prompts_place: was '"):
        made_job(tmp_path / "cells", **inputs_in("there"), sources={"student": "1"}).finished(
            TIP.name
        )


def test_engine_options_of_a_cell(tmp_path):
    job = finished_job_of(
        tmp_path / "cells",
        engine={"trl": "a/x.json", "accumulation": 2},
        sources={"trl_sha256": "7"},
    )
    assert json.loads((job.folder / f"{TIP.name}.json").read_text())["engine"] == {
        "accumulation": 2,
        "trl": "7",
    }
    again = {"engine": {"trl": "elsewhere.json", "accumulation": 2}, "sources": {"trl_sha256": "7"}}
    assert made_job(job.folder, **again).finished(TIP.name)  # the file counts by its content
    with pytest.raises(DiagnosticsError, match=r"\(trl: was '7', now '8'\)"):
        made_job(job.folder, **again | {"sources": {"trl_sha256": "8"}}).finished(TIP.name)
    with pytest.raises(
        DiagnosticsError, match=r"\(accumulation: was 2, now None; trl: was '7', now None\)"
    ):
        made_job(job.folder, sources={}).finished(TIP.name)


def test_a_cell_of_other_code_is_refused_or_kept_on_request(tmp_path, caplog):
    finished_job_of(tmp_path / "cells")
    with pytest.raises(
        DiagnosticsError,
        match=r"trained by another version of this program \(was c1, now c2\)\..*--accept-code",
    ):
        made_job(tmp_path / "cells", code="c2").finished(TIP.name)
    assert (
        made_job(tmp_path / "cells", code="c2", accept_code=True).finished(TIP.name)
        and "kept, though another version" in caplog.text
    )


def test_a_cell_that_selected_by_other_rules_is_refused_or_kept_on_request(tmp_path, caplog):
    """Earlier cells ordered ties by position; where nothing is clipped that changes nothing."""
    finished_job_of(tmp_path / "cells")  # its record says nothing of ties
    now = {"grid": {"steps": 2, "workers": 2, "ties": "raw", "scope": "batch"}}
    message = (
        r"tip-0\.2-seed0\.json selected its positions by other rules \(ties was 'position', now"
        r" 'raw'\)\. Choose another --output-dir, those rules, or --accept-code to keep what it"
        r" measured\.$"
    )
    job = made_job(tmp_path / "cells", **now)
    assert job.finished("untouched")
    with pytest.raises(DiagnosticsError, match=message):
        job.finished(TIP.name)
    assert made_job(tmp_path / "cells", **now, accept_code=True).finished(TIP.name)
    assert "kept, though it selected by other rules (ties was 'position', now 'raw')" in caplog.text
    same = {"grid": {"steps": 2, "ties": "position", "scope": "batch"}}
    assert made_job(tmp_path / "cells", **same).finished(TIP.name)
    margin = TrainingCell("margin", 0.2, 0)
    rows = pd.DataFrame({"measure": ["m"], "total": [1.0]})
    rows.to_parquet(tmp_path / "cells" / f"{margin.name}.curve.parquet")
    grid_module.finish_cell(made_job(tmp_path / "cells"), margin.name, rows, cell=asdict(margin))
    assert job.finished(margin.name)
    by_response = {"grid": {"steps": 2, "ties": "raw", "scope": "context"}}
    with pytest.raises(DiagnosticsError, match="scope was 'batch', now 'context'"):
        made_job(tmp_path / "cells", **by_response).finished(margin.name)


def test_a_record_from_before_hashes_is_compared_by_what_it_knows(tmp_path):
    job = finished_job_of(tmp_path / "cells")
    for path in job.folder.glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: record[key] for key in ("cell", "settings") if key in record})
        )
    assert job.finished("untouched") and job.finished(TIP.name)


def test_scratch_of_dead_cells_goes_and_nothing_else(tmp_path):
    folder, outside = tmp_path / "cells", tmp_path / "outside"
    for path in (
        folder / ".training-tip-0.2-seed0" / "deep",
        folder / "mine",
        folder / ".training-mine",
        outside / "kept",
    ):
        path.mkdir(parents=True)
    (folder / ".training-tip-0.2-seed0" / "link").symlink_to(outside)
    (folder / ".training-full-1-seed0").symlink_to(outside)
    (folder / ".training-full-1-seed1").write_text("a file")
    grid_module.remove_scratch(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".training-full-1-seed0",
        ".training-full-1-seed1",
        ".training-mine",
        "mine",
    ]
    assert (outside / "kept").is_dir()
    with (
        pytest.raises(
            DiagnosticsError,
            match=r"\.training-full-1-seed0 is a link, and this program makes none\. Remove it\.$",
        ),
        grid_module.scratch_folder(made_job(folder), TrainingCell("full", 1.0, 0)),
    ):
        pass
    (tmp_path / "linked").symlink_to(folder)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"linked is a link, and cells are written into the run's own folder alone\. Remove the"
            r" link\.$"
        ),
    ):
        grid_module.run_grid(made_job(tmp_path / "linked"), [TIP], workers=1)


@pytest.mark.parametrize(
    "pair, gpus, expected",
    [
        ({"device": "auto"}, ["0", "1"], ["0", "1", "0"]),
        (
            {"device": "cuda", "teacher_device": None},
            ["GPU-a", "GPU-b", "c", "d"],
            ["GPU-a", "GPU-b", "c"],
        ),
        ({"device": "auto"}, ["0"], [None] * 3),
        ({"device": "auto"}, [], [None] * 3),
        ({"device": "cpu"}, ["0", "1"], [None] * 3),
        ({"device": "cuda:1"}, ["0", "1"], [None] * 3),
        ({"device": "auto", "teacher_device": "cuda:1"}, ["0", "1"], [None] * 3),
    ],
)
def test_a_gpu_for_each_worker(monkeypatch, pair, gpus, expected):
    monkeypatch.setattr(grid_module, "visible_gpus", lambda: gpus)
    assert [
        environment.get("CUDA_VISIBLE_DEVICES") for environment in grid_module.environments(3, pair)
    ] == expected


def test_gpus_are_named_as_the_environment_has_them(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert grid_module.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert grid_module.visible_gpus() == ["5", "7"]


def test_two_budgets_never_share_a_name():
    names = [
        cell.name
        for cell in grid(
            ValidateConfig(criteria=("tip", "tip"), budgets=(0.05, 0.05000001, 0.05), seeds=1)
        )
    ]
    assert names == ["tip-0.05-seed0", "tip-0.05000001-seed0"]


@pytest.mark.parametrize("option", ["--save-every=5", "--probe-every=1", "--resume"])
def test_options_that_a_grid_decides_are_refused(folders, tmp_path, capsys, option):
    assert main(command(folders, tmp_path, option)) == 2
    assert f"A grid of trainings takes no {option.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.slow
def test_models_are_loaded_once_and_each_training_begins_with_them(
    folders, tmp_path, monkeypatch, capsys
):
    """The second cell of a process is, to the last bit, what it is alone; a training that changed
    what is held is noticed.
    """
    import torch

    from diagnostics.models import pair

    loads, original = [], pair.load_pair
    monkeypatch.setattr(pair, "load_pair", lambda **options: loads.append(1) or original(**options))
    options = ("--seeds", "1", "--accumulation", "2")
    assert main(command(folders, tmp_path / "both", *options, "--criteria", "full,random")) == 0
    assert len(loads) == 1 and not grid_module._held
    assert main(command(folders, tmp_path / "one", *options, "--criteria", "random")) == 0
    files = [tmp_path / name / "cells/random-0.2-seed0.parquet" for name in ("both", "one")]
    assert files[0].read_bytes() == files[1].read_bytes() and len(loads) == 2
    record = json.loads(files[0].with_suffix(".json").read_text())
    assert record["engine"] == {"accumulation": 2} and set(record["files"]) == {
        "random-0.2-seed0.parquet",
        "random-0.2-seed0.curve.parquet",
    }
    assert (
        json.loads((tmp_path / "both/manifest.json").read_text())["stages"]["validate"]["settings"][
            "accumulation"
        ]
        == 2
    )

    job = made_job(
        tmp_path, pair={"student": folders[0][1], "teacher": folders[0][3], "device": "cpu"}
    )
    first = grid_module.fresh_pair(job)
    second = grid_module.fresh_pair(job)
    weights = [next(pair.student.model.parameters()) for pair in (first, second)]
    assert weights[0].data_ptr() != weights[1].data_ptr() and len(loads) == 3
    assert (
        next(first.teacher.model.parameters()).data_ptr()
        == next(second.teacher.model.parameters()).data_ptr()
    )
    with torch.no_grad():
        next(first.teacher.model.parameters())[0, 0] += 1
    third = grid_module.fresh_pair(job)
    assert len(loads) == 4 and "the models are loaded again" in capsys.readouterr().err
    assert (
        grid_module._checksum(third)
        == grid_module._checksum(second)[:1] + grid_module._checksum(third)[1:]
    )
    grid_module._held.clear()
