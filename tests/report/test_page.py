"""The report: complete from files, self-contained, escaped, the same bytes for the same files."""

import dataclasses
import html
import inspect
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diagnostics import criteria
from diagnostics.analysis import foresight
from diagnostics.analysis import warnings as analysis_warnings
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import build_parser, main
from diagnostics.report import (
    catalogue,
    drawing,
    glossary,
    markdown,
    page,
    page_tables,
    provenance,
    run_results,
    style,
    summary,
)
from diagnostics.report.drawing import draw_all, figure_of
from diagnostics.report.figures import registry
from tests import browser, study_tables
from tests.report import made_tables
from tests.report.test_tokenview import contrast

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
    assert names == sorted(f"{spec}.png" for spec in DRAWN)
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
        "What next?",
        "On what?",
        "What was done?",
        "Which criterion follows the gain?",
    ]
    text = Page(source).text
    for question, sentence in sentences.items():
        assert f"{question} {summary.minus(sentence).replace('`', '')}" in text
    assert sentences["Which criterion follows the gain?"].startswith("Not judged: 16 prompts")


def test_words_link_to_the_glossary_once_and_never_inside_code_or_headings():
    text = "<p><b>budget</b> The budget of <code>budget</code>, a budget &amp; held-out gains.</p>"
    assert glossary.linked(text) == (
        '<p><b>budget</b> The <a class="term" href="#term-budget">budget</a> of'
        ' <code>budget</code>, a budget &amp; <a class="term" href="#term-held-out">held-out</a>'
        ' <a class="term" href="#term-gain">gains</a>.</p>'
    )


@pytest.mark.parametrize(
    "text, shown",
    [
        ("h + d - h*d", "h + d − h·d"),
        ("d*(1 - c) of N(KL(q||p))*c", "d·(1 − c) of N(KL(q‖p))·c"),
        ("-A", "−A"),
        ("a top-K list, [-0.5, 0.1]", "a top-K list, [−0.5, 0.1]"),
    ],
)
def test_formulas_have_the_signs_of_print(text, shown):
    assert glossary.typeset(text) == shown


def test_every_registered_criterion_is_explained():
    text = glossary.glossary()
    for name in criteria.list_criteria().index:
        assert f'id="term-criterion-{name.replace("_", "-")}"' in text


def test_links_of_a_sentence_lead_to_the_table_that_it_names():
    run = run_results.RunResults({}, {"verdicts": earlier_verdicts()})
    assert page._to_tables(run, "In table verdicts, not in table nothing.") == (
        'In <a href="#table-verdicts">table verdicts</a>, not in table nothing.'
    )


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
        block = source[source.index(f'<details id="table-{path.stem}" class="table">') :]
        order = page_tables.columns_in_order(table)
        found = _read_block(block[: block.index("</details>")], order)[list(table.columns)]
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
                else [column["value"]] * column["count"]
                if "value" in column
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
                    r'<td(?: class="\w+")?(?: data-v="([^"]*)")?>(.*?)</td>', row
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


def test_says_near_the_top_what_was_not_run_and_with_which_command(source):
    part = source[source.index('<section id="not-run">') : source.index('<section id="findings">')]
    text = Page(part).text
    assert (
        "Training runs (claim C5); a one-step gain does not stand in for them: opd-diagnostics"
        " validate --against DIR --output-dir DIR-training." in text
    )
    assert "opd-diagnostics attribute --output-dir DIR, then report." in text
    parser = build_parser()
    commands = re.findall(r"<code>opd-diagnostics (.*?)</code>", source)
    assert len(commands) > 4
    for command in commands:
        parser.parse_args(command.split())


def test_same_files_same_bytes(run, tmp_path):
    other = study_tables.write_run(tmp_path / "two")
    page.build(other)
    for path in [run / "report.html", *(run / "figures").iterdir()]:
        assert path.read_bytes() == (other / path.relative_to(run)).read_bytes(), path.name


def unlinked(text: str) -> str:
    """HTML without its links."""
    return re.sub(r"</?a\b[^>]*>", "", text)


