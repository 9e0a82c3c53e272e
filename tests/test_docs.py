import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.core.schema import SCHEMA
from diagnostics.pipeline.cli import PURPOSE

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
    for name in PURPOSE:
        if name != "criteria":
            assert (tmp_path / "stages" / name / "index.html").exists(), name
    probe, statistics, columns = (
        (tmp_path / name / "index.html").read_text()
        for name in ("stages/probe", "statistics", "columns")
    )
    assert (
        "<code>--held-out</code>" in probe
        and "share of prompts that carry no loss" in probe
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


def test_readme_names_every_module():
    readme = (ROOT / "README.md").read_text()
    missing = [
        path.name
        for path in (ROOT / "diagnostics").glob("*.py")
        if not path.name.startswith("__") and f"  {path.name}" not in readme
    ]
    assert missing == []


def test_readme_shows_the_commands():
    readme = (ROOT / "README.md").read_text()
    assert all(f"make {target}" in readme for target in ("demo", "test", "real"))
