"""The command line: its flags are frozen, mistakes end in one paragraph, and help says it all."""

import json
import subprocess
import sys

import pytest

from diagnostics import __version__
from diagnostics.criteria import list_criteria
from diagnostics.pipeline.cli import build_parser, main
from diagnostics.pipeline.registry import COMMANDS
from tests import study_tables

NAMES = [stage.name for stage in COMMANDS]
SURFACE = {
    "run": (
        "accept-code batch-tokens beta budgets by-correctness chat chat-template-kwargs"
        " contexts criteria criterion-module device draws dtype extra folds gradient-precision"
        " horizon json k learning-rate level loss match max-new-tokens max-prompt-tokens"
        " minibatch no-chat no-offload-teacher no-shard-student no-shard-teacher nulls"
        " offload-teacher optimizer output-dir pair placebos primary prompt-column prompts"
        " prompts-split quick quiet random-draws rollout-engine rollouts rollouts-format"
        " samples-per-prompt scope seed shard-student shard-teacher step step-state student"
        " student-revision sweep teacher teacher-device teacher-dtype teacher-logprobs"
        " teacher-revision temperature top-k top-p turns verifier warm-steps"
    ),
    "ask-teacher": (
        "accept-code api-key-env concurrency criterion-module device dialect dtype json"
        " no-offload-teacher no-shard-student no-shard-teacher offload-teacher output-dir pair"
        " quiet retries served-model shard-student shard-teacher step-state student"
        " student-revision teacher teacher-device teacher-dtype teacher-logprobs"
        " teacher-revision timeout top-logprobs url"
    ),
    "analyze": (
        "against criterion-module draws json k level output-dir primary quiet seed tokenizer"
        " tokens tokens-after training"
    ),
    "compare": (
        "batch budgets criteria criterion-module draws json level output-dir quiet scope seed"
        " ties tokenizer tokens tokens-after"
    ),
    "intervene": (
        "accept-code batch-tokens beta budgets criteria criterion-module device draws dtype"
        " extra folds gradient-precision horizon json k learning-rate level loss match"
        " minibatch no-offload-teacher no-shard-student no-shard-teacher offload-teacher"
        " optimizer output-dir pair quiet random-draws scope seed shard-student shard-teacher"
        " step step-state student student-revision sweep teacher teacher-device teacher-dtype"
        " teacher-logprobs teacher-revision warm-steps"
    ),
    "attribute": (
        "accept-code batch-tokens beta criterion-module device draws dtype extra folds"
        " full-kernel gradient-precision json k level loss no-full-kernel no-offload-teacher"
        " no-shard-student no-shard-teacher offload-teacher optimizer output-dir pair quiet"
        " sample seed shard-student shard-teacher step step-state student student-revision"
        " sweep teacher teacher-device teacher-dtype teacher-logprobs teacher-revision"
    ),
    "train": (
        "accept-code accumulation batch beta budget chat chat-template-kwargs contexts"
        " criterion criterion-module device dtype eval-contexts eval-every eval-prompts"
        " eval-samples json k learning-rate lora-rank loss max-new-tokens max-prompt-tokens"
        " measure-every no-chat no-offload-teacher no-resume no-shard-student no-shard-teacher"
        " offload-teacher output-dir pair peft per-context-minimum probe-every prompt-column"
        " prompts prompts-split quiet report-to resume save-every scope seed shard-student"
        " shard-teacher step-state steps student student-revision teacher teacher-device"
        " teacher-dtype teacher-logprobs teacher-revision ties trl verifier"
    ),
    "validate": (
        "accept-code accumulation against batch budgets chat chat-template-kwargs contexts"
        " criteria criterion-module device draws dtype eval-contexts eval-every eval-prompts"
        " eval-samples json learning-rate level lora-rank loss max-new-tokens"
        " max-prompt-tokens measure-every no-chat no-offload-teacher no-resume"
        " no-shard-student no-shard-teacher offline offload-teacher output-dir pair peft"
        " probe-every prompt-column prompts prompts-split quiet report-to resume save-every"
        " scope seeds shard-student shard-teacher step-state steps student student-revision"
        " teacher teacher-device teacher-dtype teacher-logprobs teacher-revision ties trl"
        " verifier workers"
    ),
    "paper": (
        "accept-code batch budgets criterion-module curve device draws dtype json"
        " learning-rate level masks no-offload-teacher no-shard-student no-shard-teacher"
        " no-train offload-teacher output-dir pair per-context-minimum quiet seed seeds"
        " shard-student shard-teacher step-state steps student student-revision teacher"
        " teacher-device teacher-dtype teacher-logprobs teacher-revision tokenizer tokens"
        " tokens-after train workers"
    ),
    "teachers": (
        "accept-code against batch-tokens beta chat chat-template-kwargs contexts"
        " criterion-module device draws dtype extra folds gradient-precision horizon json k"
        " learning-rate level loss max-new-tokens max-prompt-tokens minibatch names no-chat"
        " no-offload-teacher no-shard-student no-shard-teacher nulls offload-teacher optimizer"
        " output-dir pair placebos probe prompt-column prompts prompts-split quiet"
        " rollout-engine rollouts rollouts-format samples-per-prompt seed shard-student"
        " shard-teacher step step-state student student-revision sweep teacher teacher-device"
        " teacher-dtype teacher-logprobs teacher-revision temperature top-k top-p turns"
        " verifier warm-steps"
    ),
    "by-correctness": "criterion-module json output-dir quiet",
    "report": (
        "against compare contexts criterion-module json output-dir pdf quiet student-name"
        " teacher-name"
    ),
    "rerun": "criterion-module device inputs json output-dir quiet",
    "coverage": "chains contexts criterion-module device dtype json k quiet student teacher",
    "criteria": "criterion-module json quiet",
    "atlas": "criterion-module json names output-dir quiet",
}