def test_verdicts_of_earlier_versions_become_cards_with_both_gains():
    results = run_results.RunResults({}, {"verdicts": earlier_verdicts()})
    cards = unlinked(page.verdict_cards(results))
    assert cards.count("<li") == 2
    assert (
        '<li class="card inconclusive"><h3>Teachability ranks better&nbsp;<span class="tag">C1'
        '</span></h3><p class="brief"><span><span class="verdict refuted">refuted</span> by gain,'
        ' <span class="verdict supported">supported</span> by relative gain</span></p>' in cards
    )
    assert '<div><p>gain: <span class="verdict refuted">refuted</span></p>' in cards
    assert '<li class="card supported"><h3>Compatible &lt;gains&gt; more' in cards
    assert "Verdicts on the claims" in page.not_run(run_results.RunResults(), {})
    assert "Verdicts on the claims" not in page.not_run(results, {})
    odd = pd.DataFrame({"claim": ["mine"], "verdict": ["perhaps <b>"]})
    assert (
        '<li class="card inconclusive"><h3>Mine</h3><p class="brief"><span><span class="verdict'
        ' inconclusive">perhaps &lt;b&gt;</span></span></p>'
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
    cards = unlinked(page.verdict_cards(results))
    assert cards.startswith(
        '<p class="quiet registered">Registered before the probe (sha256 ab12ab12ab12…)'
    )
    first, second, third = cards.split('<li class="card')[1:]
    assert first.startswith(" supported")
    assert second.startswith(" not-identified")
    assert third.startswith(" inconclusive")
    for card in (first, second, third):
        assert card.index('<p class="brief">') < card.index("<summary>Why</summary>")
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
        in second.split("With controls")[-1]
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


def test_warnings_take_five_lines_at_most():
    table = pd.DataFrame({"code": list("abcdef"), "message": [f"Beware <{i}>." for i in range(6)]})
    text = page.warning_list(run_results.RunResults({}, {"warnings": table}))
    assert text.count('<p class="warning minor">Beware &lt;') == 6
    assert text.index("<summary>2 more</summary>") > text.index("Beware &lt;3&gt;")
    assert text.index("<summary>2 more</summary>") < text.index("Beware &lt;4&gt;")
    five = page.warning_list(run_results.RunResults({}, {"warnings": table[:5]}))
    assert "<summary>" not in five and page.warning_list(run_results.RunResults()) == ""


def test_warnings_of_earlier_versions_are_one_line_per_cause():
    messages = [f"Matched pairs differ by {x} SD [{x}: all]." for x in (1.4, 4.6)] + ["Other."]
    found = provenance.short_causes(
        run_results.RunResults({}, {"warnings": pd.DataFrame({"message": messages})})
    )
    assert found == [
        ("Matched pairs differ by 1.4 SD. (2 times, see table warnings)", "", False),
        ("Other.", "", False),
    ]


def test_a_fold_that_realises_less_than_half_of_its_prediction_is_warned_of():
    def told(ratios):
        table = pd.DataFrame({"fold": range(len(ratios)), "ratio": ratios, "realised_drop": 0.1})
        return provenance.short_causes(
            run_results.RunResults({}, {"calibration": table.assign(chosen=True)})
        )

    ((text, touched, changed),) = told([1.3, 0.26, 1.2, 0.49])
    assert text == (
        "In 2 of 4 folds the step realised less than half of its first-order prediction (fold 1:"
        " 26%, fold 3: 49%)."
    )
    assert touched.startswith("the gains after these steps") and not changed
    assert told([1.3, 0.5]) == told([0.2]) == []


def test_warnings_that_change_a_verdict_come_first_and_each_says_what_it_touches():
    table = made_tables.warnings()
    results = run_results.RunResults(
        {}, {"warnings": table}, reading_notes=("A file was left out.",)
    )
    text = page.warning_list(results)
    assert text.startswith(
        '<p class="warning">A file was left out.</p><p class="warning">Few confident errors have a'
        ' &lt;partner&gt; on the other side. <span class="tag">changes: C2 (controlled) is not'
        " identified [held out]</span></p>"
    )
    minor = text.split('<p class="warning minor">')[1:]
    assert len(minor) == 2 and "touches: compatibility and teachability" in "".join(minor)
    assert provenance.warnings(results) == [
        "A file was left out.",
        f"{table.message.iloc[2]} {table.changes_verdict.iloc[2]}.",
        *table.message.iloc[:2],
    ]


def test_every_code_of_a_warning_touches_a_conclusion():
    source = inspect.getsource(analysis_warnings)
    codes = set(re.findall(r'^ {12,20}"([a-z]+(?:_[a-z]+)*)",$', source, flags=re.MULTILINE))
    assert {"few_prompts", "unmatched", "collinear", "undefined_outcome"} <= codes
    assert set(provenance.TOUCHED) <= codes | {"no_null", "bent_step"}
    assert codes - set(provenance.TOUCHED) <= {
        "compatibility",
        "forward_kl",
        "teacher",
        "steps",
        "verdicts",
    }


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    directory = tmp_path_factory.mktemp("decided") / "run"
    made_tables.write_run(directory, foresight_signs=made_tables.foresight_signs())
    page.build(directory)
    return directory


def test_the_decision_stands_above_everything_with_its_grid(decided):
    source = (decided / "report.html").read_text(encoding="utf-8")
    head = source[: source.index("<nav>")]
    before = head[head.index("</style>") : head.index("<figure")]
    words = html.unescape(re.sub(r"<[^>]+>", " ", before)).split()
    assert "Which criterion to train with? All positions do best; where" in " ".join(words)
    assert "train with teachability at 5 %" in " ".join(words)
    assert len(words) <= 120 and "What next?" in " ".join(words)
    assert '<figure id="figure-decision">' in head and source.count('id="figure-decision"') == 1
    text = Page(source).text
    places = [text.index(word) for word in ("As the paper has it", "is not identified [held")]
    places += [text.index("What was not run", places[-1])]
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


@pytest.mark.usefixtures("in_outline")
def test_figures_take_the_divergence_that_the_loss_lowers(decided):
    results = run_results.read_run(decided)
    assert figure_of(results, "horizon").axes[0].get_ylabel() == "drop of reverse KL (nats)"
    manifest = json.loads(json.dumps(results.manifest).replace("reverse_kl", "forward_kl"))
    other = dataclasses.replace(results, manifest=manifest)
    drawn, left_out = draw_all(other)
    assert figure_of(other, "horizon").axes[0].get_ylabel() == "drop of forward KL (nats)"
    assert "decision" in drawn and "decision" not in left_out


@pytest.mark.usefixtures("in_outline")
def test_tables_of_earlier_versions_still_open(tmp_path):
    source = Path(__file__).parents[2] / "reports" / "embedded-probe"
    directory = tmp_path / "old"
    directory.mkdir()
    shutil.copy(source / "manifest.json", directory)
    shutil.copytree(source / "tables", directory / "tables")
    text = Page(page.build(directory).read_text(encoding="utf-8")).text
    assert text.count("Not answered: this run holds no steps") == 1 or "train with" in text.lower()
    assert "Which criterion follows the gain?" in text


def left_out_lines(*rows: tuple[str, str, str]) -> list[str]:
    """What a page says of these parts, beside the lines on whole parts of the study."""
    table = pd.DataFrame(rows, columns=["table", "what", "why"])
    told = provenance.missing(run_results.RunResults({}, {"left_out": table}), {})
    return told[len(provenance.missing(run_results.RunResults({}, {}), {})) :]


def test_what_the_analysis_left_out_is_told_in_words_with_what_would_measure_it():
    assert left_out_lines(
        ("strata", "how linear the step was", "no column first_order_gain"),
        ("correlations", "criterion tip", "no column student_entropy, forward_kl"),
        ("correlations", "criterion mine", "no column my_column"),
        ("all", "outcome context_gain", "no column context_gain"),
        ("support_robustness", "K = 4", "no column compatibility_k4"),
        ("verdicts", "claim C1", "of another kind."),
    ) == [
        "How linear the step was in each stratum of the divergence, for which every position's"
        " first-order gain is needed: `opd-diagnostics attribute --output-dir DIR`, then `analyze`"
        " and `report`.",
        "Criterion TIP (table correlations): the run holds no student entropy, forward KL, which"
        " `score` would measure.",
        "Criterion mine (table correlations): the run holds no my column.",
        "Outcome context gain: the run holds no context gain, which `probe` would measure.",
        "K = 4 (table support_robustness): the run holds no compatibility k4, which `score --sweep`"
        " would measure.",
        "Claim C1 (table verdicts): of another kind.",
    ]


def test_what_nobody_asked_for_is_not_listed_as_left_out():
    losses = "no token tables of steps with other losses were given"
    assert left_out_lines(("gain_robustness", "other losses", losses)) == []
    assert left_out_lines(("verdicts", "claim C5", "no training results were given")) == []


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
    assert (
        "- Training runs (claim C5); a one-step gain does not stand in for them: `opd-diagnostics"
        " validate --against DIR --output-dir DIR-training`." in text
    )
    results = run_results.RunResults(study_tables.manifest(), {"verdicts": earlier_verdicts()})
    assert "| C1 | gain | refuted | C1 is refuted for the gain. |" in markdown.markdown(
        results, {}, {}
    )
    manifest = study_tables.manifest() | {"primary": made_tables.REGISTERED}
    new = run_results.RunResults(manifest, {"verdicts": made_tables.verdicts()})
    written = markdown.markdown(new, {}, {})
    assert "| claim | as | by | verdict | why |" in written and "Registered before the" in written
    assert "| C2 | controlled | context\\_gain | not identified | C2 is not" in written
    assert markdown._plain("a_b <script> | `x`") == "a\\_b \\<script\\> \\| `x`"
    assert markdown._plain("`<i>|`") == "\\`\\<i\\>\\|\\`"


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
    study_tables.training_positions().to_json(
        directory / "positions.jsonl", orient="records", lines=True
    )
    results = run_results.read_run(directory)
    scored = results.tokens.assign(student_logprob=-1.0, teacher_logprob=-2.0)
    results = dataclasses.replace(results, tokens=scored)
    calls = {}
    specs = [
        dataclasses.replace(
            spec, draw=lambda table, spec=spec, **options: calls.setdefault(spec.name, options)
        )
        for spec in registry.FIGURES.values()
    ]
    monkeypatch.setattr(registry, "FIGURES", {spec.name: spec for spec in specs})
    monkeypatch.setattr(drawing, "FIGURES", registry.FIGURES)
    for spec in specs:
        drawing.figure_of(results, spec.name)
    assert set(calls) == {spec.name for spec in specs}
    pd.testing.assert_frame_equal(calls["q3_contrast"]["matching"], made["matching"])
    pd.testing.assert_frame_equal(
        calls["validation_scatter"]["foreseen"], made["validation_foreseen"]
    )
    (directory / "tables" / "validation_foreseen.csv").unlink()
    with pytest.raises(DiagnosticsError, match="no table validation_foreseen"):
        drawing.figure_of(run_results.read_run(directory), "validation_scatter")


@pytest.mark.usefixtures("in_outline")
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
        main(["intervene", *models, *few, "--random-draws", "1", "--horizon", "0,1,2", *where])
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
        "training_positions",
    }
    several = {name for name in catalogue.TABLES if name.startswith(("atlas_", "teachers"))}
    asked = {name for name in catalogue.TABLES if name.startswith("engine_")} | {"by_correctness"}
    assert written - set(catalogue.TABLES) == set() and set(catalogue.TABLES) - written == {
        *later,
        *several,  # of several pairs or teachers
        *asked,  # of banks with an engine's log-probabilities, and of judged responses
        "exactness",  # of a teacher known by lists
    }
    assert set(foresight.tables(study_tables.grid_outcomes(), draws=20)) == {
        name for name in later if name.startswith("validation")
    }
    _drawn, left_out = draw_all(run_results.read_run(directory))
    assert {name for name in left_out if not name.startswith("validation")} == {
        "agreement",  # of too few cells
        "evaluations",
        "foresight",
        "kernel_shares",  # four sampled positions cannot be read
        "lift",
        "training_curves",
        "training_positions",
    }, left_out


