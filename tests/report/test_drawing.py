"""Figures of a report: the same bytes for any number of processes, and nothing lost with one."""

import contextlib
import subprocess
import sys

from diagnostics.report import drawing
from diagnostics.report.run_results import read_run
from tests import study_tables


def test_a_report_s_drawings_are_the_same_for_one_and_for_two_processes(tmp_path):
    directory = study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())
    run = read_run(directory)
    one, two = (drawing.draw_all(run, workers=workers) for workers in (1, 2))
    assert one == two and one[0]
    assert all(each.pdf is None for each in one[0].values())


def test_other_parts_of_a_page_are_made_beside_the_figures_and_are_not_counted_as_such(
    tmp_path, monkeypatch
):
    counted = []

    class Bar:
        def update(self, count):
            counted.append(count)

    @contextlib.contextmanager
    def seen(total, description, unit):
        counted.append(-total)
        yield Bar()

    monkeypatch.setattr(drawing, "progress", seen)
    directory = study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())
    run = read_run(directory)
    others = {"sum": lambda: 3 + 4, "word": lambda: "seven"}
    for workers in (1, 2):
        del counted[:]
        drawn, left_out, made = drawing.draw_beside(run, others, workers=workers)
        assert made == {"sum": 7, "word": "seven"} and list(made) == list(others)
        assert drawn and not set(others) & {*drawn, *left_out}
        assert sum(counted) == 0 and min(counted[1:]) >= 0


def test_what_a_page_needs_is_loaded_without_a_model_library_or_the_parts_of_scipy():
    code = (
        "import sys, diagnostics.report.page;"
        "print([name for name in ('torch', 'scipy.special', 'scipy.spatial', 'scipy.stats')"
        " if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
