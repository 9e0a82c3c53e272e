import io
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.core import files, fingerprints, manifest, progress
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file, write_atomic
from diagnostics.core.fingerprints import versions
from diagnostics.core.progress import Shards
from diagnostics.core.tables import write_csv, write_parquet
from diagnostics.pipeline.run import Run, open_run
from diagnostics.report import written_pages


def write(run, text):
    return lambda: write_atomic(run.path("a.txt"), text) and {"letters": len(text)}


def test_a_stage_is_done_once(tmp_path):
    with open_run(tmp_path) as run:
        assert run.stage("one", settings={"x": 1}, outputs=["a.txt"], work=write(run, b"hello"))
        assert not run.stage("one", settings={"x": 1}, outputs=["a.txt"], work=write(run, b"other"))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"]["one"]["facts"] == {"letters": 5}
    assert manifest["stages"]["one"]["files"] == {"a.txt": sha256_file(tmp_path / "a.txt")}


def test_a_damaged_file_is_written_again(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
        (tmp_path / "a.txt").write_bytes(b"hellx")
        assert run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_other_settings_are_refused_and_nothing_changes(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={"x": 1, "y": 2}, outputs=["a.txt"], work=write(run, b"hello"))
        with pytest.raises(
            DiagnosticsError,
            match=r"holds stage 'one' of another configuration \(setting x: was 1, now 3\)\. Nothing was overwritten",
        ):
            run.stage(
                "one", settings={"x": 3, "y": 2}, outputs=["a.txt"], work=write(run, b"other")
            )
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_a_derived_stage_follows_its_input(tmp_path):
    with open_run(tmp_path) as run:
        write_atomic(run.path("in.txt"), b"1")
        arguments = dict(settings={}, inputs=["in.txt"], outputs=lambda: ["a.txt"], derived=True)
        assert run.stage("one", work=write(run, b"first"), **arguments)
        write_atomic(run.path("in.txt"), b"2")
        assert run.stage("one", work=write(run, b"second"), **arguments)
    assert (tmp_path / "a.txt").read_bytes() == b"second"


def stage(run, **changed):
    write_atomic(run.path("in.txt"), b"1")
    options = dict(
        settings={},
        inputs=["in.txt"],
        outputs=["a.txt"],
        work=write(run, b"hello"),
        code=("statistics",),
        models=lambda: {"student": "s1"},
    )
    return run.stage("one", **options | changed)


@pytest.fixture
def other_code(monkeypatch):
    """From the call on, the modules hash as if one of them had been edited."""
    return lambda: monkeypatch.setattr(
        fingerprints, "code_version", lambda *_: "0.0.0 0123456789abcdef"
    )


def test_other_models_are_refused_with_the_difference(tmp_path):
    with open_run(tmp_path) as run:
        assert stage(run)
        for name in ("one", "two"):  # by the stage itself, and by any other of the same directory
            with pytest.raises(
                DiagnosticsError,
                match=r"holds stage 'one' of another configuration \(model student: was 's1', now 's2'\)\. Nothing was",
            ):
                run.stage(
                    name,
                    settings={},
                    outputs=["a.txt"],
                    inputs=["in.txt"],
                    work=write(run, b"x"),
                    models=lambda: {"student": "s2"},
                    derived=name == "two",
                )
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_other_code_is_refused_with_the_difference(tmp_path, other_code):
    with open_run(tmp_path) as run:
        stage(run)
        was = run.manifest["stages"]["one"]["code"]["version"]
        other_code()
        with pytest.raises(DiagnosticsError) as refused:
            stage(run, work=write(run, b"other"))
    assert str(refused.value) == (
        f"{tmp_path} holds stage 'one' of another version of this program (code version: was {was!r}, now '0.0.0 0123456789abcdef'). "
        "Nothing was overwritten. Choose another --output-dir, that version, or --accept-code to keep what it measured."
    )
    assert (tmp_path / "a.txt").read_bytes() == b"hello"


def test_what_other_code_measured_can_be_kept(tmp_path, other_code, caplog):
    with open_run(tmp_path) as run:
        stage(run)
    record = json.loads((tmp_path / "manifest.json").read_text())["stages"]["one"]
    other_code()
    with open_run(tmp_path, accept_code=True) as run:
        assert not stage(run, work=write(run, b"other"))
    assert (
        "one: kept, though another version of this program measured it (code version: was"
        in caplog.text
    )
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["one"] == record


def test_tables_follow_the_code(tmp_path, other_code):
    with open_run(tmp_path) as run:
        assert stage(run, derived=True) and not stage(run, derived=True)
        other_code()
        assert stage(run, derived=True, work=write(run, b"newer"))
    assert (tmp_path / "a.txt").read_bytes() == b"newer"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of some modules in place of this one, and its code version, not cached."""
    sources = {
        "types": "X = 1",
        "base": "from diagnostics.core.types import X",
        "top": "def f():\n    from diagnostics import base, runs\n",
        "apart": "Y = 2",
        "runs": "Z = 3",
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
    for name, changes in (("apart", False), ("runs", False), ("types", True)):
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


CODE = '"""Module."""\nX = 1\n"""What X is."""\n\ndef f(a, b=2):\n    """Add."""\n    # why\n    return a + b\n\n\nclass C:\n    """A class."""\n    y: int = 3\n'


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
        match=r"^The source .*base\.py cannot be read \(.*\), so this program cannot say which code measured\. Install the package again\.$",
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


def test_a_damaged_input_is_not_read(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
        (tmp_path / "a.txt").write_bytes(b"hellx")
        with pytest.raises(
            DiagnosticsError,
            match=r"Stage 'two' reads .*a\.txt, which is not as it was written: its sha256 is .*Run the stage that writes it again\.",
        ):
            run.stage("two", settings={}, inputs=["a.txt"], outputs=[], work=dict)


def test_a_joined_file_s_damage_is_seen(tmp_path):
    with open_run(tmp_path) as run:
        write_atomic(run.path("joined.txt"), b"hello")
        run.record_file("joined.txt")
        run.stage("two", settings={}, inputs=["joined.txt"], outputs=[], work=dict, derived=True)
        (tmp_path / "joined.txt").write_bytes(b"hellx")
        with pytest.raises(DiagnosticsError, match="is not as it was written"):
            run.stage(
                "two", settings={}, inputs=["joined.txt"], outputs=[], work=dict, derived=True
            )


def test_an_older_record_is_not_asked_for_what_it_does_not_know(tmp_path):
    with open_run(tmp_path) as run:
        stage(run)
        record = run.manifest["stages"]["one"]
        del record["models"], record["code"]
        assert not stage(run, settings={"new": None})


def test_missing_input_names_the_remedy(tmp_path):
    with (
        open_run(tmp_path) as run,
        pytest.raises(
            DiagnosticsError,
            match=r"Stage 'two' reads .*b\.txt, which is not there\. Run the stage",
        ),
    ):
        run.stage("two", settings={}, inputs=["b.txt"], outputs=[], work=dict)


def test_one_process_at_a_time(tmp_path):
    with open_run(tmp_path), pytest.raises(DiagnosticsError, match="is in use by another process"):
        with open_run(tmp_path):
            raise AssertionError("the lock was given twice")


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DiagnosticsError, match=r"holds 'thesis\.tex' and no manifest\.json"):
        with open_run(tmp_path):
            raise AssertionError("opened")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticsError, match="cannot be used as output directory"):
        with open_run(tmp_path / "file"):
            raise AssertionError("opened")


def test_a_broken_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DiagnosticsError, match="is not a manifest of this project"):
        Run(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DiagnosticsError,
        match=r"a cannot be written \(No space left on device\)\. Nothing finished was lost\. Make room or choose another",
    ):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_equal_tables_give_equal_bytes(tmp_path):
    frame = pd.DataFrame({"x": [0.1, 2.0], "name": ["a", "b"]})
    for write_table in (write_parquet, write_csv):
        first, second = (
            write_table(tmp_path / "1", frame).read_bytes(),
            write_table(tmp_path / "2", frame.copy()).read_bytes(),
        )
        assert first == second


def test_versions_name_what_decides_numbers():
    assert {"python", "opd-diagnostics", "torch", "transformers", "pandas"} <= versions().keys()


@pytest.fixture
def at_once(monkeypatch):
    """Every batch is written when it is done."""
    monkeypatch.setattr(progress, "SHARD_SECONDS", 0.0)


def test_shards_give_back_what_was_kept_in_the_order_asked(tmp_path, at_once):
    first = Shards(tmp_path / "pass")
    first.add([4, 2], {"x": np.array([0.1, -0.0]), "y": np.array([np.nan, np.inf])})
    first.add([7], {"x": np.array([1e-300]), "y": np.array([-np.inf])})
    again = Shards(tmp_path / "pass")
    assert again.take([2, 7, 4]).x.tolist() == [-0.0, 1e-300, 0.1] and np.signbit(
        again.take([2]).x.iloc[0]
    )
    assert again.take([7, 4]).y.iloc[0] == -np.inf and np.isnan(again.take([7, 4]).y.iloc[1])
    assert again.take([2, 3]) is None and Shards(tmp_path / "other").take([2]) is None


def test_a_damaged_shard_is_left_out(tmp_path, at_once, caplog):
    shards = Shards(tmp_path)
    shards.add([0], {"x": np.array([1.0])})
    shards.add([1], {"x": np.array([2.0])})
    path = next(path for path in tmp_path.iterdir() if pd.read_parquet(path).row[0] == 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = Shards(tmp_path)
    assert again.take([0]).x.tolist() == [1.0] and again.take([1]) is None
    assert f"{path} is damaged and left out" in caplog.text


def test_shards_wait_until_a_write_is_worth_it(tmp_path):
    shards = Shards(tmp_path)
    shards.add([0], {"x": np.array([1.0])})
    assert os.listdir(tmp_path) == []
    shards._since -= progress.SHARD_SECONDS
    shards.add([1], {"x": np.array([2.0])})
    assert len(os.listdir(tmp_path)) == 1 and Shards(tmp_path).take([0, 1]).x.tolist() == [1.0, 2.0]


def test_a_full_disk_does_not_stop_a_stage_that_could_end(tmp_path, at_once, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    Shards(tmp_path).add([0], {"x": np.array([1.0])})
    assert (
        "cannot be written (No space left on device): a killed run would do this part again"
        in caplog.text
    )
    assert os.listdir(tmp_path) == []


def test_a_stage_clears_its_shards_when_it_ends_and_only_then(tmp_path, at_once):
    def work(end):
        shards = run.shards("pass")
        seen.append(shards.take([0]) is not None)
        shards.add([0], {"x": np.array([1.0])})
        if not end:
            raise KeyboardInterrupt
        write_atomic(run.path("a.txt"), b"x")

    seen = []
    with open_run(tmp_path) as run:
        for settings, end in (({"k": 1}, False), ({"k": 2}, False), ({"k": 1}, True)):
            try:
                run.stage(
                    "one", settings=settings, outputs=["a.txt"], work=lambda end=end: work(end)
                )
            except KeyboardInterrupt:
                assert (tmp_path / ".partial").is_dir()
    assert seen == [False, False, True]  # another fingerprint takes up nothing
    assert not (tmp_path / ".partial").exists()


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
    (tmp_path / "tables").mkdir()
    for folder in (tmp_path, tmp_path / "tables"):
        (folder / ".0123456789abcdef.opd.tmp").write_bytes(b"hel")
    with open_run(tmp_path):
        assert (
            sorted(os.listdir(tmp_path)) == [".lock", "a.txt", "manifest.json", "tables"]
            and os.listdir(tmp_path / "tables") == []
        )


def test_what_somebody_else_had_begun_to_write_stays(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
    for name in (
        ".notes.tmp",
        "tables/.notes.tmp",
        "mine/.0123456789abcdef.opd.tmp",
        "tables/.x.tmp/deep",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".fedcba9876543210.opd.tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with open_run(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_is_ours_from_the_first_file_on(tmp_path):
    def killed():
        write_atomic(run.path("tokens.parquet"), b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(tmp_path) as run:
        run.stage("import", settings={}, outputs=["tokens.parquet"], work=killed)
    with open_run(tmp_path) as run:
        assert run.manifest["stages"] == {}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, quiet, shown",
    [(Terminal, False, True), (io.StringIO, False, False), (Terminal, True, False)],
)
def test_progress_is_for_terminals_and_not_for_logs(stream, quiet, shown, monkeypatch):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(progress, "_quiet", False)
    progress.set_quiet(quiet)
    with progress.progress(total=40, description="score") as bar:
        bar.update(10)
        bar.refresh()
        text = bar.format_dict | {"rate": 5.0, "elapsed": 2.0}
        line = (
            bar.format_meter(**{key: value for key, value in text.items() if key != "ncols"})
            if shown
            else ""
        )
    assert bool(stderr.getvalue()) == shown
    assert ("10/40 [00:02<00:06,  5.00 positions/s]" in line) == shown


# --- what a stranger, or the user, put into the directory
# -------------------------------------------------


def finished(directory):
    with open_run(directory) as run:
        run.stage(
            "analyze",
            settings={},
            outputs=["tables/a.csv"],
            work=lambda: write_atomic(run.path("tables/a.csv"), b"x\n1\n") and None,
        )
    return directory


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def elsewhere(tmp_path):
    for name in ("analyze-0123456789abcdef/data", "notes.txt", ".lock"):
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / name).write_bytes(b"precious")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize(
    "name", [".partial", "tables", "figures", "cells", "checkpoints", "student"]
)
def test_a_folder_of_ours_that_is_a_link_is_refused_and_untouched(tmp_path, elsewhere, name):
    directory, before = finished(tmp_path / "run"), contents(elsewhere)
    if (directory / name).exists():
        (directory / name / "a.csv").unlink()
        (directory / name).rmdir()
    (directory / name).symlink_to(elsewhere)
    with pytest.raises(
        DiagnosticsError, match=rf"{name} is a link, where this program keeps a folder of its own"
    ):
        finished(directory)
    assert contents(elsewhere) == before and (directory / name).is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        ".lock",
        "manifest.json",
        "contexts.parquet",
        "tokens.parquet",
        "report.html",
        "metrics.jsonl",
        "tables/a.csv",
        "student/model.safetensors",
    ],
)
def test_a_file_of_ours_that_is_a_link_is_refused_and_untouched(tmp_path, elsewhere, name):
    directory, before = finished(tmp_path / "run"), contents(elsewhere)
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(elsewhere / "notes.txt")
    with pytest.raises(
        DiagnosticsError, match=rf"{name} is a link, where this program keeps a file of its own"
    ):
        finished(directory)
    assert contents(elsewhere) == before


@pytest.mark.parametrize("name", [".lock", "manifest.json", "tables/a.csv"])
def test_a_pipe_in_place_of_a_file_does_not_hold_us_up(tmp_path, name):
    directory, refused = finished(tmp_path / "run"), []
    (directory / name).unlink()
    os.mkfifo(directory / name)

    def again():
        try:
            finished(directory)
        except DiagnosticsError as error:
            refused.append(str(error))

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    thread.join(60)  # a pipe without a writer would wait for ever
    assert (
        not thread.is_alive()
        and f"{name} is a pipe, where this program keeps a file of its own" in refused[0]
    )


def test_a_link_that_is_none_of_ours_is_left_alone(tmp_path, elsewhere):
    directory = finished(tmp_path / "run")
    (directory / "notes").symlink_to(elsewhere)
    finished(directory)
    assert (directory / "notes").is_symlink() and (
        elsewhere / "notes.txt"
    ).read_bytes() == b"precious"


def test_a_foreign_folder_keeps_its_lock_and_gets_none(tmp_path, elsewhere):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/a.tex").write_bytes(b"x")
    for folder in (elsewhere, tmp_path / "theirs"):
        before = contents(folder)
        with (
            pytest.raises(
                DiagnosticsError, match="and no manifest.json, so it is not a run of this project"
            ),
            open_run(folder),
        ):
            raise AssertionError("opened")
        assert contents(folder) == before


def test_only_finished_parts_of_the_stage_are_removed(tmp_path, at_once):
    def work():
        run.shards("pass").add([0], {"x": np.array([1.0])})
        (tmp_path / ".partial/mine").mkdir()
        (tmp_path / ".partial/one-theirs").mkdir()
        for name in (
            "mine/x.parquet",
            "one-theirs/x.parquet",
            f"{run._partial.name}/pass/notes.txt",
        ):
            (tmp_path / ".partial" / name).write_bytes(b"mine")
        write_atomic(run.path("a.txt"), b"x")

    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=work)
    left = sorted(path.name for path in (tmp_path / ".partial").rglob("*") if path.is_file())
    assert left == ["notes.txt", "x.parquet", "x.parquet"]


# --- files of no record
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [["a.txt"], lambda: ["a.txt"] if Path("/").exists() else []])
def test_an_unrecorded_file_is_not_replaced(tmp_path, outputs):
    with open_run(tmp_path) as run:
        run.stage("none", settings={}, outputs=[], work=dict)
        (tmp_path / "a.txt").write_bytes(b"my own")
        with pytest.raises(
            DiagnosticsError,
            match=r"a\.txt is there, and manifest\.json has no record of it, so it is not this program's to replace\. "
            r"Nothing was overwritten\. Move it away, or choose another --output-dir\.$",
        ):
            run.stage(
                "one", settings={}, outputs=outputs, work=lambda: pytest.fail("the work was done")
            )
    assert (tmp_path / "a.txt").read_bytes() == b"my own"
    with open_run(tmp_path) as run:
        (tmp_path / "a.txt").unlink()  # moved away, as the sentence says
        assert run.stage("one", settings={}, outputs=outputs, work=write(run, b"ours"))


def test_an_unrecorded_table_is_not_replaced_though_its_name_is_known_only_in_the_end(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("none", settings={}, outputs=[], work=dict)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_bytes(b"my own")
    for _ in range(2):  # the second time after an interrupted one
        with pytest.raises(
            DiagnosticsError,
            match=r"tables/a\.csv is there, and manifest\.json has no record of it",
        ):
            finished(tmp_path)
    assert (tmp_path / "tables/a.csv").read_bytes() == b"my own"
    (tmp_path / "tables/a.csv").rename(tmp_path / "mine.csv")
    finished(tmp_path)
    assert (tmp_path / "tables/a.csv").read_bytes() == b"x\n1\n" and (
        tmp_path / "mine.csv"
    ).read_bytes() == b"my own"


@pytest.mark.parametrize("interrupted, then", [("one", "one"), ("one", "two")])
def test_what_an_interrupted_stage_had_written_is_ours(tmp_path, interrupted, then):
    def killed():
        write_atomic(run.path("a.txt"), b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(tmp_path) as run:
        run.stage(interrupted, settings={}, outputs=["a.txt"], work=killed)
    with open_run(tmp_path) as run:
        assert run.stage(then, settings={}, outputs=["a.txt"], work=write(run, b"whole"))
    assert (tmp_path / "a.txt").read_bytes() == b"whole"


def test_a_joined_file_of_no_record_is_not_replaced_and_an_interrupted_one_is(tmp_path):
    def join():
        with open_run(tmp_path) as run, run.joining("j.txt"):
            write_atomic(run.path("j.txt"), b"joined")
            if not seen.append(1) and len(seen) == 1:
                raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        join()
    join()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (
        manifest["joined"] == {"j.txt": sha256_file(tmp_path / "j.txt")} and "begun" not in manifest
    )
    del manifest["joined"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DiagnosticsError, match=r"j\.txt is there, and manifest\.json has no record of it"
    ):
        join()


@pytest.mark.parametrize("name", ["contexts.parquet", "tables/a.csv", "scores.parquet"])
def test_a_lost_manifest_protects_what_was_measured(tmp_path, name):
    directory = finished(tmp_path / "run")
    (directory / name).write_bytes(b"measured")
    (directory / "manifest.json").unlink()
    before = contents(directory)
    with pytest.raises(
        DiagnosticsError,
        match=r"no manifest\.json, so nothing says with which settings its files were made\. Nothing was overwritten\. Bring",
    ):
        finished(directory)
    assert contents(directory) == before


# --- pages
# ----------------------------------------------------------------------------------------------


def test_pages_are_replaced_only_as_they_were_written(tmp_path):
    written_pages.write_pages(tmp_path, {"a.html": b"one", "figures/x.png": b"p"})
    written_pages.write_pages(tmp_path, {"a.html": b"two", "figures/x.png": b"q"})
    assert (tmp_path / "a.html").read_bytes() == b"two"
    for name, content, said in (
        ("a.html", b"edited", "is not as it was written"),
        ("b.html", b"theirs", "is there, and pages.json has no record of it"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DiagnosticsError,
            match=f"{name} {said}, so it is not this program's to replace. Nothing was overwritten. Move it away, or",
        ):
            written_pages.write_pages(tmp_path, {"figures/x.png": b"r", name: b"three"})
        assert (tmp_path / name).read_bytes() == content and (
            tmp_path / "figures/x.png"
        ).read_bytes() == b"q"
        (tmp_path / name).unlink()


def test_pages_whose_writing_was_interrupted_are_ours(tmp_path, monkeypatch):
    pages = {"a.html": b"one", "b.html": b"one"}
    written_pages.write_pages(tmp_path, pages)
    with monkeypatch.context() as patch:
        patch.setattr(
            files,
            "write_atomic",
            lambda path, content: (
                (_ for _ in ()).throw(KeyboardInterrupt)
                if path.name == "b.html"
                else write_atomic(path, content)
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            written_pages.write_pages(tmp_path, dict.fromkeys(pages, b"two"))
    written_pages.write_pages(tmp_path, dict.fromkeys(pages, b"two"))
    assert {name: (tmp_path / name).read_bytes() for name in pages} == dict.fromkeys(pages, b"two")


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1}'])
def test_a_damaged_record_of_pages_is_refused(tmp_path, content):
    (tmp_path / "pages.json").write_text(content)
    with pytest.raises(DiagnosticsError, match="pages.json"):
        written_pages.write_pages(tmp_path, {"a.html": b"x"})
    assert os.listdir(tmp_path) == ["pages.json"]


# --- what a record tells
# --------------------------------------------------------------------------------


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


def test_an_older_record_with_whole_paths_is_the_same_setting(tmp_path):
    (tmp_path / "small").mkdir()
    with open_run(tmp_path / "run") as run:
        assert stage(run, settings={"student": str(tmp_path / "small")})
        run.manifest["stages"]["one"]["settings"]["student"] = "/home/alice/models/small"
        assert not stage(run, settings={"student": str(tmp_path / "small")})
        run.manifest["stages"]["one"]["settings"]["student"] = "/home/alice/models/other"
        with pytest.raises(
            DiagnosticsError, match="setting student: was '/home/alice/models/other', now 'small'"
        ):
            stage(run, settings={"student": str(tmp_path / "small")})


def test_a_file_made_again_on_other_threads_is_said(tmp_path, monkeypatch, caplog):
    number = iter((2, 2, 1, 1))
    monkeypatch.setattr(fingerprints, "threads", lambda **_: next(number))
    with open_run(tmp_path) as run:
        for content, expected in (
            (b"a", ""),
            (b"b", "came out with other bytes than before, on as many threads"),
            (
                b"c",
                "one: a.txt came out with other bytes than before; threads were 2 and are 1, which changes the order of sums",
            ),
            (b"c", ""),
        ):
            (tmp_path / "a.txt").unlink(missing_ok=True)
            caplog.clear()
            run.stage("one", settings={}, outputs=["a.txt"], work=write(run, content))
            assert expected in caplog.text and bool(expected) == bool(caplog.text)
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["one"]["threads"] == 1


def test_the_number_of_threads_is_that_which_was_asked_for(monkeypatch):
    import torch

    assert fingerprints.threads(models=True) == torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert fingerprints.threads(models=False) == 3
    for value in ("", "many", "0"):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert fingerprints.threads(models=False) == len(os.sched_getaffinity(0))


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


def test_a_file_of_another_run_is_compared_with_its_manifest(tmp_path, caplog):
    directory = finished(tmp_path / "run")
    assert (
        manifest.unchanged(directory, "tables/a.csv") == directory / "tables/a.csv"
        and caplog.text == ""
    )
    (directory / "tables/b.csv").write_bytes(b"x")
    assert (
        manifest.unchanged(directory, "tables/b.csv")
        and "tables/b.csv is in no record of its run's manifest.json" in caplog.text
    )
    (directory / "tables/a.csv").write_bytes(b"x\n2\n")
    with pytest.raises(
        DiagnosticsError,
        match=r"tables/a\.csv is not as it was written: its sha256 is .*Run the stage that writes it again in .*, or name another run\.$",
    ):
        manifest.unchanged(directory, "tables/a.csv")