def flags(command):
    actions = build_parser()._subparsers._group_actions[0].choices[command]._actions
    return " ".join(
        sorted(
            name[2:]
            for action in actions
            for name in action.option_strings
            if name.startswith("--") and name != "--help"
        )
    )


@pytest.mark.parametrize("command", SURFACE)
def test_the_command_line_is_frozen(command):
    assert flags(command) == SURFACE[command]


def test_every_stage_says_what_it_does(capsys):
    for command in NAMES:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "example:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["run", "--pair", "nowhere", "--output-dir", "{tmp}/out"],
            "Unknown pair 'nowhere'. Known are embedded, smollm2",
        ),
        (["run", "--output-dir", "{tmp}/out"], "A pair needs both models"),
        (
            ["run", "{models}", "--prompts", "{tmp}/none.jsonl", "--output-dir", "{tmp}/out"],
            "none.jsonl cannot be read (No such file or directory)",
        ),
        (
            ["run", "{models}", "--prompts", "{tmp}/empty.jsonl", "--output-dir", "{tmp}/out"],
            "empty.jsonl holds no rows",
        ),
        (
            ["run", "{models}", "--prompts", "{tmp}/column.jsonl", "--output-dir", "{tmp}/out"],
            "has no column 'prompt' or 'messages'; it has text",
        ),
        (["run", "{models}", "--output-dir", "{tmp}/out"], "No prompts were given"),
        (
            ["run", "--pair", "embedded", "--loss", "hinge", "--output-dir", "{tmp}/out"],
            "invalid choice: 'hinge'",
        ),
        (
            [
                "run",
                "--pair",
                "embedded",
                "--step",
                "much",
                "--contexts",
                "4",
                "--output-dir",
                "{tmp}/out",
            ],
            "The step is 'auto' or a number",
        ),
        (
            [
                "run",
                "--pair",
                "embedded",
                "--chat-template-kwargs",
                "[1]",
                "--output-dir",
                "{tmp}/out",
            ],
            "--chat-template-kwargs takes a JSON object; got '[1]'",
        ),
        (
            ["run", "--pair", "embedded", "--output-dir", "{tmp}"],
            "and no manifest.json, so it is not a run of this project",
        ),
        (
            ["run", "--pair", "embedded", "--output-dir", "{tmp}/empty.jsonl"],
            "cannot be used as output directory",
        ),
        (
            ["score", "--pair", "embedded", "--output-dir", "{tmp}/out"],
            "Run the stage that writes it first",
        ),
        (["analyze", "--output-dir", "{tmp}/out"], "Run the stage that writes it first"),
        (
            ["analyze", "--tokens", "{tmp}/none.csv", "--output-dir", "{tmp}/out"],
            "none.csv is not a file",
        ),
        (["analyze", "--tokens", "{tmp}/column.jsonl", "--output-dir", "{tmp}/out"], "column"),
        (
            ["analyze", "--tokens-after", "{tmp}/none.csv", "--output-dir", "{tmp}/out"],
            "--tokens-after goes with an imported table, and there is none. Name it with --tokens.",
        ),
        (
            ["report", "--output-dir", "{tmp}/out"],
            "/out holds no manifest.json. Name the --output-dir of an earlier run.",
        ),
        (["report"], "A report goes into one directory: name it as DIR, or with --output-dir."),
        (["report", "{tmp}/a", "--output-dir", "{tmp}/b"], "A report goes into one directory"),
        (
            ["report", "--against", "{tmp}/a", "--output-dir", "{tmp}"],
            "A comparison needs two or more runs",
        ),
        (
            ["report", "--against", "{tmp}/a", "{tmp}/b", "--output-dir", "{tmp}"],
            "is not a manifest of this project (No such file or directory)",
        ),
        (["fly"], "invalid choice: 'fly'"),
        (["rn", "--pair", "embedded"], "Did you mean run?"),
        (
            ["run", "--contxts", "8", "--output-dir", "{tmp}/out"],
            "run: unrecognized arguments: --contxts 8. Did you mean --contexts?",
        ),
        (["compare", "--output", "{tmp}/out"], "the following arguments are required"),
        (
            ["intervene", "--criteria", "teachabilty", "--output-dir", "{tmp}/out"],
            "Unknown criterion 'teachabilty'. Did you mean 'teachability'?",
        ),
        (
            ["compare", "--budgets", "5", "--output-dir", "{tmp}/out"],
            "--budgets takes shares above 0 and at most 1, as 0.05 or 5%; got 5. Did you mean 5%?",
        ),
        (
            ["run", "{models}", "--prompts", "{tmp}/three.jsonl", "--output-dir", "{tmp}/out"],
            "3 prompts cannot be divided into 4 folds, one step on each. Use at least 20 prompts",
        ),
        (["--quiet"], "the following arguments are required"),
    ],
)
def test_mistakes_end_in_one_paragraph_and_code_2(arguments, words, tmp_path, folders, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "column.jsonl").write_text('{"text": "w1"}\n')
    (tmp_path / "three.jsonl").write_text('{"prompt": "w1"}\n' * 3)
    expanded = [
        part
        for a in arguments
        for part in (folders[:4] if a == "{models}" else [a.format(tmp=tmp_path)])
    ]
    assert main(expanded) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and words in error
    assert (tmp_path / "column.jsonl").read_text() == '{"text": "w1"}\n'


