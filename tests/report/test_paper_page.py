"""The page of the paper: complete from its tables, self-contained, escaped, short at first."""

import json
import shutil

import pandas as pd
import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import paper_page, run_results
from diagnostics.report.figures.paper import FIGURES
from tests import browser, study_tables
from tests.report import made_paper
from tests.report.test_page import Page

ORDER = [artefact for artefacts in paper_page.SECTIONS.values() for artefact in artefacts]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = made_paper.write_run(tmp_path_factory.mktemp("paper") / "run")
    assert paper_page.build(directory) == directory / "paper.html"
    return directory


def read(directory):
    return run_results.read_tables(directory, begins="paper_", remedy="None.")


def with_differences(run, tmp_path, change):
    """A copy of the run whose `paper_differences` was changed."""
    directory = tmp_path / "copy"
    shutil.copytree(run, directory)
    path = directory / "tables" / "paper_differences.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    manifest = json.loads((directory / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        stage["files"].pop("tables/paper_differences.csv", None)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def test_the_page_shows_every_artefact_in_the_papers_order_and_loads_nothing(run):
    text = (run / "paper.html").read_text()
    page = Page(text)
    sections = [name for name in page.ids if name in {each.table for each in ORDER}]
    assert sections == [each.table for each in ORDER]
    assert len(page.ids) == len(set(page.ids))
    assert all(resource.startswith(("data:", "#")) for resource in page.resources)
    assert {name for name in page.links if not name.startswith("#")} == set()
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    for number in FIGURES:
        assert f"figure-paper_{number.lower()}" in page.ids
    for name in made_paper.tables():
        assert f"table-{name}" in page.ids


def test_files_of_every_figure_are_written_in_three_formats_and_recorded(run):
    recorded = json.loads((run / "pages.json").read_text())
    wanted = {
        f"figures/paper_{number.lower()}.{kind}"
        for number in FIGURES
        for kind in ("png", "pdf", "svg")
    }
    assert set(recorded) == wanted | {"paper.html"}
    assert all((run / name).stat().st_size for name in wanted)


def test_equal_tables_give_equal_bytes(run, tmp_path):
    again = made_paper.write_run(tmp_path / "again")
    paper_page.build(again)
    for name in ("paper.html", "figures/paper_3c.svg", "figures/paper_3c.pdf"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_the_first_screen_names_pair_and_checkpoint_and_what_both_sides_say(run):
    screen = paper_page.first_screen(read(run))
    assert list(screen) == ["The pair.", "As released.", "Controlled.", "Why."]
    assert screen["The pair."] == "Student small, teacher large; checkpoint trained/student."
    said = made_paper.differences().set_index("artefact")
    assert screen["As released."] == f"{said.released['Table 1']} {said.released['Table 8']}"
    assert screen["Controlled."] == f"{said.controlled['Table 1']} {said.controlled['Table 8']}"
    assert screen["Why."] == made_paper.WHY


@pytest.mark.parametrize("length", [3, 20, 45, 70, 300])
def test_the_first_screen_keeps_to_its_words_and_cuts_no_sentence(run, tmp_path, length):
    long = " ".join(f"word{index}" for index in range(length)) + "."
    directory = with_differences(run, tmp_path, lambda table: table.assign(released=long))
    found = read(directory)
    screen = paper_page.first_screen(found)
    total = paper_page.words(paper_page.title(found), *screen, *screen.values())
    assert total <= paper_page.FIRST_SCREEN == 120
    assert screen.get("As released.", long) == long
    assert ("As released." in screen) == (length <= 70)


def test_what_the_manifest_and_the_tables_do_not_say_is_not_made_up(run):
    found = read(run)
    bare = run_results.RunResults({"stages": {}}, {"paper_table_1": found.tables["paper_table_1"]})
    assert paper_page.title(bare) == "The paper, one to one"
    assert paper_page.first_screen(bare) == {
        "The pair.": "The checkpoint is in no record of the manifest."
    }
    drawn, left_out = paper_page.draw_all(bare)
    assert drawn == {} and set(left_out) == set(FIGURES)
    text = Page(paper_page.page(bare, drawn, left_out)).text
    assert "Not here: There is no table paper_figure_3c with rows" in text
    assert "Not here: no table paper_table_2. It rests on trainings" in text


def test_sides_reason_and_printed_value_stand_beside_their_artefact(run):
    text = (run / "paper.html").read_text()
    section = Page(text.split('<section id="paper_figure_3c">')[1].split("<details")[0]).text
    said = made_paper.differences().set_index("artefact").loc["Figure 3C"]
    for part in ("Figure 3C. The Q3 gap", said.released, said.controlled, said.why):
        assert part in section
    assert "Printed in the paper: .084 [.069, .098]" in section
    section = Page(text.split('<section id="paper_figure_4a">')[1].split("<details")[0]).text
    assert "Printed" not in section


def test_text_from_the_tables_is_escaped(run, tmp_path):
    evil = "<script>alert(1)</script>"
    directory = with_differences(
        run, tmp_path, lambda table: table.assign(released=evil, why=evil, printed=evil, title=evil)
    )
    text = paper_page.page(read(directory), {}, {})
    assert evil not in text and "&lt;script&gt;alert(1)" in text
    assert Page(text).scripts == 1


def test_a_changed_table_is_left_out_with_a_word(run, tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(run, directory)
    path = directory / "tables" / "paper_figure_3c.csv"
    path.write_text(path.read_text() + "\n")
    found = read(directory)
    assert "paper_figure_3c" not in found.tables
    text = Page(paper_page.page(found, {}, {})).text
    assert "tables/paper_figure_3c.csv is not as it was written and was left out" in text


def test_a_page_of_somebody_else_is_not_replaced(run, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_page, "draw_all", lambda run: ({}, {}))
    directory = tmp_path / "copy"
    shutil.copytree(run, directory)
    (directory / "paper.html").write_text("mine")
    with pytest.raises(DiagnosticsError, match=r"paper\.html is not as it was written"):
        paper_page.build(directory)
    assert (directory / "paper.html").read_text() == "mine"


def test_a_run_without_tables_of_the_paper_is_refused_with_the_command(tmp_path):
    directory = study_tables.write_run(tmp_path / "run")
    with pytest.raises(
        DiagnosticsError, match=r"holds no table paper_\*\.csv\. Run `python -m diagnostics paper"
    ):
        paper_page.build(directory)
    assert not (directory / "paper.html").exists()


@browser.needed
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_is_wider_than_the_page_or_lies_on_another(run, tmp_path, width):
    with browser.chromium(tmp_path / "profile") as driver:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for theme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 24, 29)")):
            media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            driver.get((run / "paper.html").as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert (
                driver.execute_script("return getComputedStyle(document.body).backgroundColor")
                == paper
            )
            assert driver.execute_script(OVERLAPS) == []
        assert browser.complaints(driver) == []
        assert browser.outside_requests(driver) == []


OVERLAPS = """
const blocks = [...document.querySelectorAll("main p, main h1, main h2, main h3, main figure,"
  + " main summary, main nav")].filter(e => e.getClientRects().length
  && !e.closest("details:not([open]) > *:not(summary)"));
const boxes = blocks.map(e => [e, e.getBoundingClientRect()]);
const found = [];
for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1)) {
  if (a.contains(b) || b.contains(a)) continue;
  if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
    found.push(a.textContent.slice(0, 40) + " | " + b.textContent.slice(0, 40));
}
return found;
"""
