"""Fingerprints: code, files, libraries and threads that a result depends on."""

import os
import zipfile

import pytest

from diagnostics.core import fingerprints
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file
from diagnostics.core.fingerprints import versions


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of some modules in place of this one, and its code version, not cached."""
    sources = {
        "core/types": "X = 1",
        "base": "from diagnostics.core.types import X",
        "top": (
            "def f():\n    from diagnostics import base\n    from diagnostics.core import files\n"
        ),
        "apart": "Y = 2",
        "core/files": "Z = 3",
        "inner/__init__": "",
        "inner/near": "N = 1",
        "inner/deep/__init__": "",
        "inner/deep/far": "F = 1",
        "absolute": "import diagnostics.inner.near",
        "named": "from diagnostics.inner import near",
        "attribute": "from diagnostics.inner.near import N",
        "inner/relative": "from . import near",
        "inner/relative_attribute": "from .near import N",
        "inner/deep/up": "from ..near import N",
        "inner/deep/top": "from ... import apart",
        "by_package": "from diagnostics import inner",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(fingerprints, "PACKAGE", tmp_path)
    return tmp_path


code_version = fingerprints.code_version.__wrapped__


def test_a_code_version_covers_what_is_imported_and_no_more(package):
    before = code_version("top")
    for name, changes in (("apart", False), ("core/files", False), ("core/types", True)):
        (package / f"{name}.py").write_text("W = 9")
        assert (code_version("top") != before) == changes, name


@pytest.mark.parametrize(
    "name, reads",
    [
        ("absolute", "inner/near"),
        ("named", "inner/near"),
        ("attribute", "inner/near"),
        ("inner.relative", "inner/near"),
        ("inner.relative_attribute", "inner/near"),
        ("inner.deep.up", "inner/near"),
        ("inner.deep.top", "apart"),
        ("by_package", "inner/__init__"),
        ("attribute", "inner/__init__"),
        ("inner.deep.far", "inner/deep/__init__"),
    ],
)
def test_a_code_version_knows_sub_packages(package, name, reads):
    before = code_version(name)
    (package / "inner/deep/far.py").write_text("F = 2") if "far" not in name else None
    assert code_version(name) == before
    (package / f"{reads}.py").write_text("W = 9")
    assert code_version(name) != before


CODE = '''"""Module."""
X = 1
"""What X is."""

def f(a, b=2):
    """Add."""
    # why
    return a + b


class C:
    """A class."""
    y: int = 3
'''


@pytest.mark.parametrize(
    "was, now, changes",
    [
        ("Module.", "Another word.", False),
        ("What X is.", "What it is.", False),
        ("Add.", "Adds.", False),
        ("A class.", "One.", False),
        ("# why", "# because", False),
        ("a + b", "(a +\n            b)", False),
        ('    """Add."""\n', "", False),
        ("a + b", "a - b", True),
        ("b=2", "b=3", True),
        ("X = 1", "X = 1.0", True),
        ("X = 1", "X = '1'", True),
        ("y: int", "z: int", True),
        ("def f", "def g", True),
        ("X = 1", "X = None", True),
        ("return a + b", "return", True),
    ],
)
def test_words_change_no_code_version_and_code_does(package, was, now, changes):
    (package / "base.py").write_text(CODE)
    before = code_version("base")
    assert CODE.replace(was, now) != CODE
    (package / "base.py").write_text(CODE.replace(was, now))
    assert (code_version("base") != before) == changes


def test_a_package_in_an_archive_has_a_code_version(package, tmp_path_factory, monkeypatch):
    before, archive = code_version("named"), tmp_path_factory.mktemp("zip") / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in package.rglob("*.py"):
            file.write(path, f"diagnostics/{path.relative_to(package)}")
    monkeypatch.setattr(fingerprints, "PACKAGE", zipfile.Path(archive, "diagnostics/"))
    assert code_version("named") == before


def test_source_that_cannot_be_read_is_said(package):
    (package / "base.py").write_text("def")
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^The source .*base\.py cannot be read \(.*\), so this program cannot say which code"
            r" measured\. Install the package again\.$"
        ),
    ):
        code_version("base")


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = fingerprints.fingerprint_files(folder)
    (folder / "README.md").write_text("words change nothing")
    assert fingerprints.fingerprint_files(folder) == before
    (folder / "model.safetensors").write_bytes(b"weighTs")
    flipped = fingerprints.fingerprint_files(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert len({before, flipped, fingerprints.fingerprint_files(folder)}) == 3
    assert fingerprints.fingerprint_files(folder / "other.safetensors") == sha256_file(
        folder / "other.safetensors"
    )


def test_versions_name_what_decides_numbers():
    assert {"python", "opd-diagnostics", "torch", "transformers", "pandas"} <= versions().keys()


def test_the_number_of_threads_is_that_which_was_asked_for(monkeypatch):
    import torch

    assert fingerprints.threads(models=True) == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fingerprints.threads(models=False) == 3
    for value in ("", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert fingerprints.threads(models=False) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("models.pair", "models.config"),
        ("contexts.rollouts", "contexts.config"),
        ("probing.scores", "probing.config.scores"),
        ("probing.one_step", "probing.config.step"),
        ("probing.one_step", "probing.config.controls"),
        ("probing.intervention", "probing.config.intervention"),
        ("probing.attribution", "probing.config.attribution"),
        ("training.run", "training.config"),
    ],
)
def test_settings_are_part_of_the_code_that_reads_them(module, settings):
    assert settings in fingerprints._imported([module])


def test_settings_of_an_intervention_are_no_part_of_what_scores():
    """A new option of one stage does not make the finished files of another one old."""
    configs = {name for name in fingerprints._imported(["probing.scores"]) if ".config" in name}
    assert configs == {"models.config", "probing.config", "probing.config.scores"}
