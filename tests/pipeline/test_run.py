"""The run directory: stages are done once, and nothing that somebody wrote is overwritten."""

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from diagnostics.core import manifest
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.files import sha256_file, write_atomic
from diagnostics.pipeline import run as run_directory
from diagnostics.pipeline.run import open_run
from diagnostics.report import written_pages
from tests.factories import contents


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
            match=r"holds stage 'one' of another configuration \(setting x: was 1, now 3\)\."
            r" Nothing was overwritten",
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
        code=("analysis.bootstrap",),
        models=lambda: {"student": "s1"},
    )
    return run.stage("one", **options | changed)


@pytest.fixture
def other_code(monkeypatch):
    """From the call on, the modules hash as if one of them had been edited."""
    return lambda: monkeypatch.setattr(
        run_directory, "code_version", lambda *_: "0.0.0 0123456789abcdef"
    )


def test_other_models_are_refused_with_the_difference(tmp_path):
    with open_run(tmp_path) as run:
        assert stage(run)
        for name in ("one", "two"):  # by the stage itself, and by any other of the same directory
            with pytest.raises(
                DiagnosticsError,
                match=r"holds stage 'one' of another configuration \(model student: was 's1',"
                r" now 's2'\)\. Nothing was",
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
        f"{tmp_path} holds stage 'one' of another version of this program (code version: was"
        f" {was!r}, now '0.0.0 0123456789abcdef'). "
        "Nothing was overwritten. Choose another --output-dir, that version, or --accept-code"
        " to keep what it measured."
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


def test_a_damaged_input_is_not_read(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("one", settings={}, outputs=["a.txt"], work=write(run, b"hello"))
        (tmp_path / "a.txt").write_bytes(b"hellx")
        with pytest.raises(
            DiagnosticsError,
            match=r"Stage 'two' reads .*a\.txt, which is not as it was written: its sha256 is"
            r" .*Run the stage that writes it again\.",
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
            match=r"a\.txt is there, and manifest\.json has no record of it, so it is not this"
            r" program's to replace\. "
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
        match=r"no manifest\.json, so nothing says with which settings its files were made\."
        r" Nothing was overwritten\. Bring",
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
            match=f"{name} {said}, so it is not this program's to replace. Nothing was"
            " overwritten. Move it away, or",
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
            written_pages,
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
    with pytest.raises(DiagnosticsError, match=r"pages\.json"):
        written_pages.write_pages(tmp_path, {"a.html": b"x"})
    assert os.listdir(tmp_path) == ["pages.json"]


# --- what a record tells
# --------------------------------------------------------------------------------


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


def test_an_older_record_names_the_size_that_is_chosen_now(tmp_path):
    """8,192 tokens were the default; where nothing is asked for they are chosen on the CPU."""
    with open_run(tmp_path) as run:
        assert stage(run, settings={"batch_tokens": 8192})
        assert not stage(run, settings={"batch_tokens": None})
        with pytest.raises(DiagnosticsError, match="setting batch_tokens: was 8192, now 60"):
            stage(run, settings={"batch_tokens": 60})
        run.manifest["stages"]["one"]["settings"]["batch_tokens"] = 60
        with pytest.raises(DiagnosticsError, match="setting batch_tokens: was 60, now None"):
            stage(run, settings={"batch_tokens": None})


def test_a_file_made_again_on_other_threads_is_said(tmp_path, monkeypatch, caplog):
    number = iter((2, 2, 1, 1))
    monkeypatch.setattr(run_directory, "threads", lambda **_: next(number))
    with open_run(tmp_path) as run:
        for content, expected in (
            (b"a", ""),
            (b"b", "came out with other bytes than before, on as many threads"),
            (
                b"c",
                "one: a.txt came out with other bytes than before; threads were 2 and are 1,"
                " which changes the order of sums",
            ),
            (b"c", ""),
        ):
            (tmp_path / "a.txt").unlink(missing_ok=True)
            caplog.clear()
            run.stage("one", settings={}, outputs=["a.txt"], work=write(run, content))
            assert expected in caplog.text and bool(expected) == bool(caplog.text)
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"]["one"]["threads"] == 1


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
        match=r"tables/a\.csv is not as it was written: its sha256 is .*Run the stage that"
        r" writes it again in .*, or name another run\.$",
    ):
        manifest.unchanged(directory, "tables/a.csv")


def test_choices_are_recorded_before_the_work_and_never_replaced(tmp_path):
    seen = []
    with open_run(tmp_path) as run:
        run.register({"budget": 0.05}, "aa", stage="probe")
        assert json.loads((tmp_path / "manifest.json").read_text())["primary"] == {
            "choices": {"budget": 0.05},
            "sha256": "aa",
            "registered_at": "probe",
        }
        run.stage("probe", settings={}, outputs=[], work=lambda: seen.append(run.manifest))
        assert seen[0]["primary"]["sha256"] == "aa"
    with open_run(tmp_path) as run:
        run.register({"budget": 0.05}, "aa", stage="probe")
        with pytest.raises(DiagnosticsError, match=r"budget: was 0\.05, now 0\.1\)\. Nothing was"):
            run.register({"budget": 0.1}, "bb", stage="probe")
        assert run.manifest["primary"]["sha256"] == "aa"


def test_choices_made_after_the_measurement_are_not_recorded(tmp_path):
    with open_run(tmp_path) as run:
        run.stage("probe", settings={}, outputs=[], work=lambda: None)
        run.register({"budget": 0.05}, "aa", stage="probe")
        assert "primary" not in run.manifest
    assert "primary" not in json.loads((tmp_path / "manifest.json").read_text())
