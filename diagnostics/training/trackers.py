"""Trackers of a training: its log, and its tables, beside the run directory.

`--report-to` names one. TRL and transformers give it the log of every step (loss, learning rate and
all that `step_metrics` describes) through their own callbacks; it also gets two tables when the
training ends: `selection_log`, one row per step as in metrics.jsonl, and `evaluations`, mean and
interval of each measure at each evaluated step.

    tensorboard    files in DIR/tensorboard; tables as text
    trackio        the tracker's own folder on this machine; no Space is asked for
    wandb          wandb's server, or its own folder with WANDB_MODE=offline

wandb and trackio also get TRL's settings, which hold the path of the output directory. Where the
tracker sends what it gets is its own configuration's: this program names no server, no project and
no account."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from diagnostics.core.errors import DiagnosticsError
from diagnostics.training import engine_options

WITH_TABLES = ("trackio", "wandb")
"""Trackers whose module has `log` and a `Table` of a data frame."""


class Tables(Protocol):
    """A tracker that takes tables."""

    def log(self, tables: Mapping[str, pd.DataFrame], step: int) -> None:
        """Log tables by name after a step."""


class ModuleTables:
    """Tables of a tracker whose module has `log` and `Table`, with a run begun by transformers.

    Args:
        name: The tracker's module.
    """

    def __init__(self, name: str):
        self.name = name

    def log(self, tables: Mapping[str, pd.DataFrame], step: int) -> None:
        """Log tables by name after a step."""
        module = importlib.import_module(self.name)
        module.log({name: module.Table(dataframe=table) for name, table in tables.items()})


class TensorboardTables:
    """TensorBoard's files in the run directory, whose tables are text.

    By default its writer would create a folder in the working directory, named by the host.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(directory / "tensorboard"))

    def log(self, tables: Mapping[str, pd.DataFrame], step: int) -> None:
        """Log tables by name after a step."""
        for name, table in tables.items():
            self.writer.add_text(name, as_text(table), step)


def as_text(table: pd.DataFrame) -> str:
    """A table in Markdown, as TensorBoard shows text; numbers with four digits.

    Args:
        table: Any table.
    """

    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4g}"
        return str(value).replace("|", "\\|").replace("\n", " ")

    head = [row(map(str, table.columns)), row(["---"] * len(table.columns))]
    body = [row(map(cell, values)) for values in table.itertuples(index=False, name=None)]
    return "\n".join([*head, *body])


def require_tracker(name: str, trl: Mapping[str, Any]) -> None:
    """Raise DiagnosticsError for a tracker that is unknown, not installed or named twice.

    Args:
        name: What `--report-to` says.
        trl: Fields of `--trl`.
    """
    if name not in engine_options.REPORT_TO:
        raise DiagnosticsError(
            f"Unknown tracker {name!r}. Known are {', '.join(engine_options.REPORT_TO)}."
        )
    also = [each for each in engine_options.trackers(dict(trl)) if each not in ("none", name)]
    if name != "none" and also:
        raise DiagnosticsError(
            f"--report-to names {name} and --trl {also[0]}. Name one, with --report-to."
        )
    if name != "none" and importlib.util.find_spec(name) is None:
        raise DiagnosticsError(
            f"--report-to {name} needs the package {name}, which is not installed. Run `pip install"
            f" {name}`, or read metrics.jsonl."
        )


def trl_fields(name: str, directory: Path) -> dict[str, Any]:
    """Fields of TRL's configuration that let its own callbacks report.

    The run's name is the last name of the output directory. TensorBoard's callback is made here,
    for its folder.

    Args:
        name: What `--report-to` says.
        directory: The run directory.
    """
    if name not in WITH_TABLES:
        return {"report_to": "none"}
    return {"report_to": [name], "run_name": directory.absolute().name}


def tables_of(names: Iterable[str], directory: Path) -> Sequence[Tables]:
    """Where tables are logged.

    Args:
        names: The trackers that were asked for.
        directory: The run directory.
    """
    made: dict[str, Tables] = {}
    for name in names:
        if name in WITH_TABLES:
            made[name] = ModuleTables(name)
        elif name == "tensorboard" and name not in made:
            made[name] = TensorboardTables(directory)
    return list(made.values())


def callbacks_of(tables: Sequence[Tables]) -> list[Any]:
    """Callbacks of transformers for the trackers that it does not add itself.

    Args:
        tables: What `tables_of` gives.
    """
    from transformers.integrations import TensorBoardCallback

    return [
        TensorBoardCallback(each.writer) for each in tables if isinstance(each, TensorboardTables)
    ]
