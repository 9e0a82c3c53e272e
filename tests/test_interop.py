import numpy as np
import pandas as pd
import pytest

from diagnostics.interop import read_tokens
from diagnostics.types import DiagnosticsError
from tests.test_types import keys


def bank(**columns):
    """Two responses of two tokens, with the columns of the released scripts."""
    base = dict(sample_index=[3, 3, 4, 4], group_index=[1, 1, 2, 2], sample_ordinal=[0, 0, 1, 1], tok_pos=[0, 1, 0, 1], token_id=[5, 6, 7, 8],
                Hs_full=[1.0, 2.0, 0.5, 0.1], Ht_full=[0.9, 0.8, 0.7, 0.6], KLf_full=[0.5, 1.0, 0.2, 4e-4], KLr_full=[0.4, 1.1, 0.3, 0.2],
                Cmass_true=[0.9, 0.5, 0.99, 0.1], Coverlap=[0.5, 0.25, 1.0, 0.0], reach_t1=[1, 0, 1, 0])
    return pd.DataFrame(base | columns)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_format_opens(tmp_path, kind):
    path = tmp_path / f"bank.{kind}"
    {"csv": lambda f: f.to_csv(path, index=False), "jsonl": lambda f: f.to_json(path, orient="records", lines=True), "parquet": lambda f: f.to_parquet(path)}[kind](bank())
    tokens = read_tokens(path)
    assert tokens.prompt_id.tolist() == ["group-1", "group-1", "group-2", "group-2"] and tokens.context_id[2] == "sample-4"
    assert tokens.forward_kl.tolist() == [0.5, 1.0, 0.2, 4e-4] and tokens.response_length.tolist() == [2] * 4
    assert tokens.teacher_top1_in_topk.tolist() == [True, False, True, False] and "gain" not in tokens


def test_base_columns_are_before_and_plain_ones_after(tmp_path, caplog):
    frame = bank(KLf_full_base=[1.0, 1.5, 0.2, 5e-4], KLr_full_base=[0.8, 1.0, 0.3, 0.2], Hs_full_base=[1.1, 2.1, 0.6, 0.2], Cmass_true_base=[0.8, 0.4, 0.9, 0.2], Coverlap_base=[0.5] * 4, reach_t1_base=[1] * 4)
    frame.to_parquet(tmp_path / "bank.parquet")
    tokens = read_tokens(tmp_path / "bank.parquet")
    np.testing.assert_allclose(tokens.gain, [0.5, 0.5, 0.0, 1e-4])
    np.testing.assert_allclose(tokens.relative_gain, [0.5, 1 / 3, 0.0, np.nan])
    np.testing.assert_allclose(tokens.relative_gain_released, [0.5, 1 / 3, 0.0, 0.2], rtol=1e-6)
    np.testing.assert_allclose(tokens.reverse_gain, [0.4, -0.1, 0.0, 0.0], atol=1e-12)
    assert tokens.compatibility.tolist() == [0.8, 0.4, 0.9, 0.2] and tokens.student_entropy[0] == 1.1
    assert "read after training" not in caplog.text


def test_predictors_read_after_training_are_said(tmp_path, caplog):
    frame = bank(KLf_full_base=[1.0, 1.5, 0.2, 0.3], G_KLf=[0.5, 1 / 3, 0.0, 0.9])
    frame.to_parquet(tmp_path / "bank.parquet")
    tokens = read_tokens(tmp_path / "bank.parquet")
    assert "Hs_full (student_entropy), Cmass_true (compatibility), Coverlap (topk_overlap), reach_t1" in caplog.text
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
    assert "columns without a counterpart, left out: sample_ordinal, odd" in caplog.text


def test_our_own_table_passes_through(tmp_path):
    frame = keys(gain=[0.1, 0.2])
    frame.to_parquet(tmp_path / "tokens.parquet")
    assert read_tokens(tmp_path / "tokens.parquet").gain.tolist() == [0.1, 0.2]


def test_another_table_is_refused(tmp_path):
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DiagnosticsError, match=r"a\.csv is no token table: neither context_id nor sample_index and tok_pos .* \(a\)\. Give a tokens\.parquet"):
        read_tokens(tmp_path / "a.csv")
