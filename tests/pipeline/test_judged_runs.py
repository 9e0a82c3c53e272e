"""Verdicts, extra measurements and fused criteria through the command line and the manifest."""

import hashlib
import json

import pandas as pd
import pytest

from diagnostics.core.tables import write_parquet
from diagnostics.pipeline.cli import main
from tests.made_tokens import made_tokens


@pytest.fixture(scope="module")
def judged(folders, tmp_path_factory):
    """A run whose responses were judged by a file of one's own, scored with an extra."""
    base = tmp_path_factory.mktemp("judged")
    rows = [{"prompt": f"w{i} w{(7 * i) % 60}", "answer": str(i % 3)} for i in range(6)]
    (base / "answered.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "mine.py").write_text(
        "def judge(response, answer):\n"
        "    if answer == '2':\n"
        "        raise ValueError('no number')\n"
        "    return answer == '1'\n"
    )
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    run = str(base / "run")
    sampled = ["--prompts", str(base / "answered.jsonl"), "--max-new-tokens", "4"]
    sampled += ["--verifier", f"{base / 'mine.py'}:judge"]
    assert main(["rollout", *models, *sampled, "--output-dir", run]) == 0
    assert main(["score", *models, "--extra", "ier", "--k", "4", "--output-dir", run]) == 0
    return base


def test_the_manifest_names_the_function_by_its_hash_and_counts_its_errors(judged):
    manifest = json.loads((judged / "run" / "manifest.json").read_text())
    settings = manifest["stages"]["rollout"]["settings"]
    assert settings["verifier"] == "own" and settings["verifier_function"] == "mine.py:judge"
    digest = hashlib.sha256((judged / "mine.py").read_bytes()).hexdigest()
    assert settings["verifier_sha256"] == digest
    assert manifest["stages"]["rollout"]["facts"]["correct"] == {
        "right": 2,
        "wrong": 2,
        "without_answer": 0,
        "undecided": 0,
        "failed": 2,
        "first_failure": "ValueError: no number",
    }
    assert str(judged) not in json.dumps(manifest)


def test_every_position_knows_its_verdict_and_its_extra(judged):
    contexts = pd.read_parquet(judged / "run" / "contexts.parquet")
    assert contexts.correct.tolist() == [False, True, None] * 2
    tokens = pd.read_parquet(judged / "run" / "tokens.parquet")
    by_context = tokens.groupby("context_id", sort=False).correct.first()
    assert by_context.fillna(2).tolist() == [0, 1, 2] * 2
    extras = tokens[["ier_signal", "ier_noise", "ier_full_noise", "ier_signal_k8"]]
    assert extras.notna().all(axis=None)
    assert "teacher_top1_gap" not in tokens


def test_another_function_is_another_configuration(judged, folders, capsys):
    (judged / "other.py").write_text("def judge(response, answer):\n    return True\n")
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    command = ["rollout", *models, "--prompts", str(judged / "answered.jsonl")]
    command += ["--max-new-tokens", "4", "--output-dir", str(judged / "run")]
    assert main([*command, "--verifier", f"{judged / 'other.py'}:judge"]) == 2
    assert "verifier_function: was 'mine.py:judge', now 'other.py:judge'" in capsys.readouterr().err


def test_a_manifest_never_runs_a_function(judged, tmp_path, monkeypatch, capsys):
    """The file lies beside the manifest, and in the working directory, and is not run all the
    same.
    """
    monkeypatch.chdir(judged)
    command = ["rerun", str(judged / "run" / "manifest.json"), "--output-dir", str(tmp_path / "r")]
    models = [str(judged.parent), str(judged / "answered.jsonl")]
    code = main([*command, "--inputs", *models, *map(str, judged.parent.glob("pair*/*"))])
    said = capsys.readouterr().err
    assert code == 2 and "a function is not run because a manifest names it" in said
    assert not (tmp_path / "r" / "contexts.parquet").exists()


def test_an_unknown_extra_is_refused_before_anything_is_scored(judged, folders, capsys):
    models = [*folders[:4], "--device", "cpu", "--quiet"]
    assert main(["score", *models, "--extra", "iers", "--output-dir", str(judged / "run")]) == 2
    assert capsys.readouterr().err.startswith(
        "error: Unknown extra measurement 'iers'. Did you mean 'ier'? Known are ier,"
    )


def test_a_fused_name_goes_through_flags_tables_and_manifest(tmp_path, capsys):
    write_parquet(tmp_path / "t.parquet", made_tokens())
    command = ["compare", "--tokens", str(tmp_path / "t.parquet"), "--draws", "20", "--quiet"]
    command += ["--output-dir", str(tmp_path / "run"), "--budgets", "10%"]
    names = "teachability_and_entropy,entropy_or_advantage_abs"
    assert main([*command, "--criteria", names]) == 0
    curves = pd.read_csv(tmp_path / "run" / "tables" / "selection_curves.csv")
    assert set(names.split(",")) <= set(curves.criterion)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["compare"]["settings"]["criteria"] == names.split(",")
    assert main([*command, "--criteria", "teachability_and_entrop"]) == 2
    assert "'entrop' is none. Did you mean 'entropy'?" in capsys.readouterr().err