@pytest.mark.usefixtures("in_outline")
def test_a_figure_without_its_columns_is_named_not_drawn(tmp_path):
    directory = study_tables.write_run(tmp_path / "run")
    study_tables.tokens().drop(columns="compatibility").to_parquet(
        directory / "tokens.parquet", index=False
    )
    pd.DataFrame(columns=["step_size"]).to_csv(
        directory / "tables" / "calibration.csv", index=False
    )
    study_tables.record(directory)
    drawn, left_out = draw_all(run_results.read_run(directory))
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


@pytest.mark.usefixtures("in_outline")
def test_a_training_directory_has_a_report_too(tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps(
            {"stages": {"train": {"settings": {"criterion": "tip"}, "inputs": {}, "files": {}}}}
        )
    )
    study_tables.evaluations().to_csv(tmp_path / "evaluations.csv", index=False)
    text = Page(page.build(tmp_path).read_text(encoding="utf-8")).text
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
    assert '<td class="number" data-v="2e-09">2.00e−9</td>' in text


def test_numbers_in_tables_are_rounded_and_keep_six_digits():
    text = page_tables.table_block(
        "mine<",
        pd.DataFrame({"a": [1.0, 2.56789123, np.nan], "b": [1, 20000, 3], "c": ["<i>", "x", "y"]}),
    )
    assert "3 rows; tables/mine&lt;.csv" in text
    assert (
        '<td class="number" data-v="2.56789">2.57</td><td class="number"'
        ' data-v="20000">20,000</td><td>x</td>' in text
    )
    assert (
        '<td class="number" data-v="1">1</td>' in text
        and '<td class="number" data-v=""></td>' in text
        and "<td>&lt;i&gt;</td>" in text
    )


