"""Imported token tables: released columns under our names, with what cannot be trusted named."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.analysis.study import study
from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.core.errors import DiagnosticsError
from tests.factories import keys


def bank(**columns):
    """Two responses of two tokens, with the columns of the released scripts."""
    base = dict(
        sample_index=[3, 3, 4, 4],
        group_index=[1, 1, 2, 2],
        sample_ordinal=[0, 0, 1, 1],
        tok_pos=[0, 1, 0, 1],
        token_id=[5, 6, 7, 8],
        Hs_full=[1.0, 2.0, 0.5, 0.1],
        Ht_full=[0.9, 0.8, 0.7, 0.6],
        KLf_full=[0.5, 1.0, 0.2, 4e-4],
        KLr_full=[0.4, 1.1, 0.3, 0.2],
        Cmass_true=[0.9, 0.5, 0.99, 0.1],
        Coverlap=[0.5, 0.25, 1.0, 0.0],
        reach_t1=[1, 0, 1, 0],
    )
    return pd.DataFrame(base | columns)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_opens(tmp_path, kind):
    path = tmp_path / f"bank.{kind}"
    {
        "csv": lambda f: f.to_csv(path, index=False),
        "jsonl": lambda f: f.to_json(path, orient="records", lines=True),
        "parquet": lambda f: f.to_parquet(path),
    }[kind](bank())
    tokens = read_tokens(path)
    assert (
        tokens.prompt_id.tolist() == ["group-1", "group-1", "group-2", "group-2"]
        and tokens.context_id[2] == "sample-4"
    )
    assert (
        tokens.forward_kl.tolist() == [0.5, 1.0, 0.2, 4e-4]
        and tokens.response_length.tolist() == [2] * 4
    )
    assert (
        tokens.teacher_top1_in_topk.tolist() == [True, False, True, False] and "gain" not in tokens
    )


def test_base_columns_are_before_and_plain_ones_after(tmp_path, caplog):
    frame = bank(
        KLf_full_base=[1.0, 1.5, 0.2, 5e-4],
        KLr_full_base=[0.8, 1.0, 0.3, 0.2],
        Hs_full_base=[1.1, 2.1, 0.6, 0.2],
        Cmass_true_base=[0.8, 0.4, 0.9, 0.2],
        Coverlap_base=[0.5] * 4,
        reach_t1_base=[1] * 4,
    )
    frame.to_parquet(tmp_path / "bank.parquet")
    tokens = read_tokens(tmp_path / "bank.parquet")
    np.testing.assert_allclose(tokens.gain, [0.5, 0.5, 0.0, 1e-4])
    np.testing.assert_allclose(tokens.relative_gain, [0.5, 1 / 3, 0.0, np.nan])
    np.testing.assert_allclose(tokens.relative_gain_released, [0.5, 1 / 3, 0.0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(tokens.reverse_gain, [0.4, -0.1, 0.0, 0.0], atol=1e-12)
    assert (
        tokens.compatibility.tolist() == [0.8, 0.4, 0.9, 0.2] and tokens.student_entropy[0] == 1.1
    )
    assert "read after training" not in caplog.text


def test_predictors_read_after_training_are_said(tmp_path, caplog):
    frame = bank(KLf_full_base=[1.0, 1.5, 0.2, 0.3], G_KLf=[0.5, 1 / 3, 0.0, 0.9])
    frame.to_parquet(tmp_path / "bank.parquet")
    tokens = read_tokens(tmp_path / "bank.parquet")
    assert (
        "Hs_full (student_entropy), Cmass_true (compatibility), Coverlap (topk_overlap), reach_t1"
        in caplog.text
    )
    assert "Ht_full" not in caplog.text and tokens.compatibility[1] == 0.5


def test_relative_gains_alone_give_the_gain_in_nats(tmp_path):
    before, after = np.array([1.0, 1.5, 0.2, 0.3]), np.array([0.5, 1.0, 0.2, 4e-4])
    frame = bank(G_KLf=(before - after) / (before + 1e-12))
    frame.to_parquet(tmp_path / "bank.parquet")
    tokens = read_tokens(tmp_path / "bank.parquet")
    np.testing.assert_allclose(tokens.forward_kl, before, rtol=1e-9)
    np.testing.assert_allclose(tokens.gain, before - after, rtol=1e-9)


def test_what_has_no_counterpart_is_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="diagnostics")
    bank(odd=[1] * 4).to_parquet(tmp_path / "bank.parquet")
    assert "odd" not in read_tokens(tmp_path / "bank.parquet")
    assert "columns without a counterpart, left out: odd" in caplog.text


def test_our_own_table_passes_through(tmp_path):
    frame = keys(gain=[0.1, 0.2])
    frame.to_parquet(tmp_path / "tokens.parquet")
    assert read_tokens(tmp_path / "tokens.parquet").gain.tolist() == [0.1, 0.2]


def test_another_table_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"a\.csv is no token table: neither context_id nor sample_index and tok_pos .* \(a\)\."
            r" Give a tokens\.parquet"
        ),
    ):
        read_tokens(tmp_path / "a.csv")


def read(frame, tmp_path, name="bank.parquet"):
    frame.to_parquet(tmp_path / name)
    return read_tokens(tmp_path / name)


def codes(tokens):
    return [code for code, _, _ in tokens.attrs["warnings"]]


def test_scores_of_theta0_joined_with_gains_are_before(tmp_path):
    same = {f"{name}_base": bank()[name] for name in ("KLf_full", "KLr_full", "Hs_full")}
    tokens = read(bank(**same, G_KLf=[0.5, 0.2, -0.1, 0.0]), tmp_path)
    assert codes(tokens) == [] and tokens.compatibility.tolist() == [0.9, 0.5, 0.99, 0.1]
    np.testing.assert_allclose(tokens.gain, [0.25, 0.2, -0.02, 0.0], rtol=1e-9)
    np.testing.assert_allclose(tokens.forward_kl_after, [0.25, 0.8, 0.22, 4e-4], rtol=1e-9)


def test_warnings_travel_with_the_table_into_the_study(tmp_path):
    tokens = read(bank(KLf_full_base=[1.0, 1.5, 0.2, 0.3]), tmp_path)
    ((code, subject, message),) = tokens.attrs["warnings"]
    assert (code, subject) == (
        "read_after",
        "student_entropy, compatibility, topk_overlap, teacher_top1_in_topk",
    ) and "contain the outcome" in message
    tables = study(tokens, criteria=["teachability"], draws=10)
    assert "read_after" in set(tables["warnings"].code) and "correlations" in tables


def test_without_groups_every_sample_is_a_prompt(tmp_path):
    for frame in (bank().drop(columns="group_index"), bank(group_index=[None] * 4)):
        tokens = read(frame, tmp_path)
        assert tokens.prompt_id.tolist() == [
            "sample-3",
            "sample-3",
            "sample-4",
            "sample-4",
        ] and codes(tokens) == ["no_prompts"]


def test_one_gap_costs_one_row_or_one_sample_its_group_and_no_other(tmp_path):
    tokens = read(bank(group_index=[1, None, 2, 2]), tmp_path)
    assert tokens.prompt_id.tolist() == ["group-1", "group-1", "group-2", "group-2"]
    assert tokens.attrs["warnings"] == [
        [
            "gaps",
            "group_index",
            (
                "group_index is empty in 1 of 4 rows; where other rows of the sample have it,"
                " theirs is taken."
            ),
        ]
    ]
    lone = read(bank(group_index=[1, 1, None, None]), tmp_path)
    assert lone.prompt_id.tolist() == ["group-1", "group-1", "sample-4", "sample-4"] and codes(
        lone
    ) == ["no_prompts"]
    assert (
        "group_index is empty in 2 of 4 rows" in lone.attrs["warnings"][0][2]
        and "1 samples have none at all" in lone.attrs["warnings"][0][2]
    )


def test_a_gap_in_rollouts_keeps_the_others(tmp_path):
    tokens = read(bank(rollout_id=[0, None, 1, 1]), tmp_path)
    assert tokens.context_id.tolist() == ["rollout-0-sample-3"] * 2 + ["rollout-1-sample-4"] * 2


def test_samples_without_an_index_are_told_apart_by_ordinal_or_refused_for_that_reason(tmp_path):
    tokens = read(bank(sample_index=[None] * 4), tmp_path)
    assert (
        tokens.context_id.tolist() == ["ordinal-0", "ordinal-0", "ordinal-1", "ordinal-1"]
        and tokens.response_length.tolist() == [2] * 4
    )
    assert codes(tokens) == ["sample_ordinal"]
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^sample_index is empty in 1 of 4 rows, and there is no sample_ordinal to tell the"
            r" samples apart\. Fill one of the two in\.$"
        ),
    ):
        read(bank(sample_index=[3, None, 4, 4]).drop(columns="sample_ordinal"), tmp_path)


@pytest.mark.parametrize(
    "name, values, shown",
    [
        ("tok_pos", [0, None, 0, 1], "nan"),
        ("tok_pos", [0, -1, 0, 1], "-1"),
        ("tok_pos", [0, 0.5, 0, 1], "0.5"),
        ("token_id", [5, None, 7, 8], "nan"),
    ],
)
def test_keys_that_are_no_whole_numbers_are_named(tmp_path, name, values, shown):
    with pytest.raises(
        DiagnosticsError,
        match=(
            rf"^{name} should hold whole numbers from 0, and 1 of 4 rows hold something else"
            rf" \('{shown}'\)\. Fix them\.$"
        ),
    ):
        read(bank(**{name: values}), tmp_path)


def test_masked_positions_keep_the_responses_length(tmp_path):
    """As the file has it, in each of the three ways to have it."""
    from diagnostics.criteria import relative_position

    place = np.arange(10) / 9
    frame = pd.DataFrame(
        {
            "sample_index": 0,
            "group_index": 0,
            "tok_pos": range(10),
            "token_id": 5,
            "resp_len": 10,
            "pos_norm": place,
            "Hs_full": 1.0,
            "KLf_full": np.arange(10.0),
            "loss_mask_original": [1] * 6 + [0] * 4,
        }
    )
    for left_out in ([], ["resp_len"], ["pos_norm"], ["resp_len", "pos_norm"]):
        tokens = read(frame.drop(columns=left_out), tmp_path)
        assert tokens.response_length.tolist() == [10] * 6
        np.testing.assert_allclose(relative_position(tokens), place[:6])
    cut = frame[:5].assign(loss_mask_original=1)
    assert read(cut, tmp_path).response_length.tolist() == [10] * 5


@pytest.mark.parametrize(
    "mask",
    [
        ["True", "False", "True", "true"],
        ["yes", "no", "Yes", "YES"],
        [True, False, True, True],
        ["1", "0", "1", "1"],
        [1.0, 0.0, 1.0, 1.0],
        [1, None, 1, 1],
    ],
)
def test_a_mask_in_words_is_a_mask(tmp_path, mask):
    tokens = read(
        bank(
            loss_mask_original=pd.Series(mask, dtype=object if isinstance(mask[0], bool) else None)
        ),
        tmp_path,
    )
    assert tokens.context_id.tolist() == [
        "sample-3",
        "sample-4",
        "sample-4",
    ] and tokens.response_length.tolist() == [2, 2, 2]


def test_masks_that_are_none_are_refused(tmp_path):
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^loss_mask_original holds 'perhaps' in 1 rows, which is no flag\. Write 1 and 0, or"
            r" true and false\.$"
        ),
    ):
        read(bank(loss_mask_original=["1", "perhaps", "1", "0"]), tmp_path)
    with pytest.raises(DiagnosticsError, match=r"^loss_mask_original is 0 at every position"):
        read(bank(loss_mask_original=[0] * 4), tmp_path)


def test_flags_in_words_and_values_that_are_no_numbers(tmp_path):
    tokens = read(
        bank(reach_t1=["True", "False", "true", None], Hs_full=["1.0", "2.0", "much", None]),
        tmp_path,
    )
    assert tokens.teacher_top1_in_topk.tolist() == [
        True,
        False,
        True,
        False,
    ] and tokens.student_entropy.tolist()[:2] == [1.0, 2.0]
    assert tokens.student_entropy.isna().sum() == 2 and codes(tokens) == ["not_numbers", "gaps"]
    assert (
        tokens.attrs["warnings"][0][2]
        == "Hs_full holds 'much' and the like in 1 rows: no numbers, and undefined."
    )


def test_the_floored_coefficient_of_a_training_bank_stays_apart(tmp_path):
    tokens = read(bank(schema_version=2, CBC=[0.1, 0.2, 0.3, 0.4]), tmp_path)
    assert (
        "bhattacharyya" not in tokens
        and tokens.bhattacharyya_released.tolist() == [0.1, 0.2, 0.3, 0.4]
        and codes(tokens) == ["floored"]
    )
    assert "bhattacharyya" in read(bank(CBC=[0.1] * 4), tmp_path)


def test_a_table_may_state_its_k_and_first_choices(tmp_path):
    assert read(bank(top_k=8), tmp_path).attrs["k"] == 8 and "k" not in read(bank(), tmp_path).attrs
    assert read(bank(student_top_ids=[[1, 2, 3, 4]] * 4), tmp_path).attrs["k"] == 4
    assert read(
        bank(student_top1_id=[1, 2, 3, 4], teacher_top1_id=[1, 0, 3, 0]), tmp_path
    ).top1_match.tolist() == [True, False, True, False]


def test_tokens_without_texts_have_no_type(tmp_path):
    from diagnostics.analysis.selection import profile_measures, token_type

    without, words = read(bank(), tmp_path), read(bank(token=["a", "7", ".", "b"]), tmp_path)
    assert token_type(without).tolist() == ["unknown"] * 4 and token_type(words).tolist() == [
        "word",
        "number",
        "punctuation",
        "word",
    ]
    measures = profile_measures(without)
    assert measures["unknown"].mean() == 1 and not {"word", "number", "punctuation"} & set(measures)
    assert "unknown" not in profile_measures(words)


def test_rollouts_keep_samples_apart_and_whole_floats_are_whole(tmp_path):
    tokens = read(
        bank(
            rollout_id=[0, 0, 1, 1],
            sample_index=[3.0] * 4,
            group_index=[1.0, 1.0, 2.0, 2.0],
            tok_pos=[0, 1, 0, 1],
        ),
        tmp_path,
    )
    assert tokens.context_id.unique().tolist() == [
        "rollout-0-sample-3",
        "rollout-1-sample-3",
    ] and tokens.prompt_id.unique().tolist() == ["group-1", "group-2"]


def test_positions_outside_the_loss_mask_are_dropped(tmp_path):
    tokens = read(bank(loss_mask_original=[1, 0, 1, 1]), tmp_path)
    assert len(tokens) == 3 and tokens.attrs["warnings"] == [
        ["unsupervised", "loss_mask_original", "1 positions outside the loss mask were dropped."]
    ]


def test_what_follows_from_other_columns(tmp_path):
    tokens = read(
        bank(student_logp_sampled=[-1.0, -2, -3, -4], teacher_logp_sampled=[-2.0, -2, -1, -5]),
        tmp_path,
    )
    assert tokens.advantage.tolist() == [-1, 0, 2, -1]
    np.testing.assert_allclose(tokens.acceptance, np.exp([-1.0, 0, 0, -1]))
    np.testing.assert_allclose(tokens.topk_jaccard, [1 / 3, 1 / 7, 1, 0])


def test_supports_of_the_training_bank(tmp_path):
    frame = bank(
        schema_version=2,
        Cmass_true=None,
        Cmass=[0.8, 0.4, 0.9, 0.2],
        Cmass_exact=0,
        KLf_union=[0.1, 0.2, 0.3, 0.4],
    )
    tokens = read(frame.drop(columns=["Hs_full", "Ht_full", "KLf_full", "KLr_full"]), tmp_path)
    assert "compatibility" not in tokens and tokens.compatibility_intersection.tolist() == [
        0.8,
        0.4,
        0.9,
        0.2,
    ]
    assert (
        tokens.union_forward_kl_released.tolist() == [0.1, 0.2, 0.3, 0.4]
        and "union_forward_kl" not in tokens
    )
    exact = read(frame.assign(Cmass_exact=1), tmp_path)
    assert (
        exact.compatibility.tolist() == [0.8, 0.4, 0.9, 0.2]
        and "compatibility_intersection" not in exact
    )
    assert read(bank(KLf_union=[0.1] * 4), tmp_path).union_forward_kl.tolist() == [0.1] * 4


def test_our_own_csv_keeps_its_words_and_ids(tmp_path):
    frame = keys(token=["null", "NA"], context_id=["007", "007"], gain=[0.1, np.nan])
    frame.to_csv(tmp_path / "tokens.csv", index=False)
    tokens = read_tokens(tmp_path / "tokens.csv")
    assert (
        tokens.token.tolist() == ["null", "NA"]
        and tokens.context_id.tolist() == ["007", "007"]
        and np.isnan(tokens.gain[1])
    )


def section3(**columns):
    """Two responses as section3_analysis_tokens has them: no ids of samples or tokens."""
    base = dict(
        dataset="pair_300",
        dataset_label="a pair",
        sample_ordinal=[0, 0, 1, 1],
        tok_pos=[0, 1, 0, 2],
        pos_norm=[0.0, 0.5, 0.0, 1.0],
        Hn=[0.1, 0.2, 0.0, 1.0],
        Dn=[0.5, 1.0, 0.2, 0.0],
        Cn=[1.0, 0.5, 0.9, 0.1],
        Dlearn=[0.5, 0.5, 0.18, 0.0],
        Dincompat=[0.0, 0.5, 0.02, 0.0],
        TIP=[0.55, 1.0, 0.2, 1.0],
        H_plus_teach=[0.55, 0.6, 0.18, 1.0],
        Q3_lowH_highD=[True, False, True, False],
        G_KLf=[0.5, -0.1, 0.0, 0.2],
        G_KLf_winsor01=[0.4, -0.1, 0.0, 0.2],
    )
    return pd.DataFrame(base | columns)


def test_section3_tokens_open_by_their_own_keys(tmp_path, caplog):
    caplog.set_level("INFO", logger="diagnostics")
    tokens = read(section3(), tmp_path)
    assert tokens.context_id.tolist() == ["pair_300-ordinal-0"] * 2 + ["pair_300-ordinal-1"] * 2
    assert tokens.response_length.tolist() == [3, 3, 3, 3]
    assert tokens.student_entropy_normalized.tolist() == [0.1, 0.2, 0.0, 1.0]
    assert tokens.divergence_normalized.tolist() == [0.5, 1.0, 0.2, 0.0]
    assert tokens.compatibility_normalized.tolist() == [1.0, 0.5, 0.9, 0.1]
    assert tokens.in_q3_released.tolist() == [True, False, True, False]
    assert tokens.relative_gain_released.tolist() == [0.5, -0.1, 0.0, 0.2]
    # Scaled scores are no nats, and nothing takes them for those.
    assert not {"student_entropy", "forward_kl", "compatibility", "gain"} & set(tokens)
    assert codes(tokens) == ["no_tokens", "no_prompts"]
    assert "left out: dataset_label" in caplog.text


def test_several_data_sets_in_one_file_stay_apart_and_are_said(tmp_path):
    frame = pd.concat([section3(), section3(dataset="pair_300_k8")], ignore_index=True)
    tokens = read(frame, tmp_path)
    assert tokens.context_id.nunique() == 4 and tokens.dataset.nunique() == 2
    assert (
        "2 data sets (pair_300, pair_300_k8)"
        in {code: message for code, _, message in tokens.attrs["warnings"]}["datasets"]
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_of_rollouts_is_one_table(tmp_path, kind, caplog):
    caplog.set_level("INFO", logger="diagnostics")
    folder = tmp_path / "bank"
    folder.mkdir()
    for number in (1, 0):
        frame = bank(schema_version=1, rollout_id=number, KLf_union=float(number))
        path = folder / f"rollout_{number:06d}.{kind}"
        {
            "csv": lambda f, p: f.to_csv(p, index=False),
            "jsonl": lambda f, p: f.to_json(p, orient="records", lines=True),
            "parquet": lambda f, p: f.to_parquet(p),
        }[kind](frame, path)
    (folder / "summary.csv").write_text("rollout_id,num_tokens\n0,4\n")
    (folder / "config.json").write_text('{"opd_topk_metrics_k": 4}')
    tokens = read_tokens(folder)
    assert tokens.union_forward_kl_released.tolist() == [0.0] * 4 + [1.0] * 4
    assert tokens.context_id.iloc[[0, 4]].tolist() == ["rollout-0-sample-3", "rollout-1-sample-3"]
    assert tokens.attrs["k"] == 4 and "8 rows of 2 rollouts" in caplog.text


def test_rollouts_without_a_number_are_told_apart_by_their_files(tmp_path):
    for number in (0, 1):
        bank().to_csv(tmp_path / f"rollout_{number}.csv", index=False)
    assert read_tokens(tmp_path).context_id.nunique() == 4
    bank().to_parquet(tmp_path / "rollout_2.parquet")
    assert read_tokens(tmp_path).context_id.nunique() == 6


def test_a_folder_without_rollouts_is_refused(tmp_path):
    bank().to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(
        DiagnosticsError, match=r"holds no tokens\.parquet and no rollouts \(files rollo"
    ):
        read_tokens(tmp_path)


def test_what_only_a_training_bank_has_keeps_its_own_names(tmp_path):
    tokens = read(
        bank(
            schema_version=1,
            Hs_topk=[0.1, 0.2, 0.3, 0.4],
            KLr_union=[1.0, 2.0, 3.0, 4.0],
            H_norm=[0.0, 0.5, 1.0, 0.2],
            D_norm=[0.3, 0.5, 1.0, 0.2],
            C_norm=[0.6, 0.5, 1.0, 0.2],
            quadrant=["Q3_lowH_highD", "Q1_highH_highD", "Q3_lowH_highD", "Q4_lowH_lowD"],
            budget_keep=[1, 0, 0, 1],
            target_in_student_topk=[1, 0, 1, 1],
        ),
        tmp_path,
    )
    assert tokens.student_entropy_topk.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert tokens.union_reverse_kl_released.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert tokens.compatibility_normalized.tolist() == [0.6, 0.5, 1.0, 0.2]
    assert tokens.in_q3_released.tolist() == [True, False, True, False]
    assert tokens.kept_released.tolist() == [True, False, False, True]
    assert tokens.sampled_in_topk.tolist() == [True, False, True, True]


def test_a_mass_that_is_exact_at_some_positions_is_undefined_at_the_others(tmp_path):
    frame = bank(schema_version=1, Cmass=[0.8, 0.4, 0.9, 0.2], Cmass_exact=[1, 0, 1, 0])
    tokens = read(frame.drop(columns="Cmass_true"), tmp_path)
    np.testing.assert_array_equal(tokens.compatibility, [0.8, np.nan, 0.9, np.nan])
    assert "compatibility_intersection" not in tokens


def test_a_table_of_the_trained_student_alone_has_both_sides(tmp_path):
    tokens = read(
        bank(
            KLf_full_base=[1.0, 1.5, 0.2, 0.3],
            Hs_full_base=[1.1, 2.1, 0.6, 0.2],
            student_top1_id=[1, 2, 3, 4],
            teacher_top1_id=[1, 0, 3, 0],
        ),
        tmp_path,
    )
    assert tokens.student_entropy.tolist() == [1.1, 2.1, 0.6, 0.2]
    assert tokens.student_entropy_after.tolist() == [1.0, 2.0, 0.5, 0.1]
    assert tokens.compatibility_after.tolist() == [0.9, 0.5, 0.99, 0.1]
    assert tokens.top1_match_after.tolist() == [True, False, True, False]
    assert "top1_match" not in tokens and "teacher_entropy_after" not in tokens
    ((code, _, message),) = tokens.attrs["warnings"]
    assert code == "read_after" and "--tokens BEFORE --tokens-after AFTER" in message


def test_a_gain_that_the_divergences_do_not_give_is_said(tmp_path):
    base = np.array([1.0, 1.5, 0.2, 0.3])
    stated = (base - bank().KLf_full) / (base + 1e-12)
    tokens = read(bank(KLf_full_base=base, G_KLf=stated), tmp_path)
    assert "gains_differ" not in codes(tokens)
    assert tokens.relative_gain_released.tolist() == stated.tolist()
    tokens = read(bank(KLf_full_base=base, G_KLf=stated + np.eye(4)[0] / 2), tmp_path)
    (message,) = [text for code, _, text in tokens.attrs["warnings"] if code == "gains_differ"]
    assert "differs at 1 of 4 positions" in message and "by up to 0.5" in message


def test_a_tokenizer_gives_tokens_their_texts(tmp_path):
    from diagnostics.analysis.selection import token_type
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "pair")
    write = tmp_path / "bank.parquet"
    bank().to_parquet(write)
    tokens = read_tokens(write, tokenizer=tmp_path / "pair")
    assert tokens.token.tolist() == [tokenizer.decode([i]) for i in (5, 6, 7, 8)]
    assert "unknown" not in token_type(tokens) and tokens.is_special.dtype == bool
    assert read_tokens(write, tokenizer=tokenizer).equals(tokens)
    assert "is_special" not in read_tokens(write)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"token_id": [5, 6, 7, 10**6]}, r"the token id 1000000, and the tokenizer has \d+ tokens"),
        ({"token": ["other"] * 4}, r"reads 4 of 4 tokens otherwise than the table: 'other'"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path, columns, message):
    from tests.conftest import make_tokenizer

    bank(**columns).to_parquet(tmp_path / "bank.parquet")
    with pytest.raises(DiagnosticsError, match=message):
        read_tokens(tmp_path / "bank.parquet", tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.txt", "a", r"t\.txt ends in '\.txt'"),
        ("t.parquet", "not parquet", r"t\.parquet cannot be read as parquet"),
        ("t.jsonl", "{\n", r"t\.jsonl cannot be read \(line 1 is not JSON"),
        ("t.csv", "sample_index,tok_pos\n", r"t\.csv holds no rows"),
        (
            "u.csv",
            "sample_index,tok_pos\n1,0\n",
            (
                r"A released token bank needs the column token_id; this one has sample_index,"
                r" tok_pos\."
            ),
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DiagnosticsError, match=message):
        read_tokens(tmp_path / name)
