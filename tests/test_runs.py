import io
import json
import os

import numpy as np
import pandas as pd
import pytest

from diagnostics import runs
from diagnostics.runs import Run, Shards, open_run, sha256_file, versions, write_atomic, write_csv, write_parquet
from diagnostics.types import DiagnosticsError


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
        with pytest.raises(DiagnosticsError, match=r"holds stage 'one' of another configuration \(setting x: was 1, now 3\)\. Nothing was overwritten"):
            run.stage("one", settings={"x": 3, "y": 2}, outputs=["a.txt"], work=write(run, b"other"))
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
    options = dict(settings={}, inputs=["in.txt"], outputs=["a.txt"], work=write(run, b"hello"), code=("statistics",), models=lambda: {"student": "s1"})
    return run.stage("one", **options | changed)


@pytest.fixture
def other_code(monkeypatch):
    """From the call on, the modules hash as if one of them had been edited."""
    return lambda: monkeypatch.setattr(runs, "code_version", lambda *_: "0.0.0 0123456789abcdef")


def test_other_models_are_refused_with_the_difference(tmp_path):
    with open_run(tmp_path) as run:
        assert stage(run)
        for name in ("one", "two"):  # by the stage itself, and by any other of the same directory
            with pytest.raises(DiagnosticsError, match=r"holds stage 'one' of another configuration \(model student: was 's1', now 's2'\)\. Nothing was"):
                run.stage(name, settings={}, outputs=["a.txt"], inputs=["in.txt"], work=write(run, b"x"), models=lambda: {"student": "s2"}, derived=name == "two")
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
    assert "one: kept, though another version of this program measured it (code version: was" in caplog.text
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["one"] == record


def test_tables_follow_the_code(tmp_path, other_code):
    with open_run(tmp_path) as run:
        assert stage(run, derived=True) and not stage(run, derived=True)
        other_code()
        assert stage(run, derived=True, work=write(run, b"newer"))
    assert (tmp_path / "a.txt").read_bytes() == b"newer"


def test_a_code_version_covers_what_is_imported_and_no_more(tmp_path, monkeypatch):
    for name, source in {"types": "X = 1", "base": "from diagnostics.types import X", "top": "def f():\n    from diagnostics import base, runs\n",
                         "apart": "Y = 2", "runs": "Z = 3"}.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "diagnostics").symlink_to(tmp_path)
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "diagnostics")
    code_version = runs.code_version.__wrapped__
    before = code_version("top")
    for name, changes in (("apart", False), ("runs", False), ("types", True)):
        (tmp_path / f"{name}.py").write_text("W = 9")
        assert (code_version("top") != before) == changes, name


