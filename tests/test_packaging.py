"""What a user installs: complete archives, a wheel that works anywhere, one requirements list."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from diagnostics.models import named_pairs, pair

ROOT = Path(__file__).resolve().parent.parent
ABSENT = (".gitignore", "docs/.gitignore")
"""Files of a checkout that the source archive does without."""


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def tracked():
    """Files of the checkout, as git lists them; another folder than a checkout cannot tell."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout: its files cannot be told from what a build left")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [name for name in names if (ROOT / name).is_file()]


def build(kind, source, out):
    """Build an archive in `source`, which the build writes into; returns the archive's path."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.strip().split("\n")[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source archive of a copy of the checkout."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return build("sdist", copy, out)


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is built from the source archive, so that the archive has to be enough."""
    source = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    return build("wheel", next(source.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel installed, and nothing of the checkout."""
    site = tmp_path_factory.mktemp("site")
    command = [
        *"-m pip install --quiet --no-deps --no-index --target".split(),
        str(site),
        str(wheel),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return site


def run_installed(site, *command, folder):
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_source_archive_holds_every_file_of_the_checkout(sdist):
    with tarfile.open(sdist) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert sorted(set(tracked()) - held - set(ABSENT)) == []


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {name for name in tracked() if name.startswith("diagnostics/")}
    expected |= {f"diagnostics/assets/{name[5:]}" for name in tracked() if name.startswith("data/")}
    assert held == expected and "diagnostics/py.typed" in held


@pytest.mark.slow
def test_the_installed_program_runs_the_main_job_in_another_folder(installed, tmp_path):
    program = str(installed / "bin" / "opd-diagnostics")
    assert "usage: opd-diagnostics" in run_installed(installed, program, folder=tmp_path)
    options = "--quick --pair embedded --contexts 8 --max-new-tokens 16 --draws 20".split()
    run_installed(installed, program, "run", *options, "--output-dir", "x", folder=tmp_path)
    stages = json.loads((tmp_path / "x" / "manifest.json").read_text())["stages"]
    assert {"rollout", "score", "probe", "analyze"} <= set(stages)
    assert (tmp_path / "x" / "report.html").exists()


@pytest.mark.slow
def test_a_notebook_of_the_installed_package_loads_the_embedded_pair(installed, tmp_path):
    code = "import diagnostics as dx; print(dx.__file__); print(dx.load_pair('embedded').name)"
    file, name = run_installed(installed, sys.executable, "-c", code, folder=tmp_path).split()
    assert Path(file).is_relative_to(installed) and name == "embedded"


def test_an_installation_without_its_data_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(named_pairs, "DATA", tmp_path)
    with pytest.raises(
        pair.DiagnosticsError, match=r"embedded pair is missing .* holds no config\.json\. Install"
    ):
        pair.load_pair("embedded")


def test_a_checkout_reads_its_own_data():
    assert named_pairs.data_folder() == ROOT / "data" or named_pairs.data_folder().name == "assets"
    assert (named_pairs.data_folder() / "prompts.jsonl").is_file()


def test_requirements_follow_from_the_project_file():
    script = load_script("requirements")
    texts = [(ROOT / name).read_text() for name in ("pyproject.toml", "requirements.lock")]
    assert script.requirements(*texts) == (ROOT / "requirements.txt").read_text()


PROJECT = (
    '[project]\ndependencies = ["a_b>=1.5"]\noptional-dependencies = { more = ["c", "A-b"] }\n'
)


def test_requirements_are_the_lock_at_what_the_project_names():
    script = load_script("requirements")
    text = script.requirements(
        PROJECT, "a-b==1.6 \\\n    --hash=x\nc==3 ; os_name == 'nt' \\\nd==9 \\\n"
    )
    assert text == script.HEAD + "# run\na-b==1.6\n# more\nc==3 ; os_name == 'nt'\n"
    assert script.only(text, ["more"]) == "c==3 ; os_name == 'nt'\n"
    with pytest.raises(script.Behind, match="has no group 'less'; it has run, more"):
        script.only(text, ["less"])


@pytest.mark.parametrize(
    ("lock", "words"),
    [
        ("c==3 \\\n", "requirements.lock lacks a-b"),
        ("a-b==1.4 \\\nc==3 \\\n", "requirements.lock has a-b 1.4, not >=1.5"),
    ],
)
def test_a_lock_that_is_behind_is_refused(lock, words):
    script = load_script("requirements")
    with pytest.raises(script.Behind, match=words):
        script.requirements(PROJECT, lock)
