"""The manifest: what is refused, and what it records of settings."""

import pytest

from diagnostics.core import manifest
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.run import Run


def test_a_broken_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DiagnosticsError, match="is not a manifest of this project"):
        Run(tmp_path)


def test_settings_name_inputs_by_their_last_name_and_no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home/alice"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/small").mkdir(parents=True)
    settings = {
        "student": "models/small",
        "teacher": str(tmp_path / "gone/large"),
        "prompts": f"hf:{tmp_path}/models",
        "after": "org/model",
        "eval_prompts": None,
        "chat_template_kwargs": f'{{"x": "{tmp_path}/home/alice/y"}}',
        "criteria": ("a", f"{tmp_path}/home/alice/b"),
        "seed": 0,
        "trl": "../up/x.json",
    }
    assert manifest.recorded(settings) == {
        "student": "small",
        "teacher": "large",
        "prompts": "hf:models",
        "after": "org/model",
        "eval_prompts": None,
        "chat_template_kwargs": '{"x": "~/y"}',
        "criteria": ["a", "~/b"],
        "seed": 0,
        "trl": "x.json",
    }
    apart = [
        manifest.recorded({"student": str(tmp_path / name / "same")}, apart=True)
        for name in ("a", "b")
    ]
    assert (
        apart[0]["student"] == apart[1]["student"] == "same"
        and apart[0]["student_place"] != apart[1]["student_place"]
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"stages": {}, "x": ' + "[" * 40 + "]" * 40 + "}", "or 32 levels"),
        ("[" * 100_000, "recursion|Expecting"),
        ('{"stages": {}, "begun": {"x": 3}}', "what was begun is no list of names"),
        (
            '{"stages": {"x": {"settings": {}, "inputs": {}, "files": {"a\\u0000b": "c"}}}}',
            "it names a file outside its directory",
        ),
    ],
)
def test_a_manifest_that_is_too_deep_or_leads_out_is_refused(tmp_path, content, reason):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(
        DiagnosticsError, match=rf"is not a manifest of this project \(.*({reason})"
    ):
        Run(tmp_path)
