"""What a user naturally writes works, or is refused in a sentence that says what was meant."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import diagnostics as dx
from diagnostics.analysis.config import Bootstrap
from diagnostics.analysis.selection import ComparisonConfig
from diagnostics.core import inputs, names, shown
from diagnostics.core.tables import write_csv, write_parquet
from diagnostics.probing.intervention import InterventionConfig
from diagnostics.probing.one_step import ProbeResult
from diagnostics.report.run_results import RunResults
from diagnostics.training.grid import ValidateConfig
from diagnostics.training.run import TrainConfig
from tests.conftest import make_bank, make_model, make_tokenizer
from tests.factories import keys
from tests.made_tokens import made_tokens

DRAWS = 20


@pytest.fixture(scope="module")
def tokens():
    return made_tokens(8, 8)


@pytest.fixture
def run_dir(tokens, tmp_path):
    write_parquet(tmp_path / "tokens.parquet", tokens)
    return tmp_path


def result_of(tokens):
    """A probe's result that holds the table."""
    nothing = pd.DataFrame()
    return ProbeResult(tokens, nothing, nothing, nothing, [])


def error_of(call):
    with pytest.raises(dx.DiagnosticsError) as caught:
        call()
    return str(caught.value)


# What works


@pytest.mark.parametrize(
    "given",
    [
        lambda tokens, folder: tokens,
        lambda tokens, folder: str(folder / "tokens.parquet"),
        lambda tokens, folder: folder / "tokens.parquet",
        lambda tokens, folder: folder,
        lambda tokens, folder: result_of(tokens),
        lambda tokens, folder: RunResults(tokens=tokens),
    ],
    ids=["table", "text", "path", "run directory", "ProbeResult", "run"],
)
def test_a_token_table_may_be_a_path_a_run_or_a_result(given, tokens, run_dir):
    value = given(tokens, run_dir)
    whole = dx.correlate(tokens, criteria=["entropy"], draws=DRAWS)
    pd.testing.assert_frame_equal(
        dx.correlate(value, criteria=["entropy"], draws=DRAWS), whole, rtol=1e-6
    )
    assert (dx.select(value, "entropy") == dx.select(tokens, "entropy")).all()


@pytest.mark.parametrize("function", ["correlate", "study", "compare", "selection_profile"])
def test_one_name_stands_for_a_list_of_one(function, tokens):
    found = getattr(dx, function)(tokens, criteria="teachability", draws=DRAWS)
    if isinstance(found, dict):
        found = found["correlations" if function == "study" else "selection_summary"]
    assert set(found.criterion) - {"random", "full"} == {"teachability"}


def test_one_budget_or_a_percentage_stands_for_a_list_of_one(tokens):
    how = {"criteria": "entropy", "outcomes": "gain", "draws": DRAWS}
    wanted = dx.selection_curves(tokens, budgets=[0.05], **how)
    for budgets in (0.05, "5%", ["5 %"], "0.05"):
        pd.testing.assert_frame_equal(dx.selection_curves(tokens, budgets=budgets, **how), wanted)
    assert set(wanted.budget) == {0.05}


@pytest.mark.parametrize("budget", ["5%", "5 %", "0.05", ".05"])
def test_a_budget_may_be_a_text(budget, tokens):
    assert (dx.select(tokens, "entropy", budget=budget) == dx.select(tokens, "entropy")).all()
    chosen = dx.ambiguous_share(tokens, "entropy", budget=budget)
    assert chosen == dx.ambiguous_share(tokens, "entropy", budget=0.05)


def test_a_function_of_the_table_selects_like_its_scores(tokens):
    by = dx.select(tokens, lambda table: -table.student_entropy, budget=0.2)
    assert (by == dx.select(tokens, -tokens.student_entropy.to_numpy(), budget=0.2)).all()
    assert by.sum() == np.ceil(0.2 * len(tokens))