@pytest.mark.parametrize(
    "value, half, text",
    [
        (0.123456, 0.0123, "0.123"),  # two digits of .012: three decimals
        (-0.123456, 0.95, "−0.12"),
        (1234.56, 12.0, "1,235"),
        (1234.56, 250.0, "1,235"),
        (-0.0001, 0.5, "0.00"),  # no minus before nothing
        (3.21e-9, 4.0e-10, "3.2e−9"),
        (0.5, 0.0, "0.500"),  # a zero width says nothing about digits
        (7.0, np.nan, "7"),
        (-4.6321e-6, np.nan, "−4.63e−6"),
        (-np.inf, 1.0, "−∞"),
    ],
)
def test_digits_follow_the_interval(value, half, text):
    assert page_tables.shown(value, "estimate", half) == text


def test_a_value_shares_its_digits_with_the_ends_of_its_interval():
    table = pd.DataFrame(
        {
            "criterion": ["a"],
            "estimate": [0.123456],
            "low": [0.1],
            "high": [0.2],
            "over_random": [1.23456],
            "over_random_low": [1.0],
            "over_random_high": [1.5],
            "prompts": [40],
        }
    )
    names = {name: page_tables.interval_of(table, name) for name in table}
    assert names["estimate"] == names["low"] == names["high"] == ("low", "high")
    assert (
        names["over_random"]
        == names["over_random_low"]
        == (
            "over_random_low",
            "over_random_high",
        )
    )
    assert names["criterion"] is None and names["prompts"] is None
    cells = re.findall(r">([^<>]*)</td>", page_tables.written_rows(table))
    assert cells == ["a", "0.123", "0.100", "0.200", "1.23", "1.00", "1.50", "40"]
    bounds = pd.DataFrame({"stratum": ["x"], "low": [0.1], "high": [5.0], "gain": [0.01]})
    assert page_tables.interval_of(bounds, "low") is None  # the ends of a class, not an interval


