"""Two token tables of one bank, before and after training, become one."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.core.errors import DiagnosticsError
from tests.contexts.test_import_tokens import bank
from tests.factories import keys

TRAINED = dict(
    Hs_full=[0.8, 1.9, 0.4, 0.1],
    KLf_full=[0.25, 0.9, 0.3, 4e-4],
    KLr_full=[0.3, 1.0, 0.3, 0.2],
    Cmass_true=[0.95, 0.6, 0.9, 0.2],
    Coverlap=[0.75, 0.25, 1.0, 0.0],
    reach_t1=[1, 1, 1, 0],
)


def write(frame, path):
    frame.to_parquet(path)
    return path


def read_both(before, after, tmp_path):
    return read_tokens(
        write(before, tmp_path / "theta0.parquet"), after=write(after, tmp_path / "after.parquet")
    )


def notes(tokens):
    return {code: message for code, _, message in tokens.attrs["warnings"]}


def test_plain_columns_of_the_second_file_are_after(tmp_path):
    tokens = read_both(bank(), bank(**TRAINED), tmp_path)
    assert tokens.student_entropy.tolist() == [1.0, 2.0, 0.5, 0.1]
    assert tokens.student_entropy_after.tolist() == TRAINED["Hs_full"]
    assert tokens.compatibility.tolist() == [0.9, 0.5, 0.99, 0.1]
    assert tokens.compatibility_after.tolist() == TRAINED["Cmass_true"]
    assert tokens.teacher_top1_in_topk_after.tolist() == [True, True, True, False]
    assert "teacher_entropy_after" not in tokens and tokens.attrs["warnings"] == []
    np.testing.assert_allclose(tokens.gain, [0.25, 0.1, -0.1, 0.0])
    np.testing.assert_allclose(tokens.reverse_gain, [0.1, 0.1, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(tokens.relative_gain, [0.5, 0.1, -0.5, np.nan])
    np.testing.assert_allclose(tokens.relative_gain_released, [0.5, 0.1, -0.5, 0.0])


def test_rows_are_joined_by_their_keys_and_the_others_counted(tmp_path):
    after = bank(**TRAINED).iloc[[3, 1, 0]]
    extra = bank(**TRAINED).iloc[[0]].assign(sample_index=9)
    tokens = read_both(bank(), pd.concat([after, extra]), tmp_path)
    assert tokens[["context_id", "position"]].to_numpy().tolist() == [
        ["sample-3", 0],
        ["sample-3", 1],
        ["sample-4", 1],
    ]
    assert tokens.forward_kl_after.tolist() == [0.25, 0.9, 4e-4]
    assert "1 of 4 positions of" in notes(tokens)["unmatched"]
    assert "and 1 of 4 of" in notes(tokens)["unmatched"]


def test_relative_gains_of_the_file_stay_to_the_last_bit(tmp_path):
    before = np.array([0.5, 1.0, 0.2, 4e-4])
    stated = (before - TRAINED["KLf_full"]) / (before + 1e-12) + 1e-14
    after = bank(**TRAINED, G_KLf=stated, KLf_full_base=before, Hs_full_base=[1, 2, 0.5, 0.1])
    tokens = read_both(bank(), after, tmp_path)
    assert tokens.relative_gain_released.tolist() == stated.tolist()
    assert tokens.attrs["warnings"] == []


def test_what_the_second_file_says_of_theta0_is_compared(tmp_path):
    after = bank(**TRAINED, KLf_full_base=[0.5, 1.0, 0.2, 0.1], Hs_full_base=[1, 2, 0.5, 0.3])
    tokens = read_both(bank(), after, tmp_path)
    assert tokens.forward_kl.tolist() == [0.5, 1.0, 0.2, 4e-4]
    assert "student_entropy at 1 positions, by up to 0.2" in notes(tokens)["base_differs"]
    other = bank(**TRAINED, KLf_full_base=[1.5, 2.0, 0.9, 0.7])
    with pytest.raises(DiagnosticsError, match=r"at 4 of 4 positions .* are of two students"):
        read_both(bank(), other, tmp_path)


def test_a_teacher_that_differs_is_said(tmp_path):
    tokens = read_both(bank(), bank(**TRAINED, Ht_full=[0.1] * 4), tmp_path)
    assert "teacher_entropy at 4 positions" in notes(tokens)["base_differs"]


def test_gains_of_the_first_file_give_way(tmp_path):
    tokens = read_both(
        bank(G_KLf=[0.0] * 4, KLf_full_base=bank().KLf_full), bank(**TRAINED), tmp_path
    )
    np.testing.assert_allclose(tokens.gain, [0.25, 0.1, -0.1, 0.0])
    assert "give way to those of the second" in notes(tokens)["replaced"]


@pytest.mark.parametrize(
    "after, message",
    [
        (
            bank(**TRAINED, sample_index=[7, 7, 8, 8]),
            r"No position is in both tables: .*'sample-3'",
        ),
        (bank(**TRAINED, token_id=[5, 6, 7, 9]), r"1 of 4 positions hold another token .* is 8 in"),
        (bank(**TRAINED).drop(columns="KLf_full"), r"Gains need the forward KL before and after"),
        (
            bank(KLf_full_base=bank().KLf_full, G_KLf=[0.5, 0.2, 0.1, 0.0]),
            r"The plain columns of .* are those of theta0",
        ),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(tmp_path, after, message):
    with pytest.raises(DiagnosticsError, match=message):
        read_both(bank(), after, tmp_path)


def test_tables_of_two_k_are_refused(tmp_path):
    with pytest.raises(DiagnosticsError, match=r"at K = 4 and .* at K = 8\. Give two tables"):
        read_both(bank(k=4), bank(k=8, **TRAINED), tmp_path)
    assert read_both(bank(k=4), bank(**TRAINED), tmp_path).attrs["k"] == 4


def test_a_sample_index_that_one_file_lacks_is_the_ordinal_in_both(tmp_path):
    tokens = read_both(bank(), bank(**TRAINED, sample_index=[None] * 4), tmp_path)
    assert tokens.context_id.tolist() == ["ordinal-0"] * 2 + ["ordinal-1"] * 2
    without = read_both(bank(), bank(**TRAINED).drop(columns="sample_index"), tmp_path)
    assert without.gain.tolist() == tokens.gain.tolist()


def test_two_of_our_own_tables(tmp_path):
    before = keys(forward_kl=[1.0, 2.0], student_entropy=[0.5, 0.6], compatibility_k8=[0.1, 0.2])
    after = keys(forward_kl=[0.5, 1.0], student_entropy=[0.4, 0.3], compatibility_k8=[0.3, 0.4])
    tokens = read_both(before, after, tmp_path)
    assert tokens.gain.tolist() == [0.5, 1.0] and "reverse_gain" not in tokens
    assert tokens.compatibility_k8_after.tolist() == [0.3, 0.4]
    assert tokens.student_entropy_after.tolist() == [0.4, 0.3]


def test_our_own_table_of_a_checkpoint_is_taken_as_it_is(tmp_path):
    before = keys(forward_kl=[1.0, 2.0], student_entropy=[0.5, 0.6])
    after = before.assign(forward_kl_after=[0.5, 1.0], seen=[True, False])
    tokens = read_both(before, after, tmp_path)
    assert tokens.gain.tolist() == [0.5, 1.0] and "student_entropy_after" not in tokens
    assert tokens.seen.tolist() == [True, False]
