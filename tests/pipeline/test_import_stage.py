"""Imported token tables on the command line: what is recorded, repeated and refused."""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.schema import read_parquet
from diagnostics.pipeline.cli import main
from tests.conftest import make_tokenizer

QUICK = ["--draws", "20", "--quiet"]


def bank(seed: int = 0, **columns) -> pd.DataFrame:
    """Twelve responses of ten positions, scored by a released script."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(12), 10)
    made = dict(
        sample_index=sample,
        group_index=sample,
        tok_pos=np.tile(np.arange(10), 12),
        token_id=rng.integers(3, 20, 120),
        Hs_full=rng.gamma(1.0, size=120),
        Ht_full=1.0,
        KLf_full=rng.gamma(1.0, size=120),
        KLr_full=rng.gamma(1.0, size=120),
        Cmass_true=rng.random(120),
    )
    return pd.DataFrame(made | columns)


@pytest.fixture
def tables(tmp_path):
    before = bank(k=8)
    after = before.assign(KLf_full=before.KLf_full * 0.9, Hs_full=before.Hs_full * 0.8)
    before.to_csv(tmp_path / "theta0.csv", index=False)
    after.to_parquet(tmp_path / "after.parquet")
    make_tokenizer().save_pretrained(tmp_path / "pair")
    return tmp_path


def flags(folder, *more, out="run"):
    return [
        *("analyze", "--tokens", str(folder / "theta0.csv")),
        *("--tokens-after", str(folder / "after.parquet")),
        *more,
        *QUICK,
        *("--output-dir", str(folder / out)),
    ]


def test_two_files_are_analyzed_and_repeated(tables):
    assert main(flags(tables, "--tokenizer", str(tables / "pair"))) == 0
    tokens = read_parquet(tables / "run/tokens.parquet")
    np.testing.assert_allclose(tokens.gain, tokens.forward_kl * 0.1)
    np.testing.assert_allclose(tokens.student_entropy_after, tokens.student_entropy * 0.8)
    assert "is_special" in tokens
    record = json.loads((tables / "run/manifest.json").read_text())["stages"]["import"]
    assert record["settings"]["tokens_after"] == "after.parquet"
    assert record["facts"] == {"positions": 120, "warnings": [], "k": 8}
    # Everything that the manifest names lies elsewhere than beside it, and is named again.
    inputs = [str(tables / name) for name in ("theta0.csv", "after.parquet", "pair")]
    again = ["rerun", str(tables / "run/manifest.json"), "--output-dir", str(tables / "again")]
    assert main([*again, "--inputs", *inputs]) == 0
    assert (tables / "run/tokens.parquet").read_bytes() == (
        tables / "again/tokens.parquet"
    ).read_bytes()


def test_another_second_file_is_another_import(tables, capsys):
    assert main(flags(tables)) == 0
    bank(seed=1, k=8).assign(token_id=bank().token_id).to_parquet(tables / "after.parquet")
    assert main(flags(tables)) == 2
    assert "tokens_after_sha256: was" in capsys.readouterr().err


def test_k_is_the_table_s_own_and_asked_for_where_it_states_none(tables, capsys):
    assert main(flags(tables)) == 0
    assert read_parquet(tables / "run/tokens.parquet").attrs["k"] == 8
    bank().to_csv(tables / "theta0.csv", index=False)
    read_parquet(tables / "after.parquet").drop(columns="k").to_parquet(tables / "after.parquet")
    assert main(flags(tables, out="unknown")) == 2
    error = capsys.readouterr().err
    assert "does not say at which K compatibility" in error and "Give it with --k" in error


def test_a_table_without_gains_names_the_second_file(tables, capsys):
    alone = ["analyze", "--tokens", str(tables / "theta0.csv"), *QUICK]
    assert main([*alone, "--output-dir", str(tables / "alone")]) == 2
    error = capsys.readouterr().err
    assert "has no gains in nats. Give the scores of the trained student as well" in error


def test_a_folder_of_rollouts_is_imported(tables):
    folder = tables / "bank"
    folder.mkdir()
    for number in range(2):
        bank(number, G_KLf=0.1, rollout_id=number, k=8).to_csv(
            folder / f"rollout_{number}.csv", index=False
        )
    alone = ["analyze", "--tokens", str(folder), *QUICK, "--output-dir", str(tables / "folder")]
    assert main(alone) == 0
    assert len(read_parquet(tables / "folder/tokens.parquet")) == 240
    again = ["rerun", str(tables / "folder/manifest.json"), "--output-dir", str(tables / "again")]
    assert main([*again, "--inputs", str(folder)]) == 0
