"""Log-probabilities that came with a bank against the re-score: how far apart, where, and why.

    d = ln p_engine(y) - ln p(y)        per position, in nats; p is the re-score at temperature 1

The engine that sampled a bank (vLLM, SGLang) says with which probability it drew each token. Where
the scores of the same weights differ, the bank was not sampled from the student that is measured:
the gap is that of an off-policy bank, and importance ratios of a training carry it. Each cause is
tried for what it leaves of mean |d|:

    temperature T       ln p_T(y) = ln p(y)/T - ln sum_v p(v)^(1/T), T fitted on half of the prompts
                        and tried on the other half, both ways
    base 2, base 10     the values times ln 2 and ln 10
    shift by one        the values of the token before, and of the one after
    prompt or template  mean |d| after the first FIRST tokens of a response

The sum is over the student's listed tokens (`tops.parquet`); the rest of the mass r counts as
exp(H_rest) equally likely tokens, H_rest being its entropy, which gives the sum and its derivative
at T = 1 exactly, with no list too. A cause explains the gap where it takes away half of it or more,
and where that is told apart from nothing over prompts. A gap that is no larger than the rounding of
bfloat16 needs no cause. Anything else is "not identified"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize

from diagnostics.analysis import bootstrap as clusters
from diagnostics.analysis.bootstrap import Estimate, PromptClusters
from diagnostics.analysis.config import FEWEST_PROMPTS, Bootstrap
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import takes, token_table
from diagnostics.core.schema import require_columns
from diagnostics.core.settings import with_settings

COLUMN = "sampled_logprobs"
"""Column of a context table that holds the engine's values."""
EQUAL = 1e-3
"""Mean |d| in nats up to which two computations in float32 are the same."""
ROUNDED = 0.0625
"""Mean |d| up to which bfloat16 is cause enough: its numbers between 16 and 32, where logits lie,
are 1/8 apart."""
EXPLAINED = 0.5
"""Share of mean |d| that a cause has to take away."""
WORST = 20
"""Positions of the table of the worst."""
FIRST, APART = 4, 2.0
"""First tokens of a response, and how many times as large |d| is there where the prompt differs."""
COLDEST, HOTTEST = 0.05, 10.0
"""Temperatures between which one is searched."""
FITTED = 20_000
"""Positions that a temperature is fitted on at most."""
BINS = (0, 1, 4, 16, 64, 256, 1024)
"""First places of the groups by position in the response."""
COLUMNS = (
    "group",
    "positions",
    "prompts",
    "missing",
    "mean",
    "low",
    "high",
    "mean_absolute",
    "quantile_99",
    "largest",
    "correlation",
)
CAUSE_COLUMNS = (
    "cause",
    "parameter",
    "mean_absolute",
    "takes_away",
    "low",
    "high",
    "positions",
    "prompts",
    "explains",
)


