"""A run is repeated from its manifest alone, and a stranger's manifest opens nothing."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.manifest import read_manifest
from diagnostics.pipeline import reproduce
from diagnostics.pipeline.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def done(folders, tmp_path_factory):
    """A run with a stage of every kind that is quick: measured, derived, one with a list among its
    settings.
    """
    directory = tmp_path_factory.mktemp("done") / "out"
    models, out = [*folders[:4], "--device", "cpu", "--quiet"], ["--output-dir", str(directory)]
    assert main(["rollout", *folders[:10], *models[4:], *out]) == 0
    assert main(["score", *models, "--k", "8", "--sweep", "4", *out]) == 0
    how = ["--loss", "forward_kl", "--batch-tokens", "60"]
    assert main(["probe", *models, *how, "--folds", "2", *out]) == 0
    assert (
        main(
            [
                "intervene",
                *models,
                *how,
                "--criteria",
                "teachability",
                "--budgets",
                "0.5",
                "--random-draws",
                "1",
                "--horizon",
                "2",
                "--draws",
                "20",
                *out,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "analyze",
                "--draws",
                "20",
                "--training",
                str(ROOT / "reports/embedded-validation"),
                "--quiet",
                *out,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "compare",
                "--criteria",
                "divergence,teachability",
                "--budgets",
                "0.1,0.5",
                "--draws",
                "20",
                "--seed",
                "3",
                "--quiet",
                *out,
            ]
        )
        == 0
    )
    return directory


def named(folders):
    """The paths of the student, the teacher, the prompts and the validation that the run read."""
    return [folders[1], folders[3], folders[5], str(ROOT / "reports/embedded-validation")]


@pytest.mark.slow
def test_a_run_is_repeated_from_its_manifest_file_by_file(done, folders, tmp_path, capsys):
    again = [
        "rerun",
        str(done / "manifest.json"),
        "--output-dir",
        str(tmp_path / "again"),
        "--device",
        "cpu",
        "--json",
    ]
    assert main([*again, "--inputs", *named(folders)]) == 0
    result = json.loads(capsys.readouterr().out)
    files = {
        file: digest
        for record in read_manifest(done / "manifest.json")["stages"].values()
        for file, digest in record["files"].items()
    }
    assert {row["file"]: row["now"] for row in result["files"] if row["stage"] != "joined"} == files
    assert (
        all(row["same"] and row["was"] == row["now"] for row in result["files"])
        and result["different"] == 0
    )
    assert {
        "contexts.parquet",
        "scores.parquet",
        "gains.parquet",
        "interventions.parquet",
        "tables/selection_curves.csv",
        "tokens.parquet",
    } <= {row["file"] for row in result["files"]}


def test_the_commands_are_those_that_were_given(done, folders):
    inputs = reproduce.Inputs(done, [Path(path) for path in named(folders)])
    planned = {
        command[0]: command
        for command in reproduce.commands(read_manifest(done / "manifest.json"), inputs)
    }
    assert list(planned) == ["rollout", "score", "probe", "intervene", "analyze", "compare"]
    assert {f"--student={folders[1]}", "--contexts=20", "--max-new-tokens=10", "--chat"} <= set(
        planned["rollout"]
    )
    assert {"--k=8", "--sweep=4"} <= set(planned["score"]) and {
        "--loss=forward_kl",
        "--batch-tokens=60",
    } <= set(planned["probe"])
    assert f"--training={ROOT / 'reports/embedded-validation'}" in planned["analyze"]
    assert {"--criteria=divergence,teachability", "--budgets=0.1,0.5", "--draws=20"} <= set(
        planned["compare"]
    ) and planned["compare"][-1] == "--seed=3"


def manifest_of(done, tmp_path, change):
    manifest = read_manifest(done / "manifest.json")
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "manifest.json"


def test_a_file_that_differs_is_named_and_the_exit_code_says_so(done, folders, tmp_path, capsys):
    def change(manifest):
        del (
            manifest["stages"]["intervene"],
            manifest["stages"]["compare"],
            manifest["stages"]["analyze"],
            manifest["stages"]["probe"],
            manifest["joined"],
        )
        manifest["stages"]["score"]["files"]["scores.parquet"] = "0" * 64

    path = manifest_of(done, tmp_path, change)
    assert (
        main(
            [
                "rerun",
                str(path),
                "--output-dir",
                str(tmp_path / "again"),
                "--device",
                "cpu",
                "--quiet",
                "--inputs",
                *named(folders),
            ]
        )
        == 1
    )
    assert (
        capsys.readouterr().out
        == "equal      contexts.parquet\ndifferent  scores.parquet\nequal      tops.parquet\n"
        "equal      tables/stop_tokens.csv\n3 of 4 files are equal\n"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m["stages"].clear(),
            (
                r"has no finished stage, so there is nothing to repeat\. Name the manifest of a"
                r" finished run\."
            ),
        ),
        (
            lambda m: m["stages"].update(fly=m["stages"]["score"]),
            (
                r"^The manifest has the stage 'fly', which this version cannot repeat\. Known are"
                r" rollout, "
            ),
        ),
        (
            lambda m: m["stages"]["score"]["models"].update(student="0" * 64),
            (
                r"^What the manifest was made from has changed \(student of stage 'score',"
                r" .*/student: was 0{64}, is [0-9a-f]{64}\)\. Bring back"
            ),
        ),
        (
            lambda m: m["stages"]["rollout"]["settings"].update(prompts_sha256="0" * 64),
            (
                r"prompts of stage 'rollout', .*prompts\.jsonl: was 0{64}, is [0-9a-f]{64}\)\."
                r" Bring back the earlier files\.$"
            ),
        ),
        (
            lambda m: m["stages"]["analyze"]["settings"].update(training_sha256="0" * 64),
            (
                r"training of stage 'analyze', .*embedded-validation: was 0{64}, is"
                r" [0-9a-f]{64}\)\. Bring back"
            ),
        ),
        (
            lambda m: m["stages"].pop("rollout"),
            (
                r"contexts\.parquet, which no stage of the run wrote, is missing or another"
                r" \(sha256 [0-9a-f]{64} is asked for\)\. Bring it back\.$"
            ),
        ),
    ],
)
def test_what_cannot_be_repeated(done, folders, tmp_path, change, message):
    with pytest.raises(DiagnosticsError, match=message):
        reproduce.rerun(
            manifest_of(done, tmp_path, change),
            tmp_path / "again",
            do=pytest.fail,
            inputs=named(folders),
        )
    assert not (tmp_path / "again").exists()


def test_the_run_itself_is_no_place_to_repeat_it(done):
    with pytest.raises(
        DiagnosticsError, match=r"is the run itself\. Choose a new --output-dir to repeat it in\.$"
    ):
        reproduce.rerun(done / "manifest.json", done / ".." / done.name, do=pytest.fail)


def test_contexts_from_elsewhere_are_taken_from_beside_the_manifest(done, folders, tmp_path):
    shutil.copy(done / "contexts.parquet", tmp_path)
    path = manifest_of(
        done,
        tmp_path,
        lambda m: [
            m["stages"].pop(name)
            for name in ("rollout", "probe", "intervene", "analyze", "compare")
        ],
    )
    asked = []

    def do(command):
        asked.append(command)
        (tmp_path / "again/manifest.json").write_text(path.read_text())

    table = reproduce.rerun(path, tmp_path / "again", do=do, inputs=named(folders))
    assert (tmp_path / "again/contexts.parquet").read_bytes() == (
        done / "contexts.parquet"
    ).read_bytes()
    assert [command[0] for command in asked] == ["score"] and table.same.all()


def test_files_that_are_missing_count_as_different():
    record = {"settings": {}, "inputs": {}, "files": {"a": "1", "b": "2"}}
    table = reproduce.compared(
        {"stages": {"x": record, "y": record}},
        {"versions": {}, "stages": {"x": {**record, "files": {"a": "1"}}}},
    )
    expected = pd.DataFrame(
        {
            "stage": ["x", "x", "y", "y"],
            "file": ["a", "b"] * 2,
            "was": ["1", "2"] * 2,
            "now": ["1", None, None, None],
            "same": [True, False, False, False],
        }
    )
    pd.testing.assert_frame_equal(table, expected, check_dtype=False)


# --- a stranger's manifest
# --------------------------------------------------------------------------------


def strangers(tmp_path, stage, settings=None, inputs=None, **more):
    (tmp_path / "theirs").mkdir(exist_ok=True)
    record = {"settings": settings or {}, "inputs": inputs or {}, "files": {}, **more}
    (tmp_path / "theirs/manifest.json").write_text(json.dumps({"stages": {stage: record}}))
    return tmp_path / "theirs/manifest.json"


def repeat(path, tmp_path, inputs=()):
    commands = []
    reproduce.rerun(
        path,
        tmp_path / "again",
        do=lambda command: commands.append(command) or (_ for _ in ()).throw(InterruptedError),
        inputs=inputs,
    )


@pytest.mark.parametrize(
    "stage, settings",
    [
        ("import", {"tokens": "../secret.csv"}),
        ("import", {"tokens": "/etc/hostname"}),
        ("rollout", {"prompts": "/etc/hostname"}),
        ("rollout", {"prompts": "../secret.csv"}),
        ("rollout", {"student": "../models/s", "teacher": "x/y"}),
        ("rollout", {"rollouts": "link.csv"}),
        ("validate", {"offline": "/tmp"}),
        ("analyze", {"seed": 0, "training": ".."}),
        ("train", {"trl": "../secret.csv"}),
        ("after", {"after": "/root"}),
        ("rollout", {"prompts": "hf:../data"}),
        ("rollout", {"student": "models"}),
    ],
)
def test_a_stranger_s_manifest_opens_nothing_outside_its_folder(
    tmp_path, monkeypatch, stage, settings
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.csv").write_text("a,b\n")
    (tmp_path / "models/s").mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"which is not beside the manifest, and what a manifest names elsewhere is not opened\."
            r" Name it: --inputs PATH/TO/"
        ),
    ):
        repeat(strangers(tmp_path, stage, settings), tmp_path)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("how", ["link", "folder link", "absolute", "up"])
def test_an_input_that_leads_out_is_not_copied(tmp_path, how):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "secret").write_text("password")
    name = {
        "link": "a",
        "folder link": "up/secret",
        "absolute": str(tmp_path / "secret"),
        "up": "../secret",
    }[how]
    if how == "link":
        (tmp_path / "theirs/a").symlink_to(tmp_path / "secret")
    if how == "folder link":
        (tmp_path / "theirs/up").symlink_to(tmp_path)
    path = strangers(tmp_path, "analyze", {"seed": 0}, {name: sha256_file(tmp_path / "secret")})
    with pytest.raises(
        DiagnosticsError, match=r"is a link, where|it names a file outside its directory"
    ):
        repeat(path, tmp_path)
    assert not (tmp_path / "again").exists()


def test_an_input_in_a_folder_beside_the_manifest_is_laid_in(tmp_path):
    (tmp_path / "theirs/sub").mkdir(parents=True)
    (tmp_path / "theirs/sub/x").write_text("hi")
    path = strangers(
        tmp_path, "analyze", {"seed": 0}, {"sub/x": sha256_file(tmp_path / "theirs/sub/x")}
    )
    with pytest.raises(InterruptedError):
        repeat(path, tmp_path)
    assert (tmp_path / "again/sub/x").read_text() == "hi"


def test_what_the_user_names_or_lies_beside_is_opened(tmp_path):
    (tmp_path / "theirs").mkdir()
    for place in ("prompts.jsonl", "theirs/prompts.jsonl"):
        (tmp_path / place).write_text(place)
    for place, named in (
        ("prompts.jsonl", [tmp_path / "prompts.jsonl"]),
        ("theirs/prompts.jsonl", []),
    ):
        record = {
            "settings": {
                "prompts": "/home/alice/prompts.jsonl" if named else "prompts.jsonl",
                "prompts_sha256": sha256_file(tmp_path / place),
            }
        }
        assert reproduce.Inputs(tmp_path / "theirs", named).found(
            "rollout", "prompts", record["settings"]["prompts"], record
        ) == str(tmp_path / place)


@pytest.mark.parametrize(
    "value, is_id",
    [
        ("org/model", True),
        ("gpt2", True),
        ("org/model/file.gguf", True),
        ("../x", False),
        ("/x", False),
        ("a/b/c", False),
        ("./a", False),
    ],
)
def test_an_id_on_the_hub_is_told_from_a_path(tmp_path, monkeypatch, value, is_id):
    monkeypatch.chdir(tmp_path)
    record = {"settings": {"student": value}, "models": {"student": "0" * 40}}
    if is_id:
        assert reproduce.Inputs(tmp_path).found("rollout", "student", value, record) == value
        (tmp_path / value).mkdir(parents=True)  # a local folder of that name is nobody's id
        with pytest.raises(DiagnosticsError, match="Name it: --inputs"):
            reproduce.Inputs(tmp_path / "nowhere").found("rollout", "student", value, record)
    else:
        with pytest.raises(DiagnosticsError, match="Name it: --inputs"):
            reproduce.Inputs(tmp_path).found("rollout", "student", value, record)


@pytest.mark.parametrize(
    "stage, settings, message",
    [
        (
            "analyze",
            {},
            "Stage 'analyze' of the manifest records no seed, so it cannot be repeated",
        ),
        ("compare", {}, "records no seed"),
        ("import", {}, "records no tokens"),
        ("after", {}, "records no after"),
        (
            "rollout",
            {"prompts": ["a"]},
            r"has the prompts \"\['a'\]\", which is no value of that setting",
        ),
        ("score", {"k": {"a": 1}}, "has the k .*which is no value of that setting"),
        (
            "probe",
            {"held_out": 0.5},
            r"run with held_out=0\.5, which this version no longer has\. Prompts are divided into",
        ),
    ],
)
def test_a_manifest_that_lacks_a_setting_is_one_sentence(tmp_path, stage, settings, message):
    with pytest.raises(DiagnosticsError, match=message):
        repeat(strangers(tmp_path, stage, settings), tmp_path)


def test_other_threads_are_said(caplog):
    record = {"settings": {}, "inputs": {}, "files": {}}
    reproduce.compared(
        {"stages": {"x": record | {"threads": 2}, "y": record | {"threads": 1}}},
        {"versions": {}, "stages": {"x": record | {"threads": 1}, "y": record | {"threads": 1}}},
    )
    assert (
        "other numbers of threads, which change the order of sums: x 2 then, 1 now" in caplog.text
        and "y 1" not in caplog.text
    )
