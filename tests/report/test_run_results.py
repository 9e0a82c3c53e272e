"""What a page reads of a run whose token table is too large to be studied whole."""

import pytest

from diagnostics.analysis import prompt_groups
from diagnostics.report.page import page
from diagnostics.report.run_results import read_run
from tests import study_tables


@pytest.fixture
def directory(tmp_path):
    return study_tables.write_run(tmp_path / "run", verdicts=study_tables.verdicts())


def test_a_page_of_a_large_table_reads_the_sample_and_its_contexts(directory, monkeypatch):
    whole = read_run(directory, shown=2)
    monkeypatch.setattr(prompt_groups, "LEAST_PROMPTS", 2)
    monkeypatch.setattr(prompt_groups, "STUDIED", len(whole.tokens) // 2)
    run = read_run(directory, shown=2)
    prompts = set(run.tokens["prompt_id"])
    assert 0 < len(run.tokens) < len(whole.tokens) and prompts < set(whole.tokens["prompt_id"])
    assert {context.prompt_id for context in run.bank} == prompts
    assert len(read_run(directory).tokens) == len(whole.tokens)
    assert f"of {len(run.bank)} contexts" in page(run, {}, {}, contexts=1)