def test_units_stand_in_the_heads():
    kinds = {
        "over_random": "nats",
        "effect_low": "nats",
        "p_value": "",
        "budget": "",
        "prompts": "",
    }
    table = made_tables.decision()
    for name, unit in kinds.items():
        if name in table:
            assert page_tables.unit_of(table, name) == unit
    rows = pd.DataFrame({"outcome": ["gain", "relative_gain"], "mean": [0.1, 0.2]})
    assert page_tables.unit_of(rows, "mean") == "unit by row"
    assert page_tables.unit_of(rows[:1], "mean") == "nats"
    block = page_tables.table_block("decision", table)
    assert '<th scope="col" class="number" data-name="over_random" data-half="' in block
    assert 'over_random <span class="unit">nats</span></button></th>' in block


def test_what_tells_rows_apart_and_what_they_are_read_for_come_first():
    order = page_tables.columns_in_order(made_tables.decision())
    assert order[:4] == ["criterion", "budget", "horizon", "verdict"]
    assert order.index("over_random") < order.index("effect")
    assert sorted(order) == sorted(made_tables.decision().columns)


def test_contrast_of_the_page_is_enough():
    sheet = (page.STATIC / "report.css").read_text(encoding="utf-8")
    found = re.findall(r"--(\w+): light-dark\(#(\w{6}), #(\w{6})\)", sheet)
    for theme in (0, 1):
        colors = {name: np.array(list(bytes.fromhex(both[theme]))) for name, *both in found}
        for ink in ("ink", "quiet", "link", "good", "bad", "open"):
            for paper in ("paper", "panel"):
                assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper, theme)