def test_a_fingerprint_is_of_names_and_contents(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    before = runs.fingerprint_files(folder)
    (folder / "README.md").write_text("words change nothing")
    assert runs.fingerprint_files(folder) == before
    (folder / "model.safetensors").write_bytes(b"weighTs")
    flipped = runs.fingerprint_files(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert len({before, flipped, runs.fingerprint_files(folder)}) == 3
    assert runs.fingerprint_files(folder / "other.safetensors") == sha256_file(folder / "other.safetensors")


def test_a_damaged_input_is_not_read(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
        (tmp_path / "a.txt").write_bytes(b"hellx")
        with pytest.raises(DiagnosticsError, match=r"Stage 'two' reads .*a\.txt, which is not as it was written: its sha256 is .*Run the stage that writes it again\."):
            run.stage("two", settings={}, inputs=["a.txt"], outputs=[], work=dict)


def test_a_joined_file_s_damage_is_seen(tmp_path):
    with open_run(tmp_path) as run:
        write_atomic(run.path("joined.txt"), b"hello")
        run.record_file("joined.txt")
        run.stage("two", settings={}, inputs=["joined.txt"], outputs=[], work=dict, derived=True)
        (tmp_path / "joined.txt").write_bytes(b"hellx")
        with pytest.raises(DiagnosticsError, match="is not as it was written"):
            run.stage("two", settings={}, inputs=["joined.txt"], outputs=[], work=dict, derived=True)


def test_an_older_record_is_not_asked_for_what_it_does_not_know(tmp_path):
    with open_run(tmp_path) as run:
        stage(run)
        record = run.manifest["stages"]["one"]
        del record["models"], record["code"]
        assert not stage(run, settings={"new": None})


def test_missing_input_names_the_remedy(tmp_path):
    with open_run(tmp_path) as run, pytest.raises(DiagnosticsError, match=r"Stage 'two' reads .*b\.txt, which is not there\. Run the stage"):
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
    with pytest.raises(DiagnosticsError, match=r"a cannot be written \(No space left on device\)\. Nothing finished was lost\. Make room or choose another"):
        write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_equal_tables_give_equal_bytes(tmp_path):
    frame = pd.DataFrame({"x": [0.1, 2.0], "name": ["a", "b"]})
    for write_table in (write_parquet, write_csv):
        first, second = write_table(tmp_path / "1", frame).read_bytes(), write_table(tmp_path / "2", frame.copy()).read_bytes()
        assert first == second


def test_versions_name_what_decides_numbers():
    assert {"python", "opd-diagnostics", "torch", "transformers", "pandas"} <= versions().keys()


@pytest.fixture
def at_once(monkeypatch):
    """Every batch is written when it is done."""
    monkeypatch.setattr(runs, "SHARD_SECONDS", 0.0)


def test_shards_give_back_what_was_kept_in_the_order_asked(tmp_path, at_once):
    first = Shards(tmp_path / "pass")
    first.add([4, 2], {"x": np.array([0.1, -0.0]), "y": np.array([np.nan, np.inf])})
    first.add([7], {"x": np.array([1e-300]), "y": np.array([-np.inf])})
    again = Shards(tmp_path / "pass")
    assert again.take([2, 7, 4]).x.tolist() == [-0.0, 1e-300, 0.1] and np.signbit(again.take([2]).x.iloc[0])
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
    shards._since -= runs.SHARD_SECONDS
    shards.add([1], {"x": np.array([2.0])})
    assert len(os.listdir(tmp_path)) == 1 and Shards(tmp_path).take([0, 1]).x.tolist() == [1.0, 2.0]


def test_a_full_disk_does_not_stop_a_stage_that_could_end(tmp_path, at_once, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    Shards(tmp_path).add([0], {"x": np.array([1.0])})
    assert "cannot be written (No space left on device): a killed run would do this part again" in caplog.text
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
                run.stage("one", settings=settings, outputs=["a.txt"], work=lambda end=end: work(end))
            except KeyboardInterrupt:
                assert (tmp_path / ".partial").is_dir()
    assert seen == [False, False, True]  # another fingerprint takes up nothing
    assert not (tmp_path / ".partial").exists()


def test_what_a_killed_process_had_begun_to_write_is_removed(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
    (tmp_path / ".a.txt.k3j2.tmp").write_bytes(b"hel")
    with open_run(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "a.txt", "manifest.json"]


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


@pytest.mark.parametrize("stream, quiet, shown", [(Terminal, False, True), (io.StringIO, False, False), (Terminal, True, False)])
def test_progress_is_for_terminals_and_not_for_logs(stream, quiet, shown, monkeypatch):
    stderr = stream()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(runs, "_quiet", False)
    runs.set_quiet(quiet)
    with runs.progress(total=40, description="score") as bar:
        bar.update(10)
        bar.refresh()
        text = bar.format_dict | {"rate": 5.0, "elapsed": 2.0}
        line = bar.format_meter(**{key: value for key, value in text.items() if key != "ncols"}) if shown else ""
    assert bool(stderr.getvalue()) == shown
    assert ("10/40 [00:02<00:06,  5.00 positions/s]" in line) == shown