@pytest.mark.parametrize(
    "prompts",
    [
        ["w1 w2", "w3 w4"],
        [{"prompt": "w1 w2"}, {"prompt": "w3 w4"}],
        pd.DataFrame({"prompt": ["w1 w2", "w3 w4"]}),
    ],
    ids=["texts", "rows", "table"],
)
def test_texts_rows_and_tables_are_prompts(prompts, pair, tmp_path):
    bank = dx.rollout(pair, prompts, max_new_tokens=3)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3 w4"}\n')
    for same in (
        tmp_path / "prompts.jsonl",
        str(tmp_path / "prompts.jsonl"),
        dx.load_prompts(prompts, pair=pair),
        dx.load_prompts(tmp_path / "prompts.jsonl", tokenizer=pair.tokenizer),
    ):
        assert dx.rollout(pair, same, max_new_tokens=3) == bank


def test_a_view_before_the_probe_is_colored_by_the_divergence():
    bank = make_bank([3])
    tokens = keys(
        context_id=[bank[0].context_id] * 3,
        prompt_id=["p"] * 3,
        position=[0, 1, 2],
        response_length=[3] * 3,
        token_id=list(bank[0].response_ids),
        token=list("abc"),
        forward_kl=[0.1, 0.2, 0.3],
    )
    fragment = dx.show(bank, tokens).fragment
    assert fragment == dx.show(bank, tokens, color="forward_kl").fragment
    probed = tokens.assign(gain=[0.0, 1.0, 2.0])
    assert dx.show(bank, probed).fragment == dx.show(bank, probed, color="gain").fragment


def test_read_tokens_opens_the_directory_of_a_run(tokens, run_dir):
    pd.testing.assert_frame_equal(
        dx.read_tokens(run_dir), dx.read_tokens(run_dir / "tokens.parquet")
    )


def test_a_finished_table_may_be_a_path(tmp_path):
    frame = pd.DataFrame({"criterion": ["entropy"], "estimate": [0.5]})
    path = write_csv(tmp_path / "correlations.csv", frame)
    pd.testing.assert_frame_equal(inputs.table(path), frame)
    assert inputs.table(frame) is frame and inputs.table("2A") == "2A"
    message = error_of(lambda: inputs.table(tmp_path / "no.csv"))
    assert message.startswith(f"{tmp_path / 'no.csv'} cannot be read as a table")


def test_a_figure_takes_the_path_of_its_table_and_a_result(tokens, tmp_path):
    frame = dx.correlate(tokens, criteria=["entropy", "teachability"], draws=DRAWS)
    path = write_csv(tmp_path / "correlations.csv", frame)
    assert dx.plot.correlations(str(path)).caption == dx.plot.correlations(frame).caption
    with_one = dx.plot.entropy_divergence(result_of(tokens), color="gain")
    assert len(with_one.axes) == len(dx.plot.entropy_divergence(tokens, color=["gain"]).axes)


# What is refused, and with which sentence