def test_provenance_is_folded(source):
    part = source[source.index('<section id="provenance">') :]
    assert part.startswith('<section id="provenance"><h2>Provenance</h2><details><summary>')


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


def made_rows(count: int) -> pd.DataFrame:
    """Rows with every kind of number that a table shows, and undefined ones."""
    rng = np.random.default_rng(3)
    estimate = rng.normal(size=count) * 10.0 ** rng.integers(-9, 4, count)
    half = np.abs(estimate) * rng.uniform(0.02, 3, count)
    table = pd.DataFrame(
        {
            "outcome": np.tile(["gain", "context_gain"], count)[:count],
            "criterion": [f"c{i % 7}" for i in range(count)],
            "budget": np.tile([0.05, 0.1, 0.3], count)[:count],
            "estimate": estimate,
            "low": estimate - half,
            "high": estimate + half,
            "p_value": rng.uniform(size=count) ** 6,
            "prompts": rng.integers(20, 9000, count),
            "minus_random": rng.normal(size=count),
            "steps": 6,
            "what": [f"at -{i}.5, {'long ' * 12 if i % 9 == 0 else ''}" for i in range(count)],
        }
    )
    table.loc[table.index[::11], "minus_random"] = np.nan
    table.loc[table.index[5], ["estimate", "low", "high"]] = np.nan
    table.loc[table.index[6], "high"] = np.inf
    return table


def test_a_table_opens_on_what_the_decision_rests_on():
    decided = made_tables.decision()
    other = decided.assign(measure="forward_kl", primary=False)
    rows = pd.DataFrame({"outcome": ["gain", "context_gain"] * 2, "split": ["held_out", "all"] * 2})
    choices = {"outcome": "context_gain", "population": "held_out"}
    run = run_results.RunResults(
        {"primary": {"choices": choices}},
        {
            "decision": pd.concat([other, decided]),
            "positions": rows.assign(split="held_out"),
            "strata": rows,
            "verdicts": rows.assign(split="held_out"),
        },
    )
    assert page_tables.opening(run, "decision")["measure"] == "reverse_kl"
    assert page_tables.opening(run, "decision")["horizon"] == 20
    assert page_tables.opening(run, "positions") == {"outcome": "context_gain", "split": "held_out"}
    assert page_tables.opening(run, "strata") == {}  # no row has both
    assert page_tables.opening(run, "verdicts") == {}
    text = page_tables.all_tables(run)
    assert 'data-name="measure" data-filter="yes" data-opens="reverse_kl"' in text
    assert 'data-name="horizon" data-filter="yes" data-opens="20"' in text


