"""The report: complete from files, self-contained, escaped, the same bytes for the same files."""

import dataclasses
import html
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis import foresight
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from diagnostics.report import (
    catalogue,
    markdown,
    page,
    page_tables,
    provenance,
    run_results,
    style,
    summary,
)
from diagnostics.report.drawing import figure_of
from diagnostics.report.figures import registry
from tests import browser, study_tables
from tests.report import made_tables

VOID = {"meta", "br", "img", "input", "link", "hr", "col"}


class Page(HTMLParser):
    """Checks that elements nest, and keeps ids, links, loaded resources and text."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.resources, self.words, self.tags, self.scripts = (
            [],
            [],
            [],
            [],
            [],
            [],
            0,
        )
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.scripts += tag == "script" and not attributes
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
    assert page.build(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def source(run):
    return (run / "report.html").read_text(encoding="utf-8")


DRAWN = (
    "calibration",
    "correlations",
    "distributions",
    "entropy_divergence",
    "q3_contrast",
    "q3_gain",
)


def test_writes_figures_and_pages_only(run):
    names = sorted(path.name for path in (run / "figures").iterdir())
    assert names == sorted(f"{spec}.{kind}" for spec in DRAWN for kind in ("pdf", "png"))
    assert sorted(path.name for path in run.iterdir()) == [
        "contexts.parquet",
        "figures",
        "manifest.json",
        "pages.json",
        "report.html",
        "report.md",
        "tables",
        "tokens.parquet",
    ]


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
    sentences = summary.answer(run_results.read_run(run))
    assert list(sentences) == [
        "Which criterion to train with?",
        "What was done?",
        "Which criterion follows the gain?",
        "Which claims hold?",
        "How sure, and what would change it?",
    ]
    for question, sentence in sentences.items():
        shown = (
            html.escape(sentence).replace("`python", "<code>python").replace("DIR`", "DIR</code>")
        )
        for stage in ("compare", "report"):
            shown = shown.replace(f"`{stage}`", f"<code>{stage}</code>")
        assert f"<p><b>{question}</b> {shown}</p>" in source


def test_figures_stand_at_both_widths_with_a_reading(source):
    page = Page(source)
    assert page.tags.count("svg") == 2 * len(DRAWN)
    for spec in registry.FIGURES.values():
        if spec.name in DRAWN:
            assert f"{spec.title} {spec.reading}" in page.text


def test_page_colors_are_variables(source):
    drawings = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    for name, color in style.LIGHT.items():
        assert color.lower() not in drawings
        assert f"--{name}:" in source
    assert "var(--ink)" in drawings and "var(--rule)" in drawings


def test_tables_hold_every_value(run, source):
    kinds = set()
    for path in (run / "tables").glob("*.csv"):
        table = pd.read_csv(path)
        block = source[source.index(f'<details id="table-{path.stem}">') :]
        found = _read_block(block[: block.index("</details>")], list(table.columns))
        kinds.add(len(table) > page_tables.ROWS_WRITTEN)
        pd.testing.assert_frame_equal(
            found,
            table.astype(dict.fromkeys(table.select_dtypes("number"), float)),
            check_dtype=False,
            rtol=1e-5,
        )
    assert kinds == {True, False}


def _read_block(block: str, names: list[str]) -> pd.DataFrame:
    """A table as the page has it, written out or packed."""
    packed = re.search(r'<script type="application/json">(.*?)</script>', block, flags=re.DOTALL)
    if packed:
        columns = [
            (
                column
                if isinstance(column, list)
                else [column["texts"][code] for code in column["codes"]]
            )
            for column in json.loads(packed.group(1))
        ]
        frame = pd.DataFrame(dict(zip(names, columns, strict=True)))
    else:
        rows = re.findall(r"<tr>(<td.*?)</tr>", block, flags=re.DOTALL)
        cells = [
            [
                html.unescape(value or text)
                for value, text in re.findall(
                    r'<td(?: class="number")?(?: data-v="([^"]*)")?>(.*?)</td>', row
                )
            ]
            for row in rows
        ]
        frame = pd.read_csv(io.StringIO(pd.DataFrame(cells, columns=names).to_csv(index=False)))
    return frame.astype(dict.fromkeys(frame.select_dtypes("number"), float))


def test_provenance_and_untrusted_text(source):
    page = Page(source)
    for word in (
        "torch",
        "2.13.0",
        "max_new_tokens",
        "ef" * 32,
        "chat_template_sha256",
        "student.dtype",
        "seed",
    ):
        assert word in page.text
    assert "<script>alert(1)" not in source
    assert page.scripts == 1 and page.tags.count("img") == 0 and "<b>is</b>" not in source
    assert 'Tom <script>alert(1)</script> has "onload=" apples' in page.text


def test_says_what_was_not_run(source):
    page = Page(source)
    text = page.text[page.text.rindex("What was not run") :]
    assert "Training runs (claim C5); a one-step gain does not stand in for them." in text


def test_same_files_same_bytes(run, tmp_path):
    other = study_tables.write_run(tmp_path / "two")
    page.build(other)
    for path in [run / "report.html", *(run / "figures").iterdir()]:
        assert path.read_bytes() == (other / path.relative_to(run)).read_bytes(), path.name


def test_verdicts_of_earlier_versions_become_cards_with_both_gains():
    results = run_results.RunResults({}, {"verdicts": earlier_verdicts()})
    cards = page.verdict_cards(results)
    assert cards.count("<li") == 2
    assert (
        '<li class="card inconclusive"><h3>C1: teachability ranks better</h3><div class="sides">'
        '<div><p>gain: <span class="verdict refuted">refuted</span></p>' in cards
    )
    assert (
        '<p>relative gain: <span class="verdict supported">supported</span></p><p class="quiet">C1'
        " is supported for the relative_gain.</p></div></div></li>" in cards
    )
    assert '<li class="card supported"><h3>C2: compatible &lt;gains&gt; more</h3>' in cards
    assert "Verdicts on the claims" in page.not_run(run_results.RunResults(), {})
    assert "Verdicts on the claims" not in page.not_run(results, {})
    odd = pd.DataFrame({"claim": ["mine"], "verdict": ["perhaps <b>"]})
    assert (
        '<li class="card inconclusive"><h3>mine</h3><div class="sides"><div><p><span class="verdict'
        ' inconclusive">perhaps &lt;b&gt;</span></p>'
        in page.verdict_cards(run_results.RunResults({}, {"verdicts": odd}))
    )


def earlier_verdicts() -> pd.DataFrame:
    """C1 turned over, C2 supported by both gains, before statistics were told apart by kind."""
    rows = [
        (split, claim, statement, outcome, verdict)
        for split in ("all", "held_out")
        for claim, statement, found in (
            ("C1", "teachability ranks better", ("refuted", "supported")),
            ("C2", "compatible <gains> more", ("supported", "supported")),
        )
        for outcome, verdict in zip(("gain", "relative_gain"), found, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["split", "claim", "statement", "outcome", "verdict"])
    sentences = table.claim + " is " + table.verdict + " for the " + table.outcome + "."
    return table.assign(primary=table.split == "all", sentence=sentences)


def test_a_card_has_the_paper_s_statistic_beside_the_controlled_one():
    tables = {"verdicts": made_tables.verdicts(), "warnings": made_tables.warnings()}
    results = run_results.RunResults({"primary": made_tables.REGISTERED}, tables)
    cards = page.verdict_cards(results)
    assert cards.startswith(
        '<p class="quiet registered">Registered before the probe (sha256 ab12ab12ab12…)'
    )
    first, second, third = cards.split('<li class="card')[1:]
    assert first.startswith(" wide-card supported")
    assert second.startswith(" wide-card not-identified")
    assert third.startswith(" wide-card inconclusive")
    for card in (first, second, third):
        paper, controlled = card.split('<p class="side">')[1:]
        assert paper.startswith("As the paper has it</p><p><i>")
        assert "(paper)</i></p><p>gain: <span" in paper and "(paper)" not in controlled
        assert controlled.startswith("With controls</p><p>context gain: <span")
        assert paper.count('<span class="tag">exploratory</span>') == 1
        assert "exploratory" not in controlled.split("</li>")[0]
    assert '<span class="verdict not-identified">not identified</span>' in second
    assert (
        '<p class="quiet">31 % of the top third have a partner. The difference is +0.05 [+0.02,'
        " +0.08] (64 prompts, 4 steps; p &lt; .0001 after Holm over 8 tests).</p>"
        in second.split("With controls")[1]
    )
    assert "The claim:" not in cards and "Exploratory" not in cards


def test_a_card_says_why_nothing_confirms():
    because = " Exploratory: no primary choices were recorded before the probe."
    table = made_tables.verdicts().assign(exploratory=True, sentence="C1 is open." + because)
    cards = page.verdict_cards(run_results.RunResults({}, {"verdicts": table}))
    tag = "exploratory: no primary choices were recorded before the probe</span>"
    assert cards.count(f'<span class="tag">{tag}') == 6 and "Registered" not in cards


def test_a_reason_that_the_sentence_holds_is_not_said_twice():
    table = made_tables.verdicts()
    said = table.assign(sentence="C2 is not identified: " + table.reason + ".")
    cards = page.verdict_cards(run_results.RunResults({}, {"verdicts": said}))
    assert cards.count("31 % of the top third have a partner") == 1
    alone = page.verdict_cards(run_results.RunResults({}, {"verdicts": table.assign(sentence="")}))
    assert alone.count("31 % of the top third have a partner") == 1


def test_verdicts_of_trainings_stand_beside_those_of_an_earlier_analysis():
    tables = {
        "verdicts": earlier_verdicts(),
        "validation_verdicts": study_tables.validation_verdicts(),
    }
    cards = page.verdict_cards(run_results.RunResults({}, tables))
    assert cards.count("<li") == 3 and "nan" not in cards


def test_warnings_stand_open_up_to_a_handful():
    table = pd.DataFrame({"message": [f"Beware <{i}>." for i in range(6)]})
    text = page.warning_list(run_results.RunResults({}, {"warnings": table}))
    assert text.count('<p class="warning minor">Beware &lt;') == 6
    assert text.index("<summary>2 more</summary>") > text.index("Beware &lt;3&gt;")
    assert page.warning_list(run_results.RunResults()) == ""


def test_warnings_that_change_a_verdict_come_first():
    table = made_tables.warnings()
    results = run_results.RunResults(
        {}, {"warnings": table}, reading_notes=("A file was left out.",)
    )
    text = page.warning_list(results)
    assert text.startswith(
        '<p class="warning">A file was left out.</p><p class="warning">Few confident errors have a'
        ' &lt;partner&gt; on the other side. <span class="tag">C2 (controlled) is not identified'
        " [held_out]</span></p>"
    )
    assert text.count('<p class="warning minor">') == 2
    assert provenance.warnings(results) == [
        "A file was left out.",
        f"{table.message.iloc[2]} {table.changes_verdict.iloc[2]}.",
        *table.message.iloc[:2],
    ]


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decided") / "run"
    made_tables.write_run(directory, foresight_signs=made_tables.foresight_signs())
    page.build(directory)
    return directory


def test_the_decision_stands_above_everything_with_its_grid(decided):
    source = (decided / "report.html").read_text(encoding="utf-8")
    head = source[: source.index("<nav>")]
    assert "<b>Which criterion to train with?</b> Train with teachability at 5 %" in head
    assert '<figure id="figure-decision">' in head and source.count('id="figure-decision"') == 1
    text = Page(source).text
    places = [text.index(word) for word in ("As the paper has it", "is not identified [held")]
    places += [text.index("What was done?"), text.index("Criteria over several steps")]
    assert places == sorted(places)
    assert "Which criterion to train with?" not in text[places[0] :]
    assert {path.stem for path in (decided / "figures").iterdir()} >= {
        "decision",
        "horizon",
        "horizon_criteria",
        "strata",
        "foresight",
    }
    assert "drop of reverse KL (nats)" in source


def test_the_placebo_is_one_small_table_of_sizes(decided):
    source = (decided / "report.html").read_text(encoding="utf-8")
    part = source[source.index('<section id="magnitude">') :]
    part = part[: part.index("</section>")]
    assert "How large is a change of this size in no direction?" in part
    heads = re.findall(r'scope="col">(.*?)</th>', part)
    assert heads[0] == "stratum" and "low" not in heads and heads[-1] == "step mean abs gain"
    assert part.count("<tr>") == 4
    assert page.magnitudes(run_results.RunResults()) == ""


def test_nothing_rests_on_a_correlation_of_the_placebo(decided):
    words = Page((decided / "report.html").read_text(encoding="utf-8")).text.lower()
    for phrase in ("placebo's", "beyond the placebo", "placebo step"):
        assert phrase not in words
    assert "it is no null for a correlation" in words


def test_figures_take_the_divergence_that_the_loss_lowers(decided):
    results = run_results.read_run(decided)
    assert figure_of(results, "horizon").axes[0].get_ylabel() == "drop of reverse KL (nats)"
    manifest = json.loads(json.dumps(results.manifest).replace("reverse_kl", "forward_kl"))
    other = dataclasses.replace(results, manifest=manifest)
    drawn, left_out = page.draw_all(other)
    assert figure_of(other, "horizon").axes[0].get_ylabel() == "drop of forward KL (nats)"
    assert "decision" in drawn and "decision" not in left_out


def test_tables_of_earlier_versions_still_open(tmp_path):
    source = Path(__file__).parents[2] / "reports" / "embedded-probe"
    directory = tmp_path / "old"
    directory.mkdir()
    shutil.copy(source / "manifest.json", directory)
    shutil.copytree(source / "tables", directory / "tables")
    text = Page(page.build(directory).read_text(encoding="utf-8")).text
    assert text.count("Not answered: this run holds no steps") == 1 or "Train with" in text
    assert "Which criterion follows the gain?" in text


def test_what_the_analysis_left_out_is_listed():
    table = pd.DataFrame(
        {"table": ["verdicts"], "what": ["claim C5"], "why": ["no training results were given"]}
    )
    assert "verdicts, claim C5: no training results were given." in provenance.missing(
        run_results.RunResults({}, {"left_out": table}), {}
    )


def test_token_view_is_there_and_can_be_left_out(run, source):
    assert source.count('<div class="tokenview">') == 1
    assert page.token_view(run_results.read_run(run), 0) == ""
    shown = json.loads(
        re.search(
            r'<div class="tokenview"><script type="application/json">(.*?)</script>',
            source,
            flags=re.DOTALL,
        ).group(1)
    )
    assert [context["id"] for context in shown["contexts"]] == [f"c{i}" for i in range(8)]


def test_markdown_for_a_repository(run):
    text = (run / "report.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# Which of large's signals can small learn from?\n\n**Which criterion to train with?** Not"
        " answered: this run holds no steps"
    )
    assert "\n\n**What was done?** The student took AdamW's first step of the reverse KL" in text
    for name in DRAWN:
        assert f"](figures/{name}.png)" in text
    assert "- Training runs (claim C5); a one-step gain does not stand in for them." in text
    results = run_results.RunResults(study_tables.manifest(), {"verdicts": earlier_verdicts()})
    assert "| C1 | gain | refuted | C1 is refuted for the gain. |" in markdown.markdown(
        results, {}, {}
    )
    manifest = study_tables.manifest() | {"primary": made_tables.REGISTERED}
    new = run_results.RunResults(manifest, {"verdicts": made_tables.verdicts()})
    written = markdown.markdown(new, {}, {})
    assert "| claim | as | by | verdict | why |" in written and "Registered before the" in written
    assert "| C2 | controlled | context\\_gain | not identified | C2 is not" in written
    assert markdown._plain("a_b <script> | `x`") == "a\\_b \\<script\\> \\| \\`x\\`"


def test_every_table_of_the_study_has_its_figure(tmp_path, monkeypatch):
    made = {
        name: getattr(study_tables, name)()
        for name in (
            "quadrants",
            "matching",
            "regressions",
            "support_robustness",
            "gain_robustness",
            "residual_curves",
            "selection_curves",
            "selection_summary",
            "selection_overlap",
            "selection_profile",
            "intervention",
            "agreement",
            "linearity",
            "kernel_shares",
            "lift",
            "validation_outcomes",
            "validation_agreement",
            "validation_foreseen",
            "positions",
        )
    }
    made["offline_agreement"] = made.pop("agreement")
    for name in ("intervention", "horizon", "decision", "strata", "foresight_signs"):
        made[name] = getattr(made_tables, name)()
    directory = study_tables.write_run(tmp_path / "run", **made)
    study_tables.evaluations().to_csv(directory / "evaluations.csv", index=False)
    (directory / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'
    )
    results = run_results.read_run(directory)
    calls = {}
    specs = [
        dataclasses.replace(
            spec, draw=lambda table, spec=spec, **options: calls.setdefault(spec.name, options)
        )
        for spec in registry.FIGURES.values()
    ]
    monkeypatch.setattr(registry, "FIGURES", {spec.name: spec for spec in specs})
    drawn, left_out = page.draw_all(results)
    assert set(drawn) == {spec.name for spec in specs} and left_out == {}
    pd.testing.assert_frame_equal(calls["q3_contrast"]["matching"], made["matching"])
    pd.testing.assert_frame_equal(
        calls["validation_scatter"]["foreseen"], made["validation_foreseen"]
    )
    (directory / "tables" / "validation_foreseen.csv").unlink()
    assert page.draw_all(run_results.read_run(directory))[1] == {
        "validation_scatter": "no table validation_foreseen"
    }


@pytest.mark.slow
def test_every_table_of_a_whole_run_has_its_line_and_every_line_its_table(
    finished, folders, tmp_path
):
    directory, models = tmp_path / "whole", [*folders[:4], "--device", "cpu", "--quiet"]
    shutil.copytree(finished, directory)
    where, few = (
        ["--draws", "20", "--output-dir", str(directory)],
        ["--criteria", "divergence,entropy", "--budgets", "0.3"],
    )
    assert (
        main(["intervene", *models, *few, "--random-draws", "1", *where])
        == main(["attribute", *models, "--sample", "4", *where])
        == 0
    )
    assert main(["compare", *few, "--quiet", *where]) == 0
    written = {path.stem for path in (directory / "tables").glob("*.csv")}
    later = {
        "validation_verdicts",
        "validation_outcomes",
        "validation_agreement",
        "validation_foreseen",
        "validation_cells",
        "foresight_signs",
        "evaluations",
        "training_metrics",
    }
    assert written - set(catalogue.TABLES) == set() and set(catalogue.TABLES) - written == later | {
        "exactness"
    }  # the last is for a teacher known by lists
    assert set(foresight.tables(study_tables.grid_outcomes(), draws=20)) == {
        name for name in later if name.startswith("validation")
    }
    _drawn, left_out = page.draw_all(run_results.read_run(directory))
    assert {name for name in left_out if not name.startswith("validation")} == {
        "evaluations",
        "foresight",
        "training_curves",
    }, left_out


def test_a_figure_without_its_columns_is_named_not_drawn(tmp_path):
    directory = study_tables.write_run(tmp_path / "run")
    study_tables.tokens().drop(columns="compatibility").to_parquet(
        directory / "tokens.parquet", index=False
    )
    pd.DataFrame(columns=["step_size"]).to_csv(
        directory / "tables" / "calibration.csv", index=False
    )
    study_tables.record(directory)
    drawn, left_out = page.draw_all(run_results.read_run(directory))
    assert set(drawn) == {"correlations", "distributions", "q3_contrast", "q3_gain"}
    assert left_out["entropy_divergence"] == "no column compatibility in the tokens table"
    assert left_out["calibration"] == "no table calibration"


def test_curves_of_a_grid_are_read_with_their_cells(tmp_path):
    (tmp_path / "cells").mkdir()
    for name, cell in {
        "tip-0.05-seed0": {"criterion": "tip", "budget": 0.05, "seed": 0},
        "full-1-seed1": {"criterion": "full", "budget": 1.0, "seed": 1},
    }.items():
        pd.DataFrame({"step": [1, 2], "loss": [0.5, 0.25]}).to_parquet(
            tmp_path / "cells" / f"{name}.curve.parquet"
        )
        (tmp_path / "cells" / f"{name}.json").write_text(json.dumps({"cell": cell}))
    table = run_results.training_tables(tmp_path)["training_metrics"]
    assert table[["criterion", "budget", "seed", "step", "loss"]].values.tolist() == [
        ["full", 1.0, 1, 1, 0.5],
        ["full", 1.0, 1, 2, 0.25],
        ["tip", 0.05, 0, 1, 0.5],
        ["tip", 0.05, 0, 2, 0.25],
    ]
    assert run_results.training_tables(tmp_path / "nowhere") == {}


def test_a_training_directory_has_a_report_too(tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {"stages": {"train": {"settings": {"criterion": "tip"}, "inputs": {}, "files": {}}}}
        )
    )
    study_tables.evaluations().to_csv(tmp_path / "evaluations.csv", index=False)
    text = page.build(tmp_path).read_text(encoding="utf-8")
    assert (
        "Over 40 steps of training, held-out prompts show forward KL from 0.50 to 0.30 (0.25 to"
        " 0.35), accuracy from 0.50 to 0.70 (0.65 to 0.75)." in text
    )
    assert [path.name for path in (tmp_path / "figures").glob("*.png")] == ["evaluations.png"]


def test_infinities_are_shown_and_packed():
    table = pd.DataFrame({"needed": [np.inf, -np.inf, 2.5]})
    text = page_tables.table_block("some", table)
    assert '<td class="number" data-v="Infinity">∞</td>' in text
    assert '<td class="number" data-v="-Infinity">−∞</td>' in text
    packed = page_tables.table_block("some", pd.concat([table] * 30))
    assert '[["Infinity","-Infinity",2.5,' in packed


def test_p_values_in_tables_go_down_to_a_ten_thousandth():
    table = pd.DataFrame({"p_holm": [2e-9, 0.0321, np.nan], "step": [2e-9, 0.5, 1.0]})
    text = page_tables.table_block("some", table)
    assert '<td class="number" data-v="2e-09">&lt; .0001</td>' in text
    assert '<td class="number" data-v="0.0321">.032</td>' in text
    assert '<td class="number" data-v="2e-09">2.000e-09</td>' in text


def test_numbers_in_tables_are_rounded_and_keep_six_digits():
    text = page_tables.table_block(
        "mine<",
        pd.DataFrame({"a": [1.0, 2.56789123, np.nan], "b": [1, 20000, 3], "c": ["<i>", "x", "y"]}),
    )
    assert "3 rows; tables/mine&lt;.csv" in text
    assert (
        '<td class="number" data-v="2.56789">2.568</td><td class="number"'
        ' data-v="20000">20,000</td><td>x</td>' in text
    )
    assert (
        '<td class="number" data-v="1">1</td>' in text
        and '<td class="number" data-v=""></td>' in text
        and "<td>&lt;i&gt;</td>" in text
    )


def test_nothing_to_report(tmp_path):
    with pytest.raises(DiagnosticsError) as error:
        page.build(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / 'manifest.json'} is not a manifest of this project (No such file or"
        " directory). Name the --output-dir of an earlier run."
    )
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(DiagnosticsError) as error:
        page.build(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / 'manifest.json'} is not a manifest of this project (no stages). Name the"
        " --output-dir of an earlier run."
    )
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {}}))
    with pytest.raises(DiagnosticsError) as error:
        page.build(tmp_path)
    assert (
        str(error.value)
        == f"{tmp_path / 'tables'} holds no table. Run `python -m diagnostics analyze --output-dir"
        f" {tmp_path}` first."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@browser.needed
def test_in_a_browser(run, tmp_path):
    from selenium.webdriver.common.by import By

    with browser.chromium(tmp_path / "profile") as driver:
        driver.get((run / "report.html").as_uri())

        def rows(name: str, column: int) -> list[str]:
            return driver.execute_script(
                "return [...document.querySelectorAll(`#table-${arguments[0]} tbody tr`)].map(r =>"
                " r.cells[arguments[1]].dataset.v ?? r.cells[arguments[1]].textContent)",
                name,
                column,
            )

        # a packed table is built when it is opened, and sorts by number both ways
        table = pd.read_csv(run / "tables" / "correlations.csv")
        assert rows("correlations", 4) == []
        driver.find_element(By.CSS_SELECTOR, "#table-correlations summary").click()
        assert [float(value) for value in rows("correlations", 4)] == pytest.approx(
            table.estimate.tolist(), rel=1e-5
        )
        head = driver.find_elements(By.CSS_SELECTOR, "#table-correlations th button")[4]
        for reverse in (False, True):
            head.click()
            assert [float(value) for value in rows("correlations", 4)] == pytest.approx(
                sorted(table.estimate, reverse=reverse), rel=1e-5
            )

        # copy: as CSV, in the order shown
        driver.execute_script(
            "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => {"
            " window.copied = text; }}});"
        )
        driver.find_element(By.CSS_SELECTOR, "#table-correlations .copy").click()
        copied = pd.read_csv(io.StringIO(driver.execute_script("return window.copied")))
        assert copied.columns.tolist() == table.columns.tolist()
        assert (
            copied.criterion.tolist()
            == table.sort_values("estimate", ascending=False).criterion.tolist()
        )

        # narrow: the phone drawings, nothing wider than the page
        assert driver.find_element(By.CSS_SELECTOR, "figure .wide").is_displayed()
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True},
        )
        assert driver.find_element(By.CSS_SELECTOR, "figure .narrow").is_displayed()
        assert not driver.find_element(By.CSS_SELECTOR, "figure .wide").is_displayed()
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390

        # dark: page and drawings change together
        ink = "return getComputedStyle(document.querySelector('figure .narrow svg text')).fill"
        light = driver.execute_script(ink)
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        assert (light, driver.execute_script(ink)) == ("rgb(31, 35, 40)", "rgb(240, 243, 246)")
        assert (
            driver.execute_script("return getComputedStyle(document.body).backgroundColor")
            == "rgb(20, 24, 29)"
        )

        assert browser.complaints(driver) == []
        assert browser.outside_requests(driver) == []