def rows(tokens, folder, pair):
    """Every mistake, with what the error says."""
    return {
        "budget=5": (
            lambda: dx.select(tokens, "entropy", budget=5),
            "A budget is a share of positions in (0, 1]; got 5. Did you mean 0.05 (5 %)?",
        ),
        "budget=five": (
            lambda: dx.select(tokens, "entropy", budget="five"),
            "A share is a number above 0 and at most 1, as 0.05 or 5%; got 'five'.",
        ),
        "no prompts": (
            lambda: dx.rollout(pair, []),
            "There are no prompts. Give at least one, as load_prompts or sums returns them.",
        ),
        "numbers as prompts": (
            lambda: dx.rollout(pair, [1, 2]),
            "Prompts are the path of a file, or a list of texts or of rows with a column prompt;"
            " got '[1, 2]'.",
        ),
        "no tokenizer": (
            lambda: dx.load_prompts("prompts.jsonl"),
            "Prompts are rendered with the pair's tokenizer; got neither pair nor tokenizer. Call"
            " load_prompts(path, pair=pair).",
        ),
        "budget for budgets": (
            lambda: dx.intervene(pair, None, budget=0.05),
            "intervene() takes no setting 'budget'. Did you mean 'budgets'?",
        ),
        "criterion misspelled": (
            lambda: dx.select(tokens, "teachabilty"),
            "Unknown criterion 'teachabilty'. Did you mean 'teachability'? Known are ",
        ),
        "outcome misspelled": (
            lambda: dx.selection_curves(tokens, outcomes="gian", draws=DRAWS),
            "The comparison needs an outcome, one of gian; the table has context_id, prompt_id, ",
        ),
        "one run to compare": (
            lambda: dx.compare_runs(str(folder)),
            "A comparison needs two or more runs, each with a name of its own; got 1 and",
        ),
        "pair misspelled": (
            lambda: dx.load_pair("embeded"),
            "Unknown pair 'embeded'. Did you mean 'embedded'? Known are embedded, smollm2; or give"
            " two models of your own as student and teacher.",
        ),
        "a column in short": (
            lambda: dx.criterion("x", needs=["compat"]),
            "Criterion 'x' needs the column 'compat', which no token table has. Did you mean"
            " 'compatibility'?",
        ),
        "a column misspelled": (
            lambda: dx.criterion("x", needs="student_entorpy"),
            "Criterion 'x' needs the column 'student_entorpy', which no token table has. Did you"
            " mean 'student_entropy'?",
        ),
        "scores of the wrong length": (
            lambda: dx.select(tokens, [1.0, 2.0]),
            f"Got scores of shape (2,) for {len(tokens)} positions. Give one per row.",
        ),
        "nothing to select by": (
            lambda: dx.select(tokens, {"a": 1}),
            "Positions are selected by a criterion's name, scores or a function of the table; got",
        ),
        "a CSV as tokens": (
            lambda: dx.correlate("bank.csv"),
            "bank.csv is no parquet file. Read it with dx.read_tokens('bank.csv') and pass the"
            " table.",
        ),
        "an empty folder": (
            lambda: dx.correlate(folder / "empty"),
            f"{folder / 'empty'} holds no tokens.parquet. Name the --output-dir of a run",
        ),
        "an empty folder to read": (
            lambda: dx.read_tokens(folder / "empty"),
            f"{folder / 'empty'} holds no tokens.parquet and no rollouts",
        ),
        "a number as tokens": (
            lambda: dx.correlate(3),
            "A token table is a DataFrame with one row per position, a tokens.parquet, the"
            " directory of a run, or what dx.probe returns; got int 3.",
        ),
        "a run without tokens": (
            lambda: dx.correlate(RunResults()),
            "This RunResults holds no token table. Name a run that has tokens.parquet.",
        ),
    }


@pytest.mark.parametrize("mistake", rows([], Path(), None))
def test_a_mistake_is_named_with_its_remedy(mistake, tokens, pair, tmp_path):
    (tmp_path / "empty").mkdir()
    call, sentence = rows(tokens, tmp_path, pair)[mistake]
    message = error_of(call)
    assert message.startswith(sentence), message
    assert len(message) < 700


def test_an_unknown_column_is_met_with_the_nearest_ones():
    wide = pd.DataFrame({"compatibility": [0.1], **{f"c{i}": [0] for i in range(60)}})
    message = error_of(lambda: dx.show(make_bank([1]), wide.assign(positon=0)))
    assert message.startswith(
        "A token view needs the columns context_id, position, token; this one has compatibility,"
        " c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10 and 50 more (did you mean positon?)."
    )


def test_a_column_of_the_users_own_may_be_needed(registry, tokens):
    dx.criterion("own", needs=["my_probe_score"])(lambda table: table.my_probe_score)
    own = tokens.assign(my_probe_score=np.arange(len(tokens)))
    assert dx.select(own, "own", budget=0.1)[-1]


def test_an_unknown_function_is_met_with_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'corelate'\. Did you mean 'correlate'"):
        dx.corelate  # noqa: B018


# What is warned about