@browser.needed
def test_a_table_shows_only_the_rows_that_it_opens_on_until_all_are_asked_for(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    table = made_rows(300)
    block = page_tables.table_block("long", table, opening={"outcome": "context_gain"})
    path = tmp_path / "table.html"
    path.write_text(page.shell("Table", "", "", [("tables", "Tables", block)]), encoding="utf-8")
    with browser.chromium(tmp_path / "profile", width=500) as driver:
        driver.get(path.as_uri())
        driver.find_element(By.CSS_SELECTOR, "#table-long summary").click()
        chosen = Select(driver.find_element(By.CSS_SELECTOR, "select[data-column=outcome]"))
        count = driver.find_element(By.CSS_SELECTOR, ".count")
        assert chosen.first_selected_option.text == "context_gain"
        assert count.text == f"{(table.outcome == 'context_gain').sum()} of 300 rows"
        chosen.select_by_value("")
        assert count.text == "the first 200 of 300 rows"


@browser.needed
def test_tables_in_a_browser(tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    table = made_rows(500)
    order = page_tables.columns_in_order(table)
    blocks = page_tables.table_block("long", table) + page_tables.table_block("short", table[:50])
    path = tmp_path / "tables.html"
    path.write_text(page.shell("Tables", "", "", [("tables", "Tables", blocks)]), encoding="utf-8")
    with browser.chromium(tmp_path / "profile", width=1440) as driver:
        driver.get(path.as_uri())

        def one(css):
            return driver.find_element(By.CSS_SELECTOR, css)

        def cells(name: str, column: str, what: str = "textContent") -> list[str]:
            return driver.execute_script(
                "return [...document.querySelectorAll(`#table-${arguments[0]} tbody tr`)].map(r =>"
                " r.cells[arguments[1]]).map(c => arguments[2] === 'textContent' ? c.textContent"
                " : c.dataset.v ?? c.textContent)",
                name,
                order.index(column),
                what,
            )

        def choose(column: str, value: str) -> str:
            Select(one(f"#table-long select[data-column={column}]")).select_by_value(value)
            return one("#table-long .count").text

        # the script writes numbers by the rule of the written tables
        assert cells("long", "estimate") == []
        for name in ("long", "short"):
            one(f"#table-{name} summary").click()
        assert one("#table-long .count").text == "the first 200 of 500 rows"
        for column in order:
            assert cells("long", column)[:50] == cells("short", column), column
        one("#table-long .more").click()
        assert len(cells("long", "estimate")) == 500
        assert one("#table-long .count").text == "500 rows"

        # numbers stand at the right under their heads, and no hyphen stands for a minus
        shape = driver.execute_script(
            "const t = document.querySelector('#table-long table'), j = arguments[0];"
            "const head = t.tHead.rows[0].cells[j].querySelector('button');"
            "return [head, t.tBodies[0].rows[0].cells[j]].map(e => getComputedStyle(e).textAlign)",
            order.index("estimate"),
        )
        assert shape == ["right", "right"]
        assert not re.search(r"(?<!\w)-\d", " ".join(" ".join(cells("long", c)) for c in order))

        # filters cut the rows, alone and together, and say how many of how many
        kept = table[table.outcome == "context_gain"]
        assert choose("outcome", "context_gain") == "the first 200 of 250 of 500 rows"
        kept = kept[kept.budget == 0.3]
        assert choose("budget", "0.3") == f"{len(kept)} of 500 rows"
        assert cells("long", "prompts", "v") == [str(n) for n in kept.prompts]
        assert {*cells("long", "budget")} == {"30 %"}

        # the first click on a head puts the best first; undefined values come last both ways
        defined = kept.minus_random.dropna()
        head = one(f"#table-long th:nth-child({order.index('minus_random') + 1}) button")
        for best_first in (True, False):
            head.click()
            found = cells("long", "minus_random", "v")
            assert [float(v) for v in found if v] == pytest.approx(
                sorted(defined, reverse=best_first), rel=1e-5
            )
            assert found[len(defined) :] == [""] * (len(kept) - len(defined)) != []
        one(f"#table-long th:nth-child({order.index('p_value') + 1}) button").click()
        small = [float(v) for v in cells("long", "p_value", "v")]
        assert small == sorted(small)  # of a p value the smallest is the best

        # copy: as CSV at full precision, what is kept in the order shown
        driver.execute_script(
            "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => {"
            " window.copied = text; }}});"
        )
        one("#table-long .copy").click()
        copied = pd.read_csv(io.StringIO(driver.execute_script("return window.copied")))
        pd.testing.assert_frame_equal(
            copied[list(table.columns)],
            kept.sort_values("p_value").reset_index(drop=True),
            rtol=1e-5,
            check_dtype=False,
        )
        assert browser.complaints(driver) == [] and browser.outside_requests(driver) == []


@browser.needed
def test_print_repeats_the_heads_of_a_table_on_each_page(tmp_path):
    block = page_tables.table_block("long", made_rows(300))
    path = tmp_path / "tables.html"
    path.write_text(page.shell("Tables", "", "", [("tables", "Tables", block)]), encoding="utf-8")
    with browser.chromium(tmp_path / "profile") as driver:
        driver.get(path.as_uri())
        driver.execute_script(
            "document.querySelector('#table-long').open = true;"
            "const mark = document.createElement('style');"
            "mark.textContent = 'thead th { background: #123456 !important; }';"
            "document.head.append(mark);"
        )
        driver.execute_async_script("const done = arguments[0]; setTimeout(done, 200)")
        pages = browser.printed(driver, backgrounds=True)
        assert len(pages) > 3
        for content in pages:
            assert any(
                np.allclose(fill, np.array([0x12, 0x34, 0x56]) / 255, atol=1e-3)
                for fill in browser.fills(content)
            )


@browser.needed
def test_in_a_browser(decided, tmp_path):
    from selenium.webdriver.common.by import By

    with browser.chromium(tmp_path / "profile", width=1440) as driver:
        driver.get((decided / "report.html").as_uri())

        def style(css: str, name: str) -> str:
            return driver.execute_script(
                "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]",
                css,
                name,
            )

        def is_open(css: str) -> bool:
            return driver.execute_script(
                "return document.querySelector(arguments[0]).closest('details').open", css
            )

        # the answer and the grid stand side by side on the first screen
        assert driver.find_element(By.CSS_SELECTOR, "figure .wide").is_displayed()
        top = driver.execute_script(
            "return document.querySelector('#figure-decision').getBoundingClientRect().top"
        )
        assert top < 300

        # the contents stay in view, and lead to the top and to what is folded
        driver.execute_script("scrollTo(0, document.body.scrollHeight)")
        assert driver.find_element(By.CSS_SELECTOR, "nav").rect["y"] > 1000
        nav = "return document.querySelector('nav').getBoundingClientRect().top"
        assert driver.execute_script(nav) == 0
        for target in ("#term-criterion", "#table-decision"):
            assert not is_open(target)
            driver.execute_script(f"location.hash = '{target}'")
            driver.execute_async_script("const done = arguments[0]; setTimeout(done, 200)")
            assert is_open(target)

        # light and dark: as the system has it, then as the reader wants it
        ink, paper = ("figure svg text", "fill"), ("body", "backgroundColor")
        light, dark = (
            ("rgb(31, 35, 40)", "rgb(255, 255, 255)"),
            (
                "rgb(240, 243, 246)",
                "rgb(20, 24, 29)",
            ),
        )
        assert (style(*ink), style(*paper)) == light
        driver.find_element(By.CSS_SELECTOR, "button.theme").click()
        assert (style(*ink), style(*paper)) == dark
        driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
        )
        assert (style(*ink), style(*paper)) == dark
        driver.find_element(By.CSS_SELECTOR, "button.theme").click()
        assert (style(*ink), style(*paper)) == light  # against the system's wish
        driver.execute_script("document.documentElement.removeAttribute('data-theme')")
        assert (style(*ink), style(*paper)) == dark

        # print: light whatever the theme is, heads on each page, token colors kept
        driver.execute_script("document.documentElement.dataset.theme = 'dark'")
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
        assert style(*paper) == "rgb(255, 255, 255)"
        assert style("nav", "display") == "none" == style("details.table:not([open])", "display")
        assert style("thead", "display") == "table-header-group"
        assert style(".tokenview .t", "printColorAdjust") == "exact"
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        driver.execute_script(
            "document.querySelectorAll('details.table').forEach(d => { d.open = true; })"
        )
        assert 3 < len(browser.printed(driver)) < 150

        # a phone: the narrow drawings, nothing wider than the page
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True},
        )
        assert driver.find_element(By.CSS_SELECTOR, "figure .narrow").is_displayed()
        assert not driver.find_element(By.CSS_SELECTOR, "figure .wide").is_displayed()
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 390
        for scrolled in (0, 120):  # the links may scroll, and the button stays in sight
            right = driver.execute_script(
                "document.querySelector('nav').scrollLeft = arguments[0];"
                "return document.querySelector('nav .theme').getBoundingClientRect().right",
                scrolled,
            )
            assert 300 < right <= 390
        assert driver.execute_script(nav) is not None
        assert browser.complaints(driver) == []
        assert browser.outside_requests(driver) == []
