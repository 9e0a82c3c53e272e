import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from diagnostics import rerun
from diagnostics.cli import _configs, main
from diagnostics.runs import read_manifest
from diagnostics.types import DiagnosticsError
from tests.test_stages import folders  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):  # noqa: F811
    """A run with a stage of every kind that is quick: measured, derived, one with a list among its settings."""
    directory = tmp_path_factory.mktemp("done") / "out"
    models, out = [*folders[:4], "--device", "cpu", "--quiet"], ["--output-dir", str(directory)]
    assert main(["rollout", *folders[:10], *models[4:], *out]) == 0
    assert main(["score", *models, "--k", "8", "--sweep", "4", *out]) == 0
    assert main(["probe", *models, "--loss", "forward_kl", "--batch-tokens", "60", *out]) == 0
    assert main(["intervene", *models, "--loss", "forward_kl", "--criteria", "teachability", "--budgets", "0.5", "--random-draws", "1", "--draws", "20",
                 "--batch-tokens", "60", *out]) == 0
    assert main(["analyze", "--draws", "20", "--training", str(ROOT / "reports/embedded-validation"), "--quiet", *out]) == 0
    assert main(["compare", "--criteria", "divergence,teachability", "--budgets", "0.1,0.5", "--draws", "20", "--seed", "3", "--quiet", *out]) == 0
    return directory


def named(folders):  # noqa: F811
    """The paths of the student, the teacher, the prompts and the validation that the run read."""
    return [folders[1], folders[3], folders[5], str(ROOT / "reports/embedded-validation")]


def test_a_run_is_repeated_from_its_manifest_file_by_file(done, folders, tmp_path, capsys):  # noqa: F811
    again = ["rerun", str(done / "manifest.json"), "--output-dir", str(tmp_path / "again"), "--device", "cpu", "--json"]
    assert main([*again, "--inputs", *named(folders)]) == 0
    result = json.loads(capsys.readouterr().out)
    files = {file: digest for record in read_manifest(done / "manifest.json")["stages"].values() for file, digest in record["files"].items()}
    assert {row["file"]: row["now"] for row in result["files"] if row["stage"] != "joined"} == files
    assert all(row["same"] and row["was"] == row["now"] for row in result["files"]) and result["different"] == 0
    assert {"contexts.parquet", "scores.parquet", "gains.parquet", "interventions.parquet", "tables/selection_curves.csv", "tokens.parquet"} <= {
        row["file"] for row in result["files"]}


def test_the_commands_are_those_that_were_given(done, folders):  # noqa: F811
    inputs = rerun.Inputs(done, [Path(path) for path in named(folders)])
    planned = {command[0]: command for command in rerun.commands(read_manifest(done / "manifest.json"), _configs, inputs)}
    assert list(planned) == ["rollout", "score", "probe", "intervene", "analyze", "compare"]
    assert {f"--student={folders[1]}", "--contexts=20", "--max-new-tokens=10", "--chat"} <= set(planned["rollout"])
    assert {"--k=8", "--sweep=4"} <= set(planned["score"]) and {"--loss=forward_kl", "--batch-tokens=60"} <= set(planned["probe"])
    assert f"--training={ROOT / 'reports/embedded-validation'}" in planned["analyze"]
    assert {"--criteria=divergence,teachability", "--budgets=0.1,0.5", "--draws=20"} <= set(planned["compare"]) and planned["compare"][-1] == "--seed=3"


def manifest_of(done, tmp_path, change):
    manifest = read_manifest(done / "manifest.json")
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "manifest.json"


def test_a_file_that_differs_is_named_and_the_exit_code_says_so(done, folders, tmp_path, capsys):  # noqa: F811
    def change(manifest):
        del manifest["stages"]["intervene"], manifest["stages"]["compare"], manifest["stages"]["analyze"], manifest["stages"]["probe"], manifest["joined"]
        manifest["stages"]["score"]["files"]["scores.parquet"] = "0" * 64

    path = manifest_of(done, tmp_path, change)
    assert main(["rerun", str(path), "--output-dir", str(tmp_path / "again"), "--device", "cpu", "--quiet", "--inputs", *named(folders)]) == 1
    assert capsys.readouterr().out == "equal      contexts.parquet\ndifferent  scores.parquet\nequal      tops.parquet\n2 of 3 files are equal\n"


@pytest.mark.parametrize("change, message", [
    (lambda m: m["stages"].clear(), r"has no finished stage, so there is nothing to repeat\. Name the manifest of a finished run\."),
    (lambda m: m["stages"].update(fly=m["stages"]["score"]), r"^The manifest has the stage 'fly', which this version cannot repeat\. Known are rollout, "),
    (lambda m: m["stages"]["score"]["models"].update(student="0" * 64), r"^What the manifest was made from has changed \(student of stage 'score', .*/student: was 0{64}, is [0-9a-f]{64}\)\. Bring back"),
    (lambda m: m["stages"]["rollout"]["settings"].update(prompts_sha256="0" * 64), r"prompts of stage 'rollout', .*prompts\.jsonl: was 0{64}, is [0-9a-f]{64}\)\. Bring back the earlier files\.$"),
    (lambda m: m["stages"]["analyze"]["settings"].update(training_sha256="0" * 64), r"training of stage 'analyze', .*embedded-validation: was 0{64}, is [0-9a-f]{64}\)\. Bring back"),
    (lambda m: m["stages"].pop("rollout"), r"contexts\.parquet, which no stage of the run wrote, is missing or another \(sha256 [0-9a-f]{64} is asked for\)\. Bring it back\.$"),
])
def test_what_cannot_be_repeated(done, folders, tmp_path, change, message):  # noqa: F811
    with pytest.raises(DiagnosticsError, match=message):
        rerun.rerun(manifest_of(done, tmp_path, change), tmp_path / "again", configs=_configs, do=pytest.fail, inputs=named(folders))
    assert not (tmp_path / "again").exists()


def test_the_run_itself_is_no_place_to_repeat_it(done):
    with pytest.raises(DiagnosticsError, match=r"is the run itself\. Choose a new --output-dir to repeat it in\.$"):
        rerun.rerun(done / "manifest.json", done / ".." / done.name, configs=_configs, do=pytest.fail)


def test_contexts_from_elsewhere_are_taken_from_beside_the_manifest(done, folders, tmp_path):  # noqa: F811
    shutil.copy(done / "contexts.parquet", tmp_path)
    path = manifest_of(done, tmp_path, lambda m: [m["stages"].pop(name) for name in ("rollout", "probe", "intervene", "analyze", "compare")])
    asked = []

    def do(command):
        asked.append(command)
        (tmp_path / "again/manifest.json").write_text(path.read_text())

    table = rerun.rerun(path, tmp_path / "again", configs=_configs, do=do, inputs=named(folders))
    assert (tmp_path / "again/contexts.parquet").read_bytes() == (done / "contexts.parquet").read_bytes()
    assert [command[0] for command in asked] == ["score"] and table.same.all()


def test_files_that_are_missing_count_as_different():
    record = {"settings": {}, "inputs": {}, "files": {"a": "1", "b": "2"}}
    table = rerun.compared({"stages": {"x": record, "y": record}}, {"versions": {}, "stages": {"x": {**record, "files": {"a": "1"}}}})
    expected = pd.DataFrame({"stage": ["x", "x", "y", "y"], "file": ["a", "b"] * 2, "was": ["1", "2"] * 2, "now": ["1", None, None, None],
                             "same": [True, False, False, False]})
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)
