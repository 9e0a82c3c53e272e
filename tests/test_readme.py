"""What the README and the tutorial show can be typed: commands at a small size, and code."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from diagnostics.core.tables import read_csv
from diagnostics.models.named_pairs import embedded_folders
from diagnostics.pipeline.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/tutorial.md", "docs/python.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SMALL = (
    "--contexts 8 --max-new-tokens 10 --folds 2 --criteria teachability --budgets 10%"
    " --random-draws 1 --horizon 1 --minibatch 4 --draws 20"
)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def lines(page: str) -> list[list[str]]:
    """The words of every command in the blocks of a page, without comments."""
    whole = "\n".join(blocks(page, "")).replace("\\\n", " ")
    parts = [part for line in whole.split("\n") for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def commands(page: str) -> list[list[str]]:
    return [words[1:] for words in lines(page) if words[0] == "opd-diagnostics"]


def test_the_readme_has_commands_and_code():
    assert len(commands("README.md")) >= 6 and len(blocks("README.md", "python")) >= 2
    assert all(blocks(page, "python") for page in PAGES)


@pytest.mark.parametrize("page", PAGES[:2])
def test_every_command_of_a_page_is_one_of_ours(page):
    for words in commands(page):
        assert build_parser(words[0]).parse_args(words).command == words[0]


def test_the_readme_installs_extras_and_makes_targets_that_exist():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = re.findall(r"\[([a-z,]+)\]\"", "\n".join(blocks("README.md", "")))
    assert shown and all(extra in known for part in shown for extra in part.split(","))
    targets = re.findall(r"`make (\w+)`", (ROOT / "README.md").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{target}: " in makefile for target in targets)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_compiles_and_names_what_exists(page):
    import diagnostics as dx

    for code in blocks(page, "python"):
        compile(code, page, "exec")
        for name in re.findall(r"\bdx\.(\w+)", code):
            assert hasattr(dx, name), name


def test_the_numbers_of_the_readme_are_those_of_the_committed_study():
    table = read_csv(ROOT / "reports" / "embedded-probe" / "tables" / "decision.csv")
    (chosen,) = table[table.recommended].to_dict("records")
    text = " ".join((ROOT / "README.md").read_text().split())
    said = f"{chosen['criterion']} at {chosen['budget']:.0%}".replace("%", " %")
    assert f"here {said}, with {chosen['prompts']} prompts and {chosen['steps']} step" in text


def small(words: list[str], folder: Path) -> list[str]:
    """A command at a small size, on models and prompts that are here."""
    student, teacher = map(str, embedded_folders())
    here = {"SMALL": student, "LARGE": teacher}
    return [here.get(word, word) for word in words] + (SMALL.split() if words[0] == "run" else [])


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    prompts = [f'{{"prompt": "Tom has {n} pears and buys {n + 2} ."}}' for n in range(2, 12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    (own,) = (code for code in blocks("README.md", "python") if "@dx.criterion" in code)
    (tmp_path / "mine.py").write_text(own)
    for words in commands("README.md"):
        assert main([*small(words, tmp_path), "--quiet"]) == 0, words
    for folder in ("mine", "demo"):
        assert (tmp_path / folder / "report.html").stat().st_size > 10_000
    decided = read_csv(tmp_path / "demo" / "tables" / "decision.csv")
    assert {"margin", "hellinger", "teachability"} <= set(decided.criterion)
    cells = read_csv(tmp_path / "demo" / "tables" / "intervention.csv")
    assert "sure_rejection" in set(cells.criterion)


@pytest.mark.slow
def test_the_python_of_the_readme_runs(registry):
    for code in blocks("README.md", "python"):
        code = re.sub(r"dx\.sums\(\d+", "dx.sums(12", code)
        code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=10", code)
        scope: dict = {}
        exec(compile(code, "README.md", "exec"), scope)
    assert len(scope["table"]) and len(scope["bank"]) == 12
