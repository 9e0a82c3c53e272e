"""The second process of a run: the same tables, and none where it fails."""

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.tables import write_parquet
from diagnostics.pipeline import ahead
from tests.study_tables import tokens


@pytest.fixture
def task(tmp_path):
    write_parquet(tmp_path / "tokens.parquet", tokens())
    return {
        "tokens": tmp_path / "tokens.parquet",
        "options": {"criteria": ("entropy",), "budgets": (0.1,), "draws": 5, "seed": 0},
    }


def test_tables_of_another_process_are_those_of_this_one(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    here = ahead.comparison_tables(task)
    with ahead.beside({"compare": task}) as made:
        folder, process = made.folder.name, made.process
        there = made.take("compare", task)
    assert here.keys() == there.keys() and all(here[name].equals(there[name]) for name in here)
    assert process.poll() is not None and not ahead.Path(folder).exists()


def test_what_fails_there_fails_here_with_its_own_words(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    wrong = {**task, "options": {**task["options"], "budgets": (2.0,)}}
    with ahead.beside({"compare": wrong}) as made, pytest.raises(DiagnosticsError, match="2"):
        made.take("compare", wrong)


def test_another_task_is_made_here(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    with ahead.beside({"compare": task}) as made:
        assert made.process is None
        other = {**task, "options": {**task["options"], "budgets": (0.2,)}}
        assert set(made.take("compare", other)["selection_curves"].budget) == {0.2}


def test_it_ends_with_the_block(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    with pytest.raises(KeyboardInterrupt), ahead.beside({"compare": task}) as made:
        raise KeyboardInterrupt
    assert made.process.returncode is not None


def test_it_begins_before_its_tasks_and_makes_what_it_is_given(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    here = ahead.comparison_tables(task)
    with ahead.beside() as made:
        assert made.process.poll() is None and made.tasks == {}
        made.give({"compare": task})
        there = made.take("compare", task)
        assert made.left == []
    assert here.keys() == there.keys() and all(here[name].equals(there[name]) for name in here)
    assert made.process.returncode is not None


def test_it_ends_where_nothing_is_given(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    with ahead.beside() as made:
        made.give({})
        assert made.process.returncode is not None
        assert set(made.take("compare", task)["selection_curves"].budget) == {0.1}


def test_what_ended_before_its_tasks_is_made_here(task, monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 2)
    with ahead.beside() as made:
        made.process.kill()
        made.process.wait()
        made.give({"compare": task})
        assert set(made.take("compare", task)["selection_curves"].budget) == {0.1}
