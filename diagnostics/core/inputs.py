"""What a user may write for an argument, and what the function then gets.

    @takes(tokens=token_table, criteria=several, budgets=shares)
    def correlate(tokens, *, criteria=None, budgets=...): ...

A token table may be the table itself, a `tokens.parquet`, the directory of a run, or any result
that holds one. One name or number stands for a list of one, and a share may be written as `"5%"`.
What can be read in two ways is not guessed: it is refused with what it may have meant, or warned
about.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from diagnostics.core.errors import DiagnosticsError

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("diagnostics")
F = TypeVar("F", bound=Callable[..., Any])
TOKENS = "tokens.parquet"
"""The token table's name in the directory of a run."""


def takes(**readers: Callable[[Any], Any]) -> Callable[[F], F]:
    """Let a function take its arguments as a user may write them.

    Args:
        readers: For each parameter, what makes of a given value the one that the function expects.
            A default is left as it is.

    Returns:
        A decorator; the function keeps its signature and its docstring.
    """

    def decorate(function: F) -> F:
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            placed = [
                readers[name](value) if name in readers else value
                for name, value in zip(names, args, strict=False)
            ]
            named = {
                name: readers[name](value) if name in readers else value
                for name, value in keywords.items()
            }
            return function(*placed, *args[len(placed) :], **named)

        return cast(F, call)

    return decorate


def several(value: Any) -> Any:
    """A list as it is; one text, path or number as a list of one."""
    alone = isinstance(value, str | bytes | Path) or not isinstance(value, Iterable)
    return value if value is None or not alone else (value,)


def share(value: Any) -> Any:
    """A share of positions as it may be written: `0.05`, `"0.05"` or `"5%"`.

    The whole number 1 is a share of 100 %, and may have meant 1 %: it is taken, with a warning.

    Raises:
        DiagnosticsError: A text is no share.
    """
    if isinstance(value, str):
        try:
            return read_share(value)
        except ValueError as error:
            raise DiagnosticsError(
                f"A share is a number above 0 and at most 1, as 0.05 or 5%; got {value!r}."
            ) from error
    if isinstance(value, int) and not isinstance(value, bool) and value == 1:
        log.warning(
            "budget 1 is every position (100 %). Write 1.0 if that is meant, or 0.01 for 1 %."
        )
        return 1.0  # said once: what reads it again finds a share
    return value


def shares(value: Any) -> Any:
    """One share or several, each as `share` reads it."""
    listed = several(value)
    return listed if listed is None else tuple(share(each) for each in listed)


def read_share(text: str) -> float:
    """A share as text: `0.05` or `5%`. Raises ValueError for any other."""
    number = text.strip()
    return float(number[:-1]) / 100 if number.endswith("%") else float(number)


def percent_meant(budget: float) -> str:
    """The sentence on a budget that is no share and may be a percentage; empty for any other."""
    return f" Did you mean {budget / 100:g} ({budget:g} %)?" if 1 < budget <= 100 else ""


def token_table(value: Any) -> Any:
    """A token table from the table, its file, the directory of a run, or a result that holds it.

    Args:
        value: A DataFrame; the path of a `tokens.parquet`; a directory that holds one; or an object
            with an attribute `tokens`, such as what `probe` and `read_run` return.

    Returns:
        The table. None stays None.

    Raises:
        DiagnosticsError: The value is none of these, a result holds no token table, or a file
            cannot be read as one of ours.
    """
    if value is None or hasattr(value, "columns"):
        return value
    if isinstance(value, str | Path):
        return _from_file(Path(value))
    held = getattr(value, "tokens", None)
    if hasattr(held, "columns"):
        return held
    if hasattr(value, "tokens"):
        raise DiagnosticsError(
            f"This {type(value).__name__} holds no token table. Name a run that has {TOKENS}."
        )
    raise DiagnosticsError(
        "A token table is a DataFrame with one row per position, a tokens.parquet, the directory of"
        f" a run, or what dx.probe returns; got {_shown(value)}."
    )


def _from_file(path: Path) -> pd.DataFrame:
    from diagnostics.core.schema import read_tokens

    file = path / TOKENS if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise DiagnosticsError(
            f"{path} holds no {TOKENS}. Name the --output-dir of a run, or read other tables with"
            " dx.read_tokens."
        )
    if file.suffix != ".parquet":
        raise DiagnosticsError(
            f"{path} is no parquet file. Read it with dx.read_tokens({str(path)!r}) and pass the"
            " table."
        )
    return read_tokens(file)


def table(value: Any) -> Any:
    """A finished table from its CSV or parquet file, or from a result that holds a token table.

    Args:
        value: The path of such a file, the directory of a run, or a result; anything else, such as
            a table, stays as it is.

    Raises:
        DiagnosticsError: The file is missing or cannot be read.
    """
    if not isinstance(value, str | Path):
        return value if hasattr(value, "columns") else getattr(value, "tokens", value)
    path = Path(value)
    if path.is_dir() or path.suffix == ".parquet":
        return token_table(path)
    if path.suffix != ".csv":
        return value
    from diagnostics.core.tables import read_csv

    try:
        return read_csv(path)
    except (OSError, ValueError) as error:
        raise DiagnosticsError(
            f"{path} cannot be read as a table ({str(error).splitlines()[0][:120]}). Pass a CSV or"
            " parquet file of a run's tables, or the table itself."
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'…' * (len(text) > 60)}"
