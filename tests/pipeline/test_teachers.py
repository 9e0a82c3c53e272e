"""The command `teachers`: one bank, a run per teacher, and their tables side by side."""

import json

import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.core.types import read_bank
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.teachers import teacher_names
from tests.conftest import make_model, make_pair
from tests.factories import message

QUICK = ["--contexts", "24", "--max-new-tokens", "6", "--draws", "50", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """The tiny pair, a second teacher, and prompts with domains."""
    base = tmp_path_factory.mktemp("teachers")
    make_model(9, hidden=48).save_pretrained(base / "other")
    make_pair().tokenizer.save_pretrained(base / "other")
    rows = [
        {"prompt": f"w{i} w{(7 * i) % 60}", "domain": "math" if i % 2 else "code"}
        for i in range(24)
    ]
    (base / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    teachers = ["--teacher", folders[3], "--teacher", str(base / "other")]
    return ["--student", folders[1], *teachers, "--prompts", str(base / "prompts.jsonl")]


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    assert main(["teachers", *models, *QUICK, "--output-dir", str(out)]) == 0
    return out


def test_each_teacher_has_a_run_of_the_same_bank(compared):
    banks = [read_bank(compared / name / "contexts.parquet") for name in ("teacher", "other")]
    assert list(banks[0]) == list(banks[1])
    assert {c.domain for c in banks[1]} == {"math", "code"}
    scored = [dx.read_run(compared / name).tokens for name in ("teacher", "other")]
    assert (scored[0]["student_logprob"] - scored[1]["student_logprob"]).abs().max() < 1e-5
    assert (scored[0]["forward_kl"] - scored[1]["forward_kl"]).abs().mean() > 0.01


def test_the_tables_are_those_of_the_function_with_domains(compared):
    runs = {name: compared / name for name in ("teacher", "other")}
    table = pd.read_csv(compared / "tables" / "teachers.csv")
    assert {"domain math", "domain code"} <= set(table["group"])
    domains = {c.prompt_id: c.domain for c in read_bank(runs["teacher"] / "contexts.parquet")}
    expected = dx.compare_teachers(runs, domains=domains, draws=50)["teachers"]
    pd.testing.assert_frame_equal(table, expected.reset_index(drop=True), rtol=1e-9)
    agreement = pd.read_csv(compared / "tables" / "teachers_agreement.csv")
    assert set(agreement["what"]) == {"rank correlation", "overlap", "Jaccard"}


def test_the_page_is_made_of_the_tables_and_the_manifest(compared):
    page = (compared / "teachers.html").read_text()
    assert "2 teachers of one student: teacher, other" in page
    assert 'id="table-teachers_differences"' in page and "teacher_sha256" in page
    assert (compared / "figures" / "teachers.png").is_file()
    assert set(json.loads((compared / "pages.json").read_text())) == {
        "teachers.html",
        "figures/teachers.png",
        "figures/teachers_agreement.png",
    }


def test_a_second_call_keeps_everything_and_says_the_same(models, compared, capsys):
    before = {p: p.read_bytes() for p in compared.rglob("*.parquet")}
    made = (compared / "other" / "scores.parquet").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["teachers", *models, *QUICK, "--output-dir", str(compared), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["teachers"]
    assert {p: p.read_bytes() for p in compared.rglob("*.parquet")} == before
    assert (compared / "other" / "scores.parquet").stat().st_mtime_ns == made
    assert said[0].endswith("24 prompts).") and "over all positions" in said[0]
    assert any("in domain math" in each for each in said)


def test_runs_that_are_there_are_compared_under_names(compared, tmp_path):
    command = ["teachers", "--against", str(compared / "teacher"), str(compared / "other")]
    options = ["--names", "A", "B", "--draws", "50", "--quiet", "--output-dir", str(tmp_path)]
    assert main([*command, *options]) == 0
    mine = pd.read_csv(tmp_path / "tables" / "teachers.csv")
    theirs = pd.read_csv(compared / "tables" / "teachers.csv")
    assert set(mine["teacher"]) == {"A", "B"} and mine["mean"].tolist() == theirs["mean"].tolist()


def test_a_file_of_log_probabilities_is_a_teacher(models, compared, tmp_path):
    from tests.contexts.factories import jsonl
    from tests.models.test_topk_teacher import teacher_rows

    bank = read_bank(compared / "teacher" / "contexts.parquet")
    lists = jsonl(tmp_path / "lists.jsonl", *teacher_rows(make_pair(), bank, 20, sampled=True))
    out, contexts = tmp_path / "out", str(compared / "teacher" / "contexts.parquet")
    command = ["teachers", *models[:4], "--teacher", str(lists), "--rollouts", contexts]
    assert main([*command, *QUICK[4:], "--output-dir", str(out)]) == 0
    table = pd.read_csv(out / "tables" / "teachers_differences.csv").set_index(["measure", "group"])
    bound = table.loc[("forward_kl", "all")]
    assert bound["verdict"] == "not comparable" and bound["difference"] >= -1e-6
    assert table.loc[("advantage", "all"), "difference"] == pytest.approx(0, abs=1e-4)


def test_gains_with_each_teacher(models, tmp_path):
    out = tmp_path / "out"
    probe = ["--probe", "--folds", "2", "--placebos", "0", "--horizon", ""]
    assert main(["teachers", *models, *QUICK, *probe, "--output-dir", str(out)]) == 0
    table = pd.read_csv(out / "tables" / "teachers.csv")
    assert {"gain", "context_gain"} <= set(table["measure"])


def test_names_are_those_of_the_folders():
    assert teacher_names(["a/Qwen3-8B", "org/other"], None) == ["Qwen3-8B", "other"]
    assert teacher_names(["a/b c", "x"], None) == ["b_c", "x"]
    assert "one that a folder can have" in message(teacher_names, ["a/x", "b/x"], None)
    assert "would be called tables, y" in message(teacher_names, ["a", "b"], ["tables", "y"])
    assert "Got 1 --names for 2" in message(teacher_names, ["a", "b"], ["x"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--teacher", "x"], "got 1. Give --teacher twice"),
        (["--teacher", "x", "--against", "a", "b"], "Got --teacher and --against"),
        (["--against", "nowhere", "none"], "nowhere holds no tokens.parquet"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, words, tmp_path, capsys):
    assert main(["teachers", *arguments, "--output-dir", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_comparison_is_repeated_by_its_runs(compared, tmp_path, capsys):
    command = ["rerun", str(compared / "manifest.json"), "--output-dir", str(tmp_path / "again")]
    assert main(command) == 2
    assert "Repeat those runs instead" in capsys.readouterr().err


def test_a_teachers_run_knows_where_its_models_lie(compared):
    """Later commands on it need no flag, as on any run."""
    command = ["score", "--quiet", "--device", "cpu", "--output-dir", str(compared / "other")]
    assert main(command) == 0


def test_runs_at_other_k_are_refused(compared, models, tmp_path, capsys):
    one = tmp_path / "other"
    one.mkdir()
    contexts = (compared / "other" / "contexts.parquet").read_bytes()
    (one / "contexts.parquet").write_bytes(contexts)
    run = ["--device", "cpu", "--quiet", "--output-dir", str(one)]
    assert main(["score", *models[:2], *models[4:6], "--k", "8", *run]) == 0
    command = ["teachers", "--against", str(compared / "teacher"), str(one)]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert "scored at different K (teacher: 16, other: 8)" in capsys.readouterr().err