@takes(tokens=token_table)
@with_settings(bootstrap=Bootstrap)
def engine_check(
    contexts: pd.DataFrame,
    tokens: pd.DataFrame,
    *,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """How far the engine's log-probabilities lie from the re-score.

    Args:
        contexts: A context table with the columns context_id and sampled_logprobs (a list of
            natural logarithms per response token, NaN or no list where the engine gave none).
        tokens: A token table of these contexts, with student_logprob.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per group (all, special and other tokens, places in the response): positions with
        both values, their prompts, positions that the engine gave no value for (missing), the mean
        of d with its interval over prompts (low, high), mean |d| (mean_absolute), its 99 %
        quantile, the largest, and Pearson's correlation of both log-probabilities.

    Raises:
        DiagnosticsError: A column is missing, no position has both values, or lists and responses
            have different lengths.
    """
    both = paired(contexts, tokens)
    rows = [_row(name, both, where, bootstrap) for name, where in _groups(both)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


@takes(tokens=token_table)
def engine_worst(
    contexts: pd.DataFrame, tokens: pd.DataFrame, *, count: int = WORST
) -> pd.DataFrame:
    """The positions where engine and re-score differ most.

    Args:
        contexts: As in `engine_check`.
        tokens: As in `engine_check`.
        count: Number of rows at most.

    Returns:
        Columns context_id, prompt_id, position, token, engine_logprob, student_logprob and
        difference (d), by |d|, the largest first.
    """
    both = paired(contexts, tokens).dropna(subset="difference")
    order = both["difference"].abs().sort_values(ascending=False, kind="stable").index[:count]
    names = ["context_id", "prompt_id", "position", "token", "engine_logprob", "student_logprob"]
    return both.loc[order, [*names, "difference"]].reset_index(drop=True)


def paired(contexts: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    """The token table with the engine's values.

    Args:
        contexts: As in `engine_check`.
        tokens: As in `engine_check`.

    Returns:
        The token table's keys, student_logprob, student_entropy where there is one, engine_logprob
        (NaN where the engine gave none), and difference.

    Raises:
        DiagnosticsError: As `engine_check`.
    """
    require_columns(contexts, ("context_id", COLUMN), what="an engine check")
    require_columns(
        tokens, ("context_id", "prompt_id", "position", "student_logprob"), what="an engine check"
    )
    lists = dict(zip(contexts["context_id"].astype(str), contexts[COLUMN]))
    names = tokens["context_id"].astype(str).to_numpy()
    within = tokens.get("response_index", tokens["position"]).to_numpy()
    values = np.array([_value(lists.get(name), t, name) for name, t in zip(names, within)])
    if not (np.isfinite(values) & tokens["student_logprob"].notna()).any():
        raise DiagnosticsError(
            f"No position has both a value in {COLUMN} and a student_logprob. Give the contexts"
            " that the token table was scored on."
        )
    kept = ["context_id", "prompt_id", "position", "token_id", "token", "is_special"]
    kept = [name for name in (*kept, "student_logprob", "student_entropy") if name in tokens]
    both = tokens[kept].reset_index(drop=True).assign(engine_logprob=values)
    return both.assign(difference=both["engine_logprob"] - both["student_logprob"])


def _value(values: Any, index: int, name: str) -> float:
    """The engine's value of a response token; NaN for a context without a list."""
    if values is None or not hasattr(values, "__len__"):
        return np.nan
    if index >= len(values):
        raise DiagnosticsError(
            f"Context {name!r} has {len(values)} values in {COLUMN} and a position {index}. Give"
            " one value per response token."
        )
    value = values[index]
    return np.nan if value is None else float(value)


def _groups(both: pd.DataFrame) -> list[tuple[str, np.ndarray]]:
    """Names and masks [N] of the groups."""
    place = both["position"].to_numpy()
    groups = [("all", np.ones(len(both), bool))]
    if "is_special" in both and both["is_special"].any():
        special = both["is_special"].to_numpy(bool)
        groups += [("special tokens", special), ("other tokens", ~special)]
    ends = [*BINS[1:], np.inf]
    for first, end in zip(BINS, ends):
        last = f" to {int(end) - 1}" if np.isfinite(end) and end - 1 > first else ""
        name = f"position {first}{last or ('' if np.isfinite(end) else ' and later')}"
        groups.append((name, (place >= first) & (place < end)))
    return [(name, where) for name, where in groups if where.any()]


def _row(name: str, both: pd.DataFrame, where: np.ndarray, bootstrap: Bootstrap) -> tuple:
    part = both[where]
    found = part.dropna(subset="difference")
    prompts = PromptClusters(part["prompt_id"], bootstrap=bootstrap)
    mean = clusters.mean(part["difference"].to_numpy(), prompts)
    apart = found["difference"].abs().to_numpy()
    missing = int(part["engine_logprob"].isna().sum())
    return (
        name,
        len(found),
        found["prompt_id"].nunique(),
        missing,
        mean.value,
        *mean.interval(bootstrap.level),
        apart.mean() if len(apart) else np.nan,
        np.quantile(apart, 0.99) if len(apart) else np.nan,
        apart.max() if len(apart) else np.nan,
        _correlation(found["engine_logprob"].to_numpy(), found["student_logprob"].to_numpy()),
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation, NaN where a side does not vary."""
    if len(x) < 2 or not (np.ptp(x) > 0 and np.ptp(y) > 0):
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


# --- causes


@takes(tokens=token_table)
@with_settings(bootstrap=Bootstrap)
def engine_causes(
    contexts: pd.DataFrame,
    tokens: pd.DataFrame,
    *,
    tops: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> pd.DataFrame:
    """What may explain the gap between engine and re-score.

    Args:
        contexts: As in `engine_check`.
        tokens: As in `engine_check`; the temperature needs student_entropy too.
        tops: The student's most likely tokens per position (`tops.parquet`: context_id, position,
            student_top_p), which make the temperature's sum sharper.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        One row per cause: its parameter (the temperature; for the prompt, mean |d| of a response's
        first tokens), mean |d| that it leaves (mean_absolute), what it takes away in nats
        (takes_away) with its interval over prompts (low, high), positions, prompts, and whether it
        explains the gap. The first row is the gap as it is. Below 20 prompts nothing explains it.

    Raises:
        DiagnosticsError: As `engine_check`.
    """
    both = paired(contexts, tokens)
    prompts = PromptClusters(both["prompt_id"], bootstrap=bootstrap)
    own = both["difference"].to_numpy()
    rows = [_as_it_is(own, prompts)]
    if "student_entropy" in both:
        model = Tempered.of(both, tops)
        rows.append(
            _cause("temperature", *_temperature(both, model, prompts), own, prompts, bootstrap)
        )
    engine, scored = (both[name].to_numpy() for name in ("engine_logprob", "student_logprob"))
    for base in (2, 10):
        left = engine * np.log(base) - scored
        rows.append(_cause(f"base {base}", float(base), left, own, prompts, bootstrap))
    for by, name in ((1, "the token after"), (-1, "the token before")):
        moved = both.groupby("context_id", sort=False)["engine_logprob"].shift(-by).to_numpy()
        rows.append(
            _cause(f"shift: values of {name}", float(by), moved - scored, own, prompts, bootstrap)
        )
    rows.append(_prompt(both, prompts, bootstrap))
    return pd.DataFrame(rows, columns=list(CAUSE_COLUMNS))


def _as_it_is(own: np.ndarray, prompts: PromptClusters) -> tuple:
    found = np.isfinite(own)
    size = np.abs(own[found]).mean()
    return (
        "as it is",
        np.nan,
        size,
        0.0,
        np.nan,
        np.nan,
        int(found.sum()),
        prompts.present(found),
        False,
    )


def _cause(
    name: str,
    parameter: float,
    left: np.ndarray,
    own: np.ndarray,
    prompts: PromptClusters,
    bootstrap: Bootstrap,
) -> tuple:
    """The row of a cause that leaves d [N], beside the gap as it is."""
    used = np.isfinite(left) & np.isfinite(own)
    if not used.any():
        return (name, parameter, *(np.nan,) * 4, 0, 0, False)
    taken = clusters.mean(np.abs(own) - np.abs(left), prompts, used)
    size = np.abs(own[used]).mean()
    return (
        name,
        parameter,
        np.abs(left[used]).mean(),
        taken.value,
        *taken.interval(bootstrap.level),
        taken.positions,
        taken.prompts,
        _explains(taken, size, bootstrap),
    )


def _explains(taken: Estimate, size: float, bootstrap: Bootstrap) -> bool:
    """Whether so much was taken away that it is told apart from nothing, on enough prompts."""
    low, high = taken.interval(bootstrap.level)
    enough = taken.prompts >= FEWEST_PROMPTS and size > EQUAL
    return bool(enough and high > low > 0 and taken.value >= EXPLAINED * size)


def _prompt(both: pd.DataFrame, prompts: PromptClusters, bootstrap: Bootstrap) -> tuple:
    """The row of another prompt: |d| is larger where a response begins."""
    apart = both["difference"].abs().to_numpy()
    first = (both["position"] < FIRST).to_numpy()
    early, late = (clusters.mean(apart, prompts, where) for where in (first, ~first))
    over = clusters.mean_difference(apart, prompts, first, ~first)
    low, high = over.interval(bootstrap.level)
    explains = (
        over.prompts >= FEWEST_PROMPTS
        and early.value > EQUAL
        and high > low > 0
        and early.value >= APART * late.value
    )
    name = "another prompt or template"
    counts = (over.positions, over.prompts, bool(explains))
    return (name, early.value, late.value, over.value, low, high, *counts)


class Tempered:
    """ln p_T(y) of positions from what a token table knows of p.

    Attributes:
        sampled_N: [N] ln p(y) at temperature 1.
        listed_NK: [N, K] ln p of the listed tokens, -inf after the end of a list.
        rest_N: [N] ln of the mass of the others, -inf where there is none.
        spread_N: [N] entropy of the others, renormalized, in nats.
    """

    def __init__(self, sampled_N, listed_NK, entropy_N):
        self.sampled_N = np.asarray(sampled_N, dtype=np.float64)
        self.listed_NK = np.asarray(listed_NK, dtype=np.float64)
        p_NK = np.exp(self.listed_NK)
        rest_N = np.clip(1 - p_NK.sum(1), 0, 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            self.rest_N = np.log(rest_N)
            known_N = -np.where(p_NK > 0, p_NK * self.listed_NK, 0.0).sum(1)
            left_N = (np.asarray(entropy_N) - known_N) / rest_N + self.rest_N
        self.spread_N = np.where(rest_N > 1e-9, np.clip(left_N, 0, None), 0.0)

    @classmethod
    def of(cls, both: pd.DataFrame, tops: pd.DataFrame | None) -> Tempered:
        """From paired values and the student's most likely tokens, where there are any."""
        listed_NK = np.empty((len(both), 0))
        if tops is not None:
            lists = both[["context_id", "position"]].merge(
                tops[["context_id", "position", "student_top_p"]], how="left"
            )["student_top_p"]
            width = max((len(each) for each in lists if hasattr(each, "__len__")), default=0)
            listed_NK = np.full((len(both), width), -np.inf)
            with np.errstate(divide="ignore"):
                for row, each in zip(listed_NK, lists):
                    if hasattr(each, "__len__"):
                        row[: len(each)] = np.log(np.asarray(each, dtype=np.float64))
        return cls(both["student_logprob"], listed_NK, both["student_entropy"])

    def at(self, temperature: float, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """ln p_T(y) [rows]."""
        beta = 1 / temperature
        others_N = beta * self.rest_N[rows] + (1 - beta) * self.spread_N[rows]
        terms_NK = np.concatenate([beta * self.listed_NK[rows], others_N[:, None]], axis=1)
        return beta * self.sampled_N[rows] - np.logaddexp.reduce(terms_NK, axis=1)


def _temperature(
    both: pd.DataFrame, model: Tempered, prompts: PromptClusters
) -> tuple[float, np.ndarray]:
    """The temperature that fits all, and d [N] under those that were fitted on other prompts."""
    engine = both["engine_logprob"].to_numpy()
    known = np.isfinite(engine) & np.isfinite(model.sampled_N)
    halves = prompts.codes % 2
    left = np.full(len(engine), np.nan)
    for half in (0, 1):
        rows, others = (np.flatnonzero(known & (halves == each)) for each in (half, 1 - half))
        if len(others):
            temperature = fit_temperature(engine, model, others)
            left[rows] = engine[rows] - model.at(temperature, rows)
    return fit_temperature(engine, model, np.flatnonzero(known)), left


def fit_temperature(engine: np.ndarray, model: Tempered, rows: np.ndarray) -> float:
    """The temperature with the least mean |d| over some positions.

    Args:
        engine: [N] the engine's log-probabilities.
        model: What is known of the student's distributions at the N positions.
        rows: Row numbers of the positions; of more than `FITTED` every n-th counts.

    Returns:
        The temperature, between COLDEST and HOTTEST.
    """
    rows = rows[:: max(1, len(rows) // FITTED)]

    def gap(log_temperature: float) -> float:
        return float(np.abs(engine[rows] - model.at(np.exp(log_temperature), rows)).mean())

    grid = np.linspace(np.log(COLDEST), np.log(HOTTEST), 41)
    best = int(np.argmin([gap(each) for each in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(np.exp(optimize.minimize_scalar(gap, bounds=ends, method="bounded").x))


# --- what follows


@takes(tokens=token_table)
@with_settings(bootstrap=Bootstrap)
def engine_tables(
    contexts: pd.DataFrame,
    tokens: pd.DataFrame,
    *,
    tops: pd.DataFrame | None = None,
    bootstrap: Bootstrap = Bootstrap(),
    **settings: Any,
) -> dict[str, pd.DataFrame]:
    """All tables of an engine check.

    Args:
        contexts: As in `engine_check`.
        tokens: As in `engine_check`.
        tops: As in `engine_causes`.
        bootstrap: How the intervals are made. Its fields draws, level and seed are keywords too.
        settings: Fields of `bootstrap`.

    Returns:
        engine_check, engine_causes and engine_worst.
    """
    return {
        "engine_check": engine_check(contexts, tokens, bootstrap=bootstrap),
        "engine_causes": engine_causes(contexts, tokens, tops=tops, bootstrap=bootstrap),
        "engine_worst": engine_worst(contexts, tokens),
    }


def engine_warning(check: pd.DataFrame, causes: pd.DataFrame) -> tuple | None:
    """The row of the table of warnings (`analysis.warnings`); None where nothing is wrong.

    Args:
        check: The table `engine_check`.
        causes: The table `engine_causes`.

    Returns:
        Code, subject, value (mean |d|), limit, message, and no verdict that changes.
    """
    whole = check.iloc[0]
    size, why = float(whole["mean_absolute"]), engine_cause(check, causes)
    if size <= EQUAL:
        return None
    message = (
        f"The log-probabilities that came with the bank differ from the re-score by {size:.3g} nats"
        f" on average (99 %: {whole['quantile_99']:.3g}; mean {whole['mean']:+.3g}). {why}"
    )
    return ("engine_mismatch", "engine", size, EQUAL, message, "")


def engine_cause(check: pd.DataFrame, causes: pd.DataFrame) -> str:
    """What explains the gap, in a sentence with its figures."""
    whole = check.iloc[0]
    size = float(whole["mean_absolute"])
    if size <= EQUAL:
        return "Engine and re-score are the same to rounding."
    found = causes[causes["explains"]]
    if len(found):
        best = found.loc[found["takes_away"].idxmax()]
        share = best["takes_away"] / size
        for start, say in _SAID.items():
            if best["cause"].startswith(start):
                return say(best, share)
    if size <= ROUNDED:
        return (
            "That is no more than the rounding of bfloat16: another dtype, or other kernels, are"
            " cause enough."
        )
    few = int(whole["prompts"]) < FEWEST_PROMPTS
    return (
        "No cause is identified"
        + (f": there are fewer than {FEWEST_PROMPTS} prompts" if few else "")
        + ". Compare the checkpoint and its revision, the chat template, top-p or top-k where the"
        " engine gives values after them, and the engine's dtype with --student's."
    )


_SAID: dict[str, Callable[[pd.Series, float], str]] = {
    "temperature": lambda row, share: (
        f"A temperature of {row['parameter']:.3g} takes away {share:.0%} of it: the values are"
        " those of the sampling distribution, and the bank was drawn from it."
    ),
    "base": lambda row, share: (
        f"Logarithms to {row['cause']} take away {share:.0%} of it: the values are not natural"
        " logarithms."
    ),
    "shift": lambda row, share: (
        f"The values of {row['cause'].removeprefix('shift: values of ')} take away {share:.0%} of"
        " it: they are shifted against the response by one token."
    ),
    "another prompt": lambda row, share: (
        f"A response's first {FIRST} tokens differ by {row['parameter']:.3g} nats and later ones by"
        f" {row['mean_absolute']:.3g}: the engine read another prompt (template, system prompt,"
        " start token)."
    ),
}
"""Sentences by the beginning of a cause's name."""
