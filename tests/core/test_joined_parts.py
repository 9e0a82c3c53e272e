"""The token table joined some rows at a time is that of whole tables."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.core.checkpoint import join_checkpoint
from diagnostics.core.joined_parts import joined_parts
from diagnostics.core.schema import validate_tokens
from diagnostics.core.tables import write_parquet_parts
from tests.counted_memory import counted_memory

KEYS = ["context_id", "position"]


def table(rows=11):
    positions = np.arange(rows) % 4
    return validate_tokens(
        pd.DataFrame(
            {
                "context_id": [f"c{i // 4}" for i in range(rows)],
                "prompt_id": [f"p{i // 4}" for i in range(rows)],
                "position": positions,
                "response_length": 4,
                "token_id": positions + 5,
                "token": "a",
                "forward_kl": np.linspace(1, 2, rows),
                "reverse_kl": np.linspace(2, 3, rows),
            }
        )
    )


def written(path, frame, size):
    write_parquet_parts(path, [frame[i : i + size] for i in range(0, len(frame), size)])
    return path


def by_hand(scores, added, after):
    """Whole tables, merged by their keys."""
    joined = scores
    for frame in added:
        joined = joined.merge(frame, on=KEYS, how="left")
    return validate_tokens(joined if after is None else join_checkpoint(joined, after))


@pytest.mark.parametrize("size", [3, 4, 20])
@pytest.mark.parametrize("order", ["same", "turned", "some"])
@pytest.mark.parametrize("trained", [False, True])
def test_parts_are_the_whole_table(tmp_path, size, order, trained):
    scores = table()
    gains = scores[KEYS].assign(gain=np.arange(11.0), fold=np.arange(11) % 2)
    other = scores[KEYS].assign(first_order_gain=np.arange(11.0) / 7, count=np.arange(11))
    other = {"same": other, "turned": other[::-1], "some": other[2:7]}[order].reset_index(drop=True)
    after = scores[KEYS].assign(
        forward_kl_after=scores.forward_kl - 1, reverse_kl_after=0.5, student_entropy_after=1.0
    )
    paths = [
        written(tmp_path / f"{name}.parquet", frame, size)
        for name, frame in (("gains", gains), ("other", other))
    ]
    last = written(tmp_path / "after.parquet", after, 4) if trained else None
    first = written(tmp_path / "scores.parquet", scores, 4)
    parts = list(joined_parts(first, paths, after=last))
    assert [len(part) for part in parts] == [4, 4, 3]
    whole = by_hand(scores, [gains, other], after if trained else None)
    pd.testing.assert_frame_equal(
        pd.concat(parts, ignore_index=True), whole, check_exact=True, check_dtype=order == "same"
    )
    assert all((part.dtypes == parts[0].dtypes).all() for part in parts)


def test_columns_of_an_untrained_student_are_left_out(tmp_path):
    scores = table()
    gains = scores[KEYS].assign(gain_step_0=0.0, gain_step_2=1.0)
    first = written(tmp_path / "scores.parquet", scores, 11)
    (joined,) = joined_parts(first, [written(tmp_path / "gains.parquet", gains, 11)])
    assert "gain_step_2" in joined and "gain_step_0" not in joined


def test_joining_takes_memory_for_one_part_however_many_there_are(tmp_path):
    """Per further row 20 bytes, of the parts' notes in the file; a row has over 100."""

    def peak(rows):
        scores, folder = table(rows), tmp_path / str(rows)
        gains = scores[KEYS].assign(**{f"gain_fold{f}": np.arange(rows) / 7 for f in range(9)})
        first = written(folder / "scores.parquet", scores, 2000)
        other = written(folder / "gains.parquet", gains, 2000)
        del scores, gains
        with counted_memory() as counted:
            write_parquet_parts(folder / "tokens.parquet", joined_parts(first, [other]))
        return counted.bytes, pd.read_parquet(folder / "tokens.parquet").memory_usage().sum() / rows

    peak(2000)  # what is made once
    (small, _), (large, per_row) = peak(8000), peak(24000)
    assert (large - small) / 16000 < 20 < 100 < per_row
