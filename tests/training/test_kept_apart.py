"""What a training's files tell, and which contexts it believes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from diagnostics.report import run_results
from diagnostics.training import grid

EMBEDDED = Path(__file__).parents[2] / "data/embedded"
SHORT = "--steps 2 --batch 2 --max-new-tokens 3 --eval-contexts 2 --quiet".split()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with both models, prompts and settings in it."""
    home = tmp_path / "home-of-alice"
    for name in ("student", "teacher"):
        shutil.copytree(EMBEDDED / name, home / name)
    rows = [json.dumps({"prompt": f"{n} + {n} =", "answer": str(2 * n)}) for n in range(8)]
    (home / "p.jsonl").write_text("\n".join(rows))
    (home / "peft.json").write_text('{"lora_alpha": 3}')
    monkeypatch.setenv("HOME", str(home))
    return home


def files_that_tell(directory, words):
    return [
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    ]


def test_an_adapter_s_checkpoints_tell_no_folder(home, tmp_path):
    models = ["--student", str(home / "student"), "--teacher", str(home / "teacher")]
    given = [*models, "--prompts", str(home / "p.jsonl"), "--lora-rank", "2", "--save-every", "1"]
    given += ["--peft", str(home / "peft.json")]
    assert main(["train", *given, *SHORT, "--output-dir", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o/checkpoints/checkpoint-2/adapter_config.json").is_file()
    assert files_that_tell(tmp_path / "o", [str(home), str(tmp_path)]) == []
    shutil.rmtree(tmp_path / "o/checkpoints/checkpoint-2")
    manifest = json.loads((tmp_path / "o/manifest.json").read_text())
    weights = (tmp_path / "o/student/model.safetensors").read_bytes()
    del manifest["stages"]["train"]
    (tmp_path / "o/manifest.json").write_text(json.dumps(manifest))
    assert main(["train", *given, *SHORT, "--resume", "--output-dir", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o/student/model.safetensors").read_bytes() == weights


def test_a_cell_s_record_holds_engine_options_by_content():
    engine = {"peft": "/home/alice/peft.json", "trl": "/home/alice/trl.json", "lora_rank": 2}
    job = grid.Job(Path("cells"), {}, {}, {}, {}, engine, {"peft_sha256": "a", "trl_sha256": "b"})
    assert job.engine_identity == {"peft": "a", "trl": "b", "lora_rank": 2}


def test_the_contexts_that_a_training_froze_are_its_own(tmp_path, caplog):
    train = ["train", "--pair", "embedded", *SHORT, "--output-dir", str(tmp_path)]
    assert main(train) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert "contexts.parquet" in manifest["stages"]["train"]["files"]
    assert not run_results.read_run(tmp_path).reading_notes
    assert main(train) == 0
    edited = pd.read_parquet(tmp_path / "contexts.parquet")[:-1]
    edited.to_parquet(tmp_path / "contexts.parquet", index=False)
    assert any("contexts.parquet" in said for said in run_results.read_run(tmp_path).reading_notes)


def test_contexts_of_a_rollout_that_were_changed_are_not_trained_against(tmp_path, capsys):
    rollout = ["rollout", "--pair", "embedded", "--contexts", "3", "--max-new-tokens", "3"]
    assert main([*rollout, "--quiet", "--output-dir", str(tmp_path)]) == 0
    edited = pd.read_parquet(tmp_path / "contexts.parquet")[:-1]
    edited.to_parquet(tmp_path / "contexts.parquet", index=False)
    before = (tmp_path / "contexts.parquet").read_bytes()
    assert main(["train", "--pair", "embedded", *SHORT, "--output-dir", str(tmp_path)]) == 2
    assert "not as it was written" in capsys.readouterr().err
    assert (tmp_path / "contexts.parquet").read_bytes() == before


def test_held_out_prompts_of_a_pair_with_a_task_may_come_from_a_file(tmp_path):
    from diagnostics.contexts.choose_prompts import training_prompts
    from diagnostics.contexts.prompts import PromptConfig
    from diagnostics.models.identity import Models
    from diagnostics.models.pair import PairConfig
    from diagnostics.training.evaluation import EvaluationConfig

    (tmp_path / "e.jsonl").write_text('{"prompt": "3 + 4 =", "answer": "7"}\n')
    models = Models(PairConfig(pair="embedded"))
    evaluation = EvaluationConfig(eval_prompts=str(tmp_path / "e.jsonl"), eval_contexts=1)
    data, held_out = training_prompts(models, PromptConfig(), evaluation, needed=2, seed=0)
    assert len(data) == 2 and "3 + 4 =" in held_out[0].prompt
    evaluation = EvaluationConfig(eval_prompts=str(tmp_path / "none.jsonl"), eval_contexts=1)
    with pytest.raises(DiagnosticsError, match=r"none\.jsonl"):
        training_prompts(models, PromptConfig(), evaluation, needed=2, seed=0)
