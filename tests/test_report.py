"""The report: complete from files, self-contained, escaped, the same bytes for the same files."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from diagnostics import narrative, plates, report
from diagnostics.types import DiagnosticsError
from tests import study_tables

VOID = {"meta", "br", "img", "input", "link", "hr", "col"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps ids, links, loaded resources and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.resources, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            elif key in ("href", "xlink:href", "src"):
                (self.links if tag == "a" else self.resources).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = study_tables.write_run(tmp_path_factory.mktemp("runs") / "one")
    assert report.build(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def source(run):
    return (run / "report.html").read_text(encoding="utf-8")


def test_writes_figures_and_page_only(run):
    names = sorted(path.name for path in (run / "figures").iterdir())
    assert names == sorted(f"{sheet}.{kind}" for sheet in ("correlations", "entropy_divergence", "q3_gain", "calibration") for kind in ("pdf", "png"))
    assert sorted(path.name for path in run.iterdir()) == ["figures", "manifest.json", "report.html", "tables", "tokens.parquet"]


def test_nests_and_asks_the_network_for_nothing(source):
    page = Page(source)
    assert all(link.startswith("#") for link in page.links)
    assert all(resource.startswith(("#", "data:image/png;base64,")) for resource in page.resources)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", source)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {reference[1:] for reference in page.resources if reference[0] == "#"} <= set(page.ids)


def test_is_small(source):
    assert len(source.encode()) < 1_500_000


def test_holds_the_answer_from_the_tables(run, source):
    sentences = narrative.answer(report.read_material(run))
    assert len(sentences) == 6
    for sentence in sentences:
        assert f"<p>{html.escape(sentence)}</p>" in source


def test_figures_stand_at_both_widths_with_a_reading(source):
    page = Page(source)
    assert page.tags.count("svg") == 1 + 2 * 4
    for sheet in report.SHEETS:
        if sheet.name in ("correlations", "entropy_divergence", "q3_gain", "calibration"):
            assert f"{sheet.title} {sheet.reading}" in page.text


def test_page_colours_are_variables(source):
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    for name, color in plates.LIGHT.items():
        assert color.lower() not in drawings
        assert f"--{name}:" in source
    assert "var(--ink)" in drawings and "var(--rule)" in drawings


def test_tables_hold_every_value(run, source):
    for path in (run / "tables").glob("*.csv"):
        table = pd.read_csv(path)
        block = source[source.index(f'<details id="table-{path.stem}">'):]
        block = block[:block.index("</details>")]
        rows = re.findall(r"<tr>(.*?)</tr>", block, flags=re.DOTALL)[1:]
        assert len(rows) == len(table)
        first = [html.unescape(value or text) for value, text in re.findall(r'<td(?: class="number")?(?: data-v="([^"]*)")?>(.*?)</td>', rows[0])]
        assert first == [str(value) for value in next(table.itertuples(index=False))]


def test_provenance_and_untrusted_text(source):
    page = Page(source)
    for word in ("torch", "2.13.0", "max_new_tokens", "ab" * 32, "chat_template_sha256", "student.dtype", "seed"):
        assert word in page.text
    assert "<script>alert(1)" not in source
    assert page.tags.count("script") == 1
    assert 'Tom <script>alert(1)</script> has "onload=" apples' in page.text


def test_says_what_was_not_run(source):
    page = Page(source)
    text = page.text[page.text.rindex("What was not run"):]
    assert "Training runs (claim C5); a one-step gain does not stand in for them." in text


def test_same_files_same_bytes(run, tmp_path):
    other = study_tables.write_run(tmp_path / "two")
    report.build(other)
    for path in [run / "report.html", *(run / "figures").iterdir()]:
        assert path.read_bytes() == (other / path.relative_to(run)).read_bytes(), path.name


def test_verdicts_become_cards_and_leave_the_list_of_what_is_missing():
    verdicts = pd.DataFrame({"claim": ["C1", "C1"], "outcome": ["gain", "relative_gain"], "verdict": ["refuted", "odd <b>"],
                             "sentence": ["Raw divergence leads by 0.12.", np.nan]})
    material = narrative.Material({}, {"verdicts": verdicts})
    cards = report.verdict_cards(material)
    assert '<li class="card refuted"><h3>C1 · gain</h3><span class="verdict">refuted</span><p>Raw divergence leads by 0.12.</p></li>' in cards
    assert '<li class="card inconclusive"><h3>C1 · relative gain</h3><span class="verdict">odd &lt;b&gt;</span><p></p></li>' in cards
    assert "Verdicts on the claims" in report.not_run(narrative.Material(), {})
    assert "Verdicts on the claims" not in report.not_run(material, {})


def test_a_figure_without_its_columns_is_named_not_drawn(tmp_path):
    directory = study_tables.write_run(tmp_path / "run")
    study_tables.tokens().drop(columns="compatibility").to_parquet(directory / "tokens.parquet", index=False)
    pd.DataFrame(columns=["step_size"]).to_csv(directory / "tables" / "calibration.csv", index=False)
    drawn, left_out = report.draw_all(report.read_material(directory))
    assert set(drawn) == {"correlations", "q3_gain"}
    assert left_out["entropy_divergence"] == "no column compatibility in the tokens table"
    assert left_out["calibration"] == "no table calibration"


def test_long_tables_say_that_they_go_on(monkeypatch):
    monkeypatch.setattr(report, "ROWS_SHOWN", 2)
    text = report._table("mine<", pd.DataFrame({"a": [1.0, 2.5, np.nan]}))
    assert "3 rows, the first 2 shown; tables/mine&lt;.csv" in text
    assert '<td class="number" data-v="2.5">2.500</td>' in text and '<td class="number" data-v="1.0">1</td>' in text


def test_nothing_to_report(tmp_path):
    with pytest.raises(DiagnosticsError) as error:
        report.build(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'manifest.json'} cannot be read as a manifest (No such file or directory). Name the --output-dir of an earlier run."
    )
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DiagnosticsError) as error:
        report.build(tmp_path)
    assert str(error.value) == f"{tmp_path / 'manifest.json'} is not a manifest of this project (no stages). Name the --output-dir of an earlier run."
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {}}))
    with pytest.raises(DiagnosticsError) as error:
        report.build(tmp_path)
    assert str(error.value) == f"{tmp_path / 'tables'} holds no table. Run `python -m diagnostics analyze --output-dir {tmp_path}` first."
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
