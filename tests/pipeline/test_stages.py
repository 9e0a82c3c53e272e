"""The stages together: files, hashes, repetition, and refusal of other settings."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd

from diagnostics.analysis.config import PrimaryChoices
from diagnostics.core.files import sha256_file
from diagnostics.pipeline.cli import main
from tests import outlines

FILES = (
    "contexts.parquet",
    "scores.parquet",
    "tops.parquet",
    "gains.parquet",
    "tokens.parquet",
    "tables/calibration.csv",
    "tables/placebo.csv",
    "tables/correlations.csv",
    "tables/q3_contrast.csv",
    "manifest.json",
    "report.html",
)


def hashes(directory):
    return {name: sha256_file(directory / name) for name in FILES}


def test_the_main_job_leaves_its_files(finished):
    assert all((finished / name).stat().st_size for name in FILES)
    tokens = pd.read_parquet(finished / "tokens.parquet")
    assert {"forward_kl", "fold", "gain", "relative_gain", "context_gain"} <= set(tokens.columns)
    assert len(pd.read_parquet(finished / "contexts.parquet")) == 20
    assert len(pd.read_parquet(finished / "tops.parquet")) == len(tokens)
    assert '"tops":{"student":' in (finished / "report.html").read_text(encoding="utf-8")
    assert not list((finished / "figures").glob("*.pdf"))
    assert len(list((finished / "figures").glob("*.png"))) >= 4


def test_the_figures_of_a_run_are_drawn(finished, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    (directory / "report.html").unlink()
    with outlines.instead(outlines.WHOLE):
        assert main(["report", str(directory), "--contexts", "1", "--quiet"]) == 0
    names = [path.name for path in sorted((directory / "figures").glob("*.png"))]
    assert names == [path.name for path in sorted((finished / "figures").glob("*.png"))]
    assert all((directory / "figures" / name).stat().st_size > 5000 for name in names)
    assert (directory / "report.html").read_text(encoding="utf-8").count("<path") > 100


def test_pages_call_the_models_what_they_are_told_to(finished, tmp_path, capsys):
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    report = ["report", str(directory), "--contexts", "0", "--quiet"]
    named = ["--student-name", "An org/<b>Small</b>", "--teacher-name", " A teacher "]
    for options in (named, []):  # kept for later reports
        assert main([*report, *options]) == 0
        page = (directory / "report.html").read_text(encoding="utf-8")
        title = "Which of A teacher&#x27;s signals can An org/&lt;b&gt;Small&lt;/b&gt; learn from?"
        assert f"<title>{title}</title>" in page and "<b>Small" not in page
    stages = [json.loads((each / "manifest.json").read_text()) for each in (finished, directory)]
    assert stages[0]["stages"] == stages[1]["stages"]
    for name in ("", " ", "two\nlines", "x" * 81):
        capsys.readouterr()
        assert main([*report, "--student-name", name]) == 2
        assert capsys.readouterr().err.startswith("error: A name is one line of at most 80 letters")


def test_the_manifest_hashes_every_file(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    assert {"rollout", "score", "probe", "analyze"} <= manifest["stages"].keys()
    for stage in manifest["stages"].values():
        for file, digest in stage["files"].items():
            assert sha256_file(finished / file) == digest
    counts = manifest["stages"]["rollout"]["facts"]["prompts"]
    assert (
        counts["rows"] == 30
        and counts["prompts"] == 20
        and counts["not_needed"] == 10
        and counts["empty"] == counts["over_long"] == 0
    )
    assert (
        manifest["versions"]["torch"].startswith("2.")
        and len(manifest["stages"]["rollout"]["facts"]["student"]["weights_sha256"]) == 64
    )


def test_the_same_command_again_changes_nothing(finished, folders):
    before, record = hashes(finished), (finished / "manifest.json").read_text().splitlines()
    assert main(["run", *folders, "--output-dir", str(finished)]) == 0
    assert (finished / "manifest.json").read_text().splitlines() == record
    assert hashes(finished) == before


def test_stages_one_by_one_elsewhere_give_the_same_bytes(finished, folders, tmp_path):
    directory = str(tmp_path / "steps")
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    assert (
        main(["rollout", *folders[:10], "--device", "cpu", "--quiet", "--output-dir", directory])
        == 0
    )
    assert main(["score", *models, "--output-dir", directory]) == 0
    assert main(["probe", *models, "--folds", "2", "--output-dir", directory]) == 0
    assert main(["analyze", "--draws", "50", "--quiet", "--output-dir", directory]) == 0
    assert main(["report", "--quiet", "--output-dir", directory]) == 0
    assert hashes(tmp_path / "steps") == hashes(finished)


def test_a_lost_file_is_made_again(finished, folders, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(finished, directory)
    before = hashes(directory)
    (directory / "gains.parquet").unlink()
    (directory / "tables/calibration.csv").write_text("broken")
    probe = ["probe", *folders[:4], "--folds", "2", "--device", "cpu", "--quiet"]
    assert main([*probe, "--output-dir", str(directory)]) == 0
    assert hashes(directory) == before


def test_another_configuration_is_refused(finished, folders, capsys):
    before = hashes(finished)
    assert main(["run", *folders, "--seed", "9", "--output-dir", str(finished)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and "setting seed: was 0, now 9" in error
        and "Nothing was overwritten" in error
    )
    assert hashes(finished) == before


def test_a_local_data_set_is_known_by_its_files(folders, tmp_path, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "".join(f'{{"prompt": "w{i}"}}\n' for i in range(4))
    )
    command = [
        "rollout",
        *folders[:4],
        "--device",
        "cpu",
        "--quiet",
        "--prompts",
        f"hf:{tmp_path / 'data'}",
        "--max-new-tokens",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('{"prompt": "w9"}\n')
    assert main(command) == 2 and "setting prompts_sha256" in capsys.readouterr().err


def test_a_table_alone_can_be_analysed(finished, tmp_path):
    directory = tmp_path / "table"
    assert (
        main(
            [
                "analyze",
                "--tokens",
                str(finished / "tokens.parquet"),
                "--draws",
                "50",
                "--quiet",
                "--output-dir",
                str(directory),
            ]
        )
        == 0
    )
    assert (directory / "tables/correlations.csv").read_bytes() == (
        finished / "tables/correlations.csv"
    ).read_bytes()


def code_names():
    """Every module that a stage names as deciding its numbers, as the source has it."""
    for path in (Path(__file__).parents[2] / "diagnostics").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            named = [key.value for key in node.keywords if key.arg == "code"]
            for given in node.args if called == "code_version" else named:
                yield from (
                    part.value for part in ast.walk(given) if isinstance(part, ast.Constant)
                )


def test_the_modules_that_decide_a_stages_numbers_exist():
    names = set(code_names())
    assert "probing.scores" in names and "training.trl_trainer" in names
    missing = [name for name in names if importlib.util.find_spec(f"diagnostics.{name}") is None]
    assert missing == []


def test_primary_choices_are_recorded_before_the_probe(finished, tmp_path):
    """Other choices than the recorded ones, or a probe that recorded none, confirm nothing."""
    recorded = json.loads((finished / "manifest.json").read_text())["primary"]
    assert recorded["sha256"] == PrimaryChoices().sha256()
    assert recorded["choices"]["margin"] == 0.25 and recorded["registered_at"] == "probe"

    def because(directory, *flags):
        shutil.copytree(finished, tmp_path / directory)
        if not flags:
            manifest = json.loads((tmp_path / directory / "manifest.json").read_text())
            del manifest["primary"]
            (tmp_path / directory / "manifest.json").write_text(json.dumps(manifest))
        where = ["--output-dir", str(tmp_path / directory)]
        assert main(["analyze", "--draws", "5", "--quiet", *where, *flags]) == 0
        table = pd.read_csv(tmp_path / directory / "tables/verdicts.csv")
        rows = table[table.primary & (table.kind == "controlled")]
        return set(rows.sentence.str.rpartition("Exploratory: ")[2]), set(rows.exploratory)

    assert because("same", "--seed", "1")[1] == {False}
    assert because("other", "--primary", "margin=0.5") == (
        {"other primary choices were recorded before the probe."},
        {True},
    )
    assert because("none") == ({"no primary choices were recorded before the probe."}, {True})


def test_a_probe_keeps_the_choices_it_was_begun_with(finished, capsys):
    before = sha256_file(finished / "manifest.json")
    manifest = json.loads((finished / "manifest.json").read_text())
    settings = manifest["stages"]["probe"]["settings"]
    assert settings["primary"] == PrimaryChoices().as_text()
    pair = ["--student", settings["student"], "--teacher", settings["teacher"], "--folds", "2"]
    assert main(["probe", *pair, "--output-dir", str(finished), "--primary", "budget=0.1"]) == 2
    assert before == sha256_file(finished / "manifest.json")


def test_a_model_as_its_own_teacher_is_named_before_the_probe(folders, tmp_path, capsys):
    flags = dict(zip(folders[::2], folders[1::2], strict=False))
    same = ["--student", flags["--student"], "--teacher", flags["--student"]]
    where = ["--output-dir", str(tmp_path)]
    prompts = ["--prompts", flags["--prompts"], "--contexts", "4", "--max-new-tokens", "4"]
    assert main(["rollout", *same, *prompts, *where]) == 0
    assert main(["score", *same, *where]) == 0
    assert "Are --student and --teacher the same model? Mean forward KL: 0.0e+00 nats" in (
        capsys.readouterr().err
    )
