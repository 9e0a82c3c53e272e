"""Prompt files and Hugging Face data sets as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.rows import AS_WRITTEN, keep_whole_numbers, read_rows

if TYPE_CHECKING:
    import pandas as pd

DATASET = "hf:"
"""Prefix that marks a Hugging Face data set."""


def read_source(source: str, split: str | None) -> pd.DataFrame:
    """Return the table of a file or data set. Raises DiagnosticsError where it cannot be read, or
    where a split is given for a file.
    """
    if source.startswith(DATASET):
        return _read_dataset(source.removeprefix(DATASET), split or "train")
    if split is not None:
        raise DiagnosticsError(
            f"--prompts-split {split} belongs to a data set, and {source} is a file. Write"
            f" hf:{source}, or leave the split out."
        )
    return read_rows(Path(source), text=True)


def _read_dataset(name: str, split: str) -> pd.DataFrame:
    """Return one split of a Hugging Face data set, or of a local folder of its files (also one that
    `save_to_disk` wrote).
    """
    try:
        import datasets
    except ImportError as error:
        raise DiagnosticsError(
            "Prompts from a data set need the package datasets. Run `pip install datasets`, or give"
            " a file."
        ) from error
    datasets.disable_progress_bars()
    try:
        return keep_whole_numbers(
            _open_dataset(datasets, name, split).with_format("arrow")[:].to_pandas(**AS_WRITTEN)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DiagnosticsError(
            f"{DATASET}{name}, split {split!r}, cannot be read ({reason}). Check name,"
            " configuration and --prompts-split; a name needs a network, a local folder does not."
        ) from error


def _open_dataset(datasets, name: str, split: str):
    """Open a data set by folder, or by name with an optional configuration and revision."""
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if (folder / "state.json").is_file():
        return datasets.load_from_disk(name)
    if folder.is_dir():
        return datasets.load_dataset(name, split=split)
    name, _, revision = name.partition("@")
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(
        name, configuration or None, split=split, revision=revision or None
    )


def prompt_column_of(frame: pd.DataFrame, wanted: str | None, path) -> str:
    """Return the name of the prompt's column in `frame`: the `wanted` one, or else the first usual
    one. Raises DiagnosticsError where the table lacks it; `path` is named in the error.
    """
    names = [wanted] if wanted else ["prompt", "messages"]
    for name in names:
        if name in frame.columns:
            return name
    raise DiagnosticsError(
        f"{path} has no column {' or '.join(map(repr, names))}; it has"
        f" {', '.join(map(str, frame.columns[:20]))}. Name the column with --prompt-column."
    )
