"""What was changed by hand, cut by a kill or laid beside a run does not pass for measured, in any
reader.
"""

import json
import os
import shutil

import pandas as pd
import pytest

from diagnostics.analysis.foresight import offline_answers
from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.cli import main
from diagnostics.pipeline.run import open_run
from diagnostics.pipeline.stages.analyze import table_path
from diagnostics.pipeline.stages.token_table import join_tokens
from diagnostics.pipeline.stages.validate import _claims_of
from diagnostics.report import compare_runs, page, run_results
from tests import study_tables


@pytest.fixture
def run(tmp_path):
    return study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())


def edit(path):
    """Change a file so that it can still be read."""
    if path.suffix == ".parquet":
        pd.concat([pd.read_parquet(path)] * 2).to_parquet(path, index=False)
    else:
        path.write_text(path.read_text().replace("teachability", "FORGED"))


@pytest.mark.parametrize(
    "name", ["tables/correlations.csv", "tables/verdicts.csv", "tokens.parquet", "contexts.parquet"]
)
def test_a_changed_file_is_left_out_of_the_page_and_the_page_says_so(run, caplog, name):
    edit(run / name)
    text = page.build(run).read_text(encoding="utf-8")
    said = (
        f"{name} is not as it was written and was left out of this page. Run the stage that writes"
        " it again."
    )
    assert f'<p class="warning">{said}</p>' in text and "FORGED" not in text and said in caplog.text
    assert said.replace("_", r"\_") in (run / "report.md").read_text()
    results = run_results.read_run(run)
    assert (
        results.table("correlations") is None,
        results.table("verdicts") is None,
        results.tokens is None,
        results.bank is None,
    ) == tuple(
        name == each
        for each in (
            "tables/correlations.csv",
            "tables/verdicts.csv",
            "tokens.parquet",
            "contexts.parquet",
        )
    )


def test_a_run_of_changed_tables_alone_has_no_page(run):
    for path in (run / "tables").iterdir():
        path.write_text("a,b\n1,2\n")
    with pytest.raises(
        DiagnosticsError, match=r"holds no table \(tables/calibration\.csv is not as it was written"
    ):
        page.build(run)


def test_a_table_of_no_record_is_shown_with_a_word(run, caplog):
    pd.DataFrame({"a": [1]}).to_csv(run / "tables/mine.csv", index=False)
    text = page.build(run).read_text(encoding="utf-8")
    assert (
        '<p class="warning">tables/mine.csv is in no record of manifest.json, so nothing says what'
        " measured it.</p>"
        in text
        and 'id="table-mine"' in text
    )


def test_runs_side_by_side_say_what_was_left_out(run, tmp_path):
    other = study_tables.write_run(tmp_path / "other")
    edit(run / "tables/correlations.csv")
    text = compare_runs.compare_runs([run, other]).html
    assert (
        '<p class="warning">run: tables/correlations.csv is not as it was written' in text
        and "FORGED" not in text
    )


@pytest.mark.parametrize(
    "name", ["tables/x.csv", "tokens.parquet", "manifest.json", "metrics.jsonl", "cells"]
)
def test_a_reader_follows_no_link(run, tmp_path, name):
    (tmp_path / "secret").write_text("password")
    if os.path.lexists(run / name):
        (run / name).unlink()
    (run / name).symlink_to(tmp_path if name == "cells" else tmp_path / "secret")
    if name == "cells":
        assert "training_metrics" not in run_results.read_run(run).tables
    else:
        with pytest.raises(DiagnosticsError, match=f"{name} is a link"):
            run_results.read_run(run)


@pytest.mark.parametrize(
    "read, name",
    [
        (lambda run: table_path(str(run), "verdicts", what="validation"), "tables/verdicts.csv"),
        (lambda run: _claims_of(str(run)), "tables/verdicts.csv"),
        (lambda run: offline_answers(run, [("teachability", 0.3)], draws=10), "tokens.parquet"),
    ],
)
def test_another_run_s_changed_file_is_refused(run, read, name):
    read(run)
    edit(run / name)
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"{name} is not as it was written: its sha256 is .*Run the stage that writes it again"
            r" in .*, or name another run\.$"
        ),
    ):
        read(run)


def test_changed_scores_join_no_table(tmp_path):
    with open_run(tmp_path) as run:
        run.stage(
            "score",
            settings={},
            outputs=["scores.parquet"],
            work=lambda: study_tables.tokens().to_parquet(run.path("scores.parquet"), index=False),
        )
        join_tokens(run)
        edit(run.path("scores.parquet"))
        with pytest.raises(
            DiagnosticsError,
            match=(
                r"scores\.parquet is not as it was written\. Run the stage that writes it again\."
            ),
        ):
            join_tokens(run)


# --- damage ---


@pytest.mark.parametrize(
    "cut, count", [('{"step": 2, "lo', "1 line"), ("[" * 100_000 + "\n\x00", "2 lines")]
)
def test_a_line_that_a_kill_cut_is_left_out_and_counted(run, cut, count):
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' + cut)
    text = page.build(run).read_text(encoding="utf-8")
    assert f"metrics.jsonl has {count} cut by a kill or damaged, which were left out." in text
    assert run_results.read_run(run).tables["training_metrics"].to_dict("records") == [
        {"step": 1, "loss": 2.0}
    ]


@pytest.mark.parametrize("record", [None, "{", "[1]", '{"cell": 3}'])
def test_a_curve_without_a_readable_record_is_left_out(run, record):
    (run / "cells").mkdir()
    pd.DataFrame({"step": [1]}).to_parquet(run / "cells/a.curve.parquet")
    if record is not None:
        (run / "cells/a.json").write_text(record)
    results = run_results.read_run(run)
    assert results.reading_notes == (
        "cells/a.curve.parquet has no record of its training beside it and was left out.",
    )


def test_a_name_that_is_no_unicode_stands_escaped(run):
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["rollout"]["settings"]["prompts"] = "p\udcff.jsonl"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert r"p\udcff.jsonl" in page.build(run).read_text(encoding="utf-8")


# --- pages ---


def test_a_page_of_somebody_s_own_is_not_replaced(run, capsys):
    (run / "report.html").write_text("my page")
    assert main(["report", str(run), "--contexts", "0", "--quiet"]) == 2
    assert "report.html is there, and pages.json has no record of it" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "my page" and not (run / "figures").exists()


def test_a_page_that_was_edited_is_not_replaced_and_one_that_was_not_is(run):
    first = page.build(run).read_bytes()
    assert page.build(run).read_bytes() == first
    (run / "report.md").write_text("mine")
    with pytest.raises(
        DiagnosticsError,
        match=r"report\.md is not as it was written, so it is not this program's to replace",
    ):
        page.build(run)


def test_a_comparison_replaces_its_own_page_only(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "r$x_{$")
    compare = ["report", "--quiet", "--against", str(run), str(tmp_path / "r$x_{$"), "--output-dir"]
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("theirs")
    assert main([*compare, str(site)]) == 0 and main([*compare, str(site)]) == 0
    assert sorted(os.listdir(site)) == ["compare.html", "index.html", "pages.json"]
    (site / "compare.html").write_text("my page")
    assert main([*compare, str(site)]) == 2 and (site / "compare.html").read_text() == "my page"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/compare.html").symlink_to(site / "index.html")
    assert (
        main([*compare, str(tmp_path / "linked")]) == 2
        and (site / "index.html").read_text() == "theirs"
    )
    capsys.readouterr()
    with open_run(run):
        assert main([*compare, str(run)]) == 2
    assert (
        "is in use by another process" in capsys.readouterr().err
        and not (run / "compare.html").exists()
    )
