"""The page of the paper: complete from its tables, self-contained, escaped, short at first."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.paper.printed import PRINTED
from diagnostics.analysis.paper.sentences import with_interval
from diagnostics.core.errors import DiagnosticsError
from diagnostics.report import catalogue, naming, paper_page, run_results
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


@pytest.mark.slow
def test_equal_tables_give_equal_bytes(run, tmp_path):
    again = made_paper.write_run(tmp_path / "again")
    paper_page.build(again)
    for name in ("paper.html", "figures/paper_3c.svg", "figures/paper_3c.pdf"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_the_first_screen_names_pair_and_checkpoint_and_what_both_sides_say(run):
    screen = paper_page.first_screen(read(run))
    assert list(screen) == ["The pair.", "As released.", "Controlled.", "What a control changes."]
    assert screen["The pair."] == (
        "Student small, teacher large; 48 contexts, 2,526 positions; checkpoint trained/student."
    )
    table = made_paper.gaps()
    row = table[(table.row == "K = 16") & (table.quantity == "Q3 gap")].iloc[0].to_dict()
    numbers = {side: with_interval(row, side) for side in made_paper.SIDES}
    assert screen["As released."].startswith(
        "Inside Q3, most minus least compatible third (K = 16):"
        f" {numbers['released']} in relative gain. Highest mean gain at 5%: "
    )
    assert screen["Controlled."].startswith(
        f"The same gap: {numbers['controlled']} in nats; context gain {numbers['context']}. Highest"
    )
    best = made_paper.selectors()
    best = best[(best.quantity == "mean gain") & (best.budget == 0.05)]
    first = best.sort_values("released").iloc[-1]
    assert f": {naming.readable(first.row)}, " in screen["As released."]


def test_the_first_screen_counts_signs_and_verdicts_over_the_tables_with_both_sides(run):
    names = ("1", "6", "7", "8", "9")
    tables = made_paper.tables()
    rows = pd.concat([tables[f"paper_table_{name}"] for name in names])
    turned = sum(np.sign(rows.released) != np.sign(rows.controlled))
    clear = {
        side: (np.sign(rows[f"{side}_low"]) == np.sign(rows[f"{side}_high"]))
        & rows[f"{side}_low"].notna()
        for side in ("released", "controlled")
    }
    lost = (clear["released"] & ~clear["controlled"]).sum()
    assert paper_page.first_screen(read(run))["What a control changes."] == (
        f"Of {len(rows)} numbers in the tables, {turned} turn their sign; of"
        f" {clear['released'].sum()} released intervals that exclude 0, {lost} hold 0 when"
        " controlled."
    )
    assert 0 < turned < len(rows) and lost > 0


@pytest.mark.parametrize("length", [3, 20, 45, 70, 300])
def test_the_first_screen_keeps_to_its_words_and_cuts_no_sentence(run, length):
    found = read(run)
    long = " ".join(["x"] * length)
    tables = dict(found.tables)
    tables["paper_table_8"] = tables["paper_table_8"].assign(row=long)
    screen = paper_page.first_screen(dataclasses.replace(found, tables=tables))
    total = paper_page.words(paper_page.title(found), *screen, *screen.values())
    assert total <= paper_page.FIRST_SCREEN == 120
    assert all(text.endswith(".") for text in screen.values())
    assert (long in screen["As released."]) == (length <= 20)
    assert "What a control changes." in screen


def test_what_the_manifest_and_the_tables_do_not_say_is_not_made_up(run):
    found = read(run)
    bare = run_results.RunResults({"stages": {}}, {"paper_other": found.tables["paper_table_1"]})
    assert paper_page.title(bare) == "The paper, one to one"
    assert paper_page.first_screen(bare) == {"The pair.": "The manifest records no checkpoint."}
    drawn, left_out = paper_page.draw_all(bare)
    assert drawn == {} and set(left_out) == set(FIGURES)
    text = Page(paper_page.page(bare, drawn, left_out)).text
    assert "Not here. There is no table paper_figure_3c with rows" in text
    assert "Not here. There is no table paper_table_2. It rests on trainings" in text


def test_sides_reason_and_printed_value_stand_beside_their_artefact(run):
    text = (run / "paper.html").read_text()
    section = Page(text.split('<section id="paper_figure_3c">')[1].split("<details")[0]).text
    said = made_paper.differences().set_index("artefact").loc["Figure 3C"]
    for part in ("Figure 3C. The Q3 gap", said.released, said.controlled, said.why):
        assert part in section
    assert "Printed in the paper: .084 [.069, .098]" in section
    assert text.count("Printed in the paper:") == 1  # below figure 3C, and not again at table 1
    section = Page(text.split('<section id="paper_table_1">')[1].split("<details")[0]).text
    assert section == "Table 1. The Q3 gap"
    section = Page(text.split('<section id="paper_figure_4a">')[1].split("<details")[0]).text
    assert "Printed" not in section and "Why they differ." in section


def test_what_was_not_made_says_why_as_the_differences_have_it(run, tmp_path):
    why = "Not made: it needs trainings."
    row = {"artefact": "Table 2", "title": "Trainings", "why": why}
    found = read(run)
    table = pd.concat([found.tables["paper_differences"], pd.DataFrame([row])])
    changed = dataclasses.replace(found, tables=found.tables | {"paper_differences": table})
    text = paper_page.page(changed, {}, {})
    section = Page(text.split('<section id="paper_table_2">')[1].split("</section>")[0]).text
    assert section == "Table 2. TrainingsNot here. It needs trainings."


def test_the_checkpoint_is_named_from_the_manifest():
    own = {"criterion": "teachability", "budget": 0.05, "seed": 0}
    stages = {"paper": {"facts": {"checkpoint": own}}, "after": {"settings": {"after": "a/b/c"}}}
    tables = {}
    assert paper_page.checkpoint(run_results.RunResults({"stages": stages}, tables)) == (
        "after training on teachability at 5%, seed 0"
    )
    stages["paper"]["facts"]["checkpoint"] = "score --after"
    assert paper_page.checkpoint(run_results.RunResults({"stages": stages}, tables)) == "b/c"
    assert paper_page.checkpoint(run_results.RunResults({"stages": {}}, tables)) == ""


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


def test_every_table_of_the_paper_has_a_caption():
    titles = {
        f"paper_{name.lower().replace(' ', '_')}": each.title for name, each in PRINTED.items()
    }
    assert {each.table for each in ORDER} == set(titles)
    for name, title in titles.items():
        assert catalogue.caption(name).endswith(f"as released and controlled: {title}.")
    assert catalogue.caption("paper_differences").startswith("Why the paper's numbers differ")
