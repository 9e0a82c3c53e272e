"""Ids of imported token tables: exact whatever the file, with and without gaps."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diagnostics.contexts.import_tokens import read_tokens
from diagnostics.core.errors import DiagnosticsError

LARGE = [2**62 + 2 * i + 1 for i in range(12)]


def released(**columns):
    """Twelve samples of ten positions, two samples of a group."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "sample_index": LARGE[s],
            "group_index": LARGE[s // 2],
            "tok_pos": t,
            "token_id": 5,
            "KLf_full": float(rng.gamma(1)),
        }
        for s in range(12)
        for t in range(10)
    ]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def ours(prompts):
    return [
        {
            "context_id": LARGE[s],
            "prompt_id": prompts[s],
            "position": t,
            "response_length": 10,
            "token_id": 5,
            "token": "a",
            "forward_kl": 1.0,
            "gain": 0.1,
        }
        for s in range(12)
        for t in range(10)
    ]


def write(folder, rows, kind):
    path = folder / f"tokens.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        pd.DataFrame(rows, dtype=object).to_csv(path, index=False)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_one_gap_joins_no_large_ids(tmp_path, kind):
    groups = [LARGE[s // 2] for s in range(12) for _ in range(10)]
    one_row = [None, *groups[1:]]
    tokens = read_tokens(write(tmp_path, released(group_index=one_row), kind))
    assert tokens.prompt_id.nunique() == 6 and tokens.context_id.nunique() == 12
    assert set(tokens.prompt_id) == {f"group-{LARGE[i]}" for i in range(6)}
    one_sample = [None if 30 <= i < 40 else group for i, group in enumerate(groups)]
    tokens = read_tokens(write(tmp_path, released(group_index=one_sample), kind))
    assert tokens.prompt_id.nunique() == 7


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_large_rollout_ids_stay_apart_and_a_gap_is_said(tmp_path, kind):
    sample = [(i // 10) % 6 for i in range(120)]
    rollout = [None, *(2**62 + 1 + 2 * (i // 60) for i in range(1, 120))]
    rows = released(sample_index=sample, group_index=sample, rollout_id=rollout)
    tokens = read_tokens(write(tmp_path, rows, kind))
    assert tokens.context_id.nunique() == 13
    assert [note[:2] for note in tokens.attrs["warnings"]] == [["gaps", "rollout_id"]]


def test_floats_that_tell_no_ids_apart_are_no_ids(tmp_path):
    groups = [float(LARGE[s // 2]) for s in range(12) for _ in range(10)]
    tokens = read_tokens(write(tmp_path, released(group_index=groups), "parquet"))
    assert tokens.prompt_id.nunique() == 12
    assert "2**53" in dict(note[:1] + note[2:] for note in tokens.attrs["warnings"])["vague_ids"]
    with pytest.raises(DiagnosticsError, match=r"prompt_id holds 120 floats of 2\*\*53 and more"):
        read_tokens(write(tmp_path, ours([float(2**60 + s) for s in range(12)]), "parquet"))


def test_small_ids_keep_their_names(tmp_path):
    prompts = [None if s == 3 else s for s in range(12)]
    tokens = read_tokens(write(tmp_path, ours(prompts), "csv"))
    assert set(tokens.prompt_id.dropna()) == {str(s) for s in range(12) if s != 3}
    rows = [row | {"prompt_id": f"{row['context_id'] % 100:03d}"} for row in ours(prompts)]
    assert all(len(name) == 3 for name in read_tokens(write(tmp_path, rows, "csv")).prompt_id)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_ids_of_our_own_tables_are_exact(tmp_path, kind):
    prompts = [None if s == 3 else LARGE[s // 2] for s in range(12)]
    tokens = read_tokens(write(tmp_path, ours(prompts), kind))
    assert tokens.prompt_id.isna().sum() == 10
    assert set(tokens.prompt_id.dropna()) == {str(LARGE[i]) for i in range(6)}
    assert set(tokens.context_id) == set(map(str, LARGE))