def test_an_unknown_flag_points_to_the_help_of_its_stage(capsys):
    assert main(["compare", "--output-dir", "x", "--contexts", "8"]) == 2
    assert capsys.readouterr().err.endswith(" compare --help`.\n")


@pytest.mark.parametrize("word", ["against", "compare"])
def test_another_run_is_against_and_the_earlier_word_works(word, tmp_path, capsys):
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["report", f"--{word}", *runs, "--output-dir", str(tmp_path)]) == 2
    assert "is not a manifest of this project" in capsys.readouterr().err


def test_reports_from_files_alone_with_as_many_contexts_as_asked_for(tmp_path, capsys):
    directory = study_tables.write_run(tmp_path / "one")
    for count in (0, 3):
        assert main(["report", str(directory), "--contexts", str(count), "--quiet"]) == 0
        page = (directory / "report.html").read_text(encoding="utf-8")
        assert (
            page.count('<div class="tokenview">') == (count > 0)
            and page.count('"prompt_id":"p') == count
        )
    assert capsys.readouterr().out == f"report: {directory / 'report.html'}\n" * 2


def test_runs_side_by_side_are_one_page(tmp_path, capsys):
    runs = [str(study_tables.write_run(tmp_path / name)) for name in ("one", "two")]
    assert (
        main(["report", "--against", *runs, "--output-dir", str(tmp_path / "both"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out) == {
        "report": str(tmp_path / "both" / "compare.html")
    }
    page = (tmp_path / "both" / "compare.html").read_text(encoding="utf-8")
    assert (
        "<title>2 runs side by side</title>" in page
        and "<b>one.</b>" in page
        and "<b>two.</b>" in page
    )


def test_a_stranger_sees_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics", "analyze", "--output-dir", str(tmp_path / "x")],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and done.stderr.startswith("error: ")
    )


def test_criteria_are_listed(capsys):
    assert main(["criteria"]) == 0
    assert "teachability" in capsys.readouterr().out
    assert main(["criteria", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["criteria"]
    assert {"name", "formula", "kind"} <= listed[0].keys()


@pytest.mark.parametrize("width", [60, 100])
def test_criteria_fit_the_terminal_and_the_recommended_stand_first(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["criteria"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert max(map(len, lines)) == width and any(line.endswith("…") for line in lines)
    assert lines[0].split()[:2] == ["name", "kind"]
    starred = [line.startswith("*") for line in lines[1:]]
    assert starred[0] and starred == sorted(starred, reverse=True)
    listed = list_criteria()
    assert [line.split()[starred[at]] for at, line in enumerate(lines[1:])] == [*listed.index]
    assert sum(starred) == listed.recommended.sum()


def test_criteria_are_whole_where_nothing_cuts_them(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", None)  # no terminal, as in a pipe
    assert main(["criteria"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and all(formula in shown for formula in list_criteria().formula)


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "exit codes: 0 done; 1 a repeated run has other files; 2 the input or the machine cannot be"
        " used"
        in shown
        and "130 stopped by the user" in shown
    )


def test_without_arguments_help_is_printed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and all(command in shown for command in NAMES)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"opd-diagnostics {__version__}\n"


@pytest.mark.parametrize(
    "started, name",
    [
        ("/usr/bin/opd-diagnostics", "opd-diagnostics"),
        ("/site-packages/diagnostics/__main__.py", "python -m diagnostics"),
    ],
)
def test_the_program_names_itself_as_it_was_started(started, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [started])
    assert main(["run", "--loss", "hinge"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {name} run: ")
    with pytest.raises(SystemExit):
        main(["criteria", "--help"])
    shown = capsys.readouterr().out
    assert f"usage: {name} criteria" in shown and f"example:\n  {name} criteria" in shown


def test_listing_needs_no_torch():
    code = (
        "import sys; from diagnostics.pipeline.cli import main; main(['criteria']); print('torch'"
        " in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        .stdout.strip()
        .endswith("False")
    )


def test_an_interrupt_keeps_what_is_finished(monkeypatch, capsys, tmp_path):
    from diagnostics.pipeline.stages import rollout

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "rollout_stage", interrupted)
    assert main(["rollout", "--pair", "embedded", "--output-dir", str(tmp_path / "x")]) == 130
    assert "what was finished is kept" in capsys.readouterr().err
