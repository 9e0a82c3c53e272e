"""Tables as files: equal content gives equal bytes."""

import pandas as pd

from diagnostics.core.tables import write_csv, write_parquet


def test_equal_tables_give_equal_bytes(tmp_path):
    frame = pd.DataFrame({"x": [0.1, 2.0], "name": ["a", "b"]})
    for write_table in (write_parquet, write_csv):
        first, second = (
            write_table(tmp_path / "1", frame).read_bytes(),
            write_table(tmp_path / "2", frame.copy()).read_bytes(),
        )
        assert first == second
