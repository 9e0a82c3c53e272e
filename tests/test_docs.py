"""Generated pages follow the code, and the site builds without a warning."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.core.schema import SCHEMA
from diagnostics.pipeline.registry import COMMANDS

ROOT = Path(__file__).parent.parent


def test_generated_pages_follow_the_code():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "pages are current\n" and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "contributing" / "index.html").exists()
    assert (tmp_path / "notebooks" / "00_which_criterion" / "index.html").exists()
    for name in ("decision", "horizon_criteria", "correlations", "q3_contrast"):
        assert (tmp_path / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    for stage in COMMANDS:
        assert (tmp_path / "stages" / stage.name / "index.html").exists(), stage.name
    probe, statistics, columns = (
        (tmp_path / name / "index.html").read_text()
        for name in ("stages/probe", "statistics", "columns")
    )
    assert (
        "<code>--folds</code>" in probe
        and "one step on each, all others held out for it" in probe
        and "diagnostics.probing.one_step.probe" in probe
    )
    assert "diagnostics.analysis.bootstrap.PromptClusters" in statistics and all(
        f"<code>{name}</code>" in columns for name in SCHEMA
    )
    assert not [
        path
        for path in tmp_path.rglob("*.html")
        if "https://cdn" in path.read_text() or "fonts.googleapis" in path.read_text()
    ]


def script():
    """`scripts/docs.py` as a module."""
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_its_parameters_and_a_sentence_on_a_page():
    import diagnostics as dx

    table, reference = script().public_names(), script().reference()
    for name in dx.__all__:
        (row,) = (line for line in table.split("\n") if line.startswith(f"| [`dx.{name}`]["))
        target = row.split("][")[1].split("]")[0]
        assert name == "plot" or f"::: {target}" in reference
        assert len(row.split("|")[2].strip()) > 10, row


def test_the_glossary_has_every_claim_and_the_words_of_the_tutorial():
    glossary = (ROOT / "docs" / "glossary.md").read_text().lower()
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    assert all(f"| **c{number}** |" in glossary for number in range(1, 6))
    words = set(re.findall(r"(?<!\*)\*([A-Za-z0-9 ]+)\*(?!\*)", tutorial))
    aside = {"Words in", "all", "another", "before", "italics"}
    for word in words - aside - {"supported", "refuted", "inconclusive"}:
        assert word.lower().removesuffix("s") in glossary, word


def test_the_picture_of_the_readme_is_there_and_explained():
    readme = (ROOT / "README.md").read_text()
    assert "](docs/decision.png)\n\n*How to read it:*" in readme
    assert (ROOT / "docs" / "decision.png").read_bytes()[:4] == b"\x89PNG"


def test_every_room_of_the_contract_has_its_modules_on_the_page_of_the_structure():
    page = (ROOT / "docs" / "structure.md").read_text()
    for path in (ROOT / "diagnostics").rglob("*.py"):
        room, *inner = path.relative_to(ROOT / "diagnostics").parts
        if room.startswith("__"):
            continue
        section = page.split(f"### {room.removesuffix('.py')}\n")[1].split("\n### ")[0]
        assert inner in ([], ["__init__.py"]) or f"| `{'/'.join(inner)}` |" in section, path


def test_pages_of_the_commands_name_modules_that_exist():
    for stage in COMMANDS:
        for module in stage.modules:
            assert importlib.util.find_spec(f"diagnostics.{module}"), (stage.name, module)


def test_the_page_of_the_commands_names_each_with_what_it_reads_and_writes():
    page = (ROOT / "docs" / "commands.md").read_text()
    for stage in COMMANDS:
        assert f"| `{stage.name}` | {stage.purpose} | {stage.reads} | {stage.writes} |" in page


def test_the_readme_stays_narrow():
    lines = (ROOT / "README.md").read_text().split("\n")
    assert [line for line in lines if len(line) > 100] == []


def test_readme_shows_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {target}" in readme for target in ("demo", "test", "real"))