def test_the_budget_1_is_every_position_with_a_warning(tokens, caplog):
    with caplog.at_level(logging.WARNING, "diagnostics"):
        assert dx.select(tokens, "entropy", budget=1).all()
    assert [record.getMessage() for record in caplog.records] == [
        "budget 1 is every position (100 %). Write 1.0 if that is meant, or 0.01 for 1 %."
    ]
    caplog.clear()
    assert dx.select(tokens, "entropy", budget=1.0).all() and not caplog.records


def test_a_smaller_teacher_is_remarked_upon(caplog):
    small, large, tokenizer = make_model(1, layers=1), make_model(2, layers=4), make_tokenizer()
    with caplog.at_level(logging.WARNING, "diagnostics"):
        dx.load_pair(student=small, teacher=large, tokenizer=tokenizer)
        assert not caplog.records
        dx.load_pair(student=large, teacher=small, tokenizer=tokenizer)
    (record,) = caplog.records
    counts = [sum(p.numel() for p in model.parameters()) for model in (small, large)]
    assert record.getMessage() == (
        f"the teacher has {counts[0]:,} parameters and the student {counts[1]:,}: if the two are"
        " swapped, exchange student and teacher"
    )


# What a result says of itself


@pytest.mark.slow
def test_results_are_short_where_they_are_printed(tokens, pair):
    bank = make_bank([5] * 400)
    study = dx.study(tokens, draws=DRAWS)
    results = {
        "ProbeResult (rows): tokens (": result_of(tokens),
        "<Bank: 400 contexts of 400 prompts, 2,000 response positions, ": bank,
        "<Context ": bank[0],
        "<Pair tiny: student Llama": pair,
        f"{len(study)} tables (rows): correlations (": study,
        "<Run ": RunResults(tokens=tokens, tables={f"t{i}" * 9: tokens for i in range(200)}),
    }
    for begins, result in results.items():
        assert repr(result).startswith(begins), repr(result)[:200]
        assert len(repr(result)) < 1500
    assert isinstance(study, dict) and study["correlations"] is not None
    assert all(f"<td>{name}</td>" in study._repr_html_() for name in study)


def test_a_long_text_is_cut_with_a_mark():
    assert shown.cut("abcdef", 4) == "abc…" and shown.cut("abcd", 4) == "abcd"


# Names


@pytest.mark.parametrize(
    "word, sure, near",
    [
        ("compat", "compatibility", "compatibility"),
        ("entropy", "student_entropy", "student_entropy"),
        ("student_entorpy", "student_entropy", "student_entropy"),
        ("my_entropy", "", "student_entropy"),
        ("zz", "", ""),
    ],
)
def test_a_word_is_near_a_name_or_surely_means_it(word, sure, near):
    known = ["compatibility", "student_entropy", "gain"]
    assert names.meant(word, known) == sure and names.nearest(word, known) == near


@pytest.mark.parametrize(
    "made, field, expected",
    [
        (lambda: ComparisonConfig(budgets=["5%", 0.1]), "budgets", (0.05, 0.1)),
        (lambda: ComparisonConfig(criteria="tip", budgets="5%"), "criteria", ("tip",)),
        (lambda: InterventionConfig(budgets="30 %"), "budgets", (0.3,)),
        (lambda: TrainConfig(budget="5%"), "budget", 0.05),
        (lambda: ValidateConfig(budgets=[0.05]), "budgets", (0.05,)),
        (lambda: Bootstrap(level="90%"), "level", 0.9),
    ],
)
def test_configurations_read_what_keywords_do(made, field, expected):
    assert getattr(made(), field) == pytest.approx(expected) or getattr(made(), field) == expected


def test_a_share_that_is_none_is_refused_where_the_configuration_is_made():
    said = error_of(lambda: ComparisonConfig(budgets=["five"]))
    assert said == "A share is a number above 0 and at most 1, as 0.05 or 5%; got 'five'."


def test_the_whole_number_one_is_warned_about_once(caplog):
    caplog.set_level(logging.WARNING, "diagnostics")
    config = TrainConfig(budget=1)
    assert config.budget == 1.0 and len(caplog.records) == 1
    assert TrainConfig(budget=config.budget).budget == 1.0 and len(caplog.records) == 1
