"""Keyword shortcuts for configuration objects, so that a default is written once, in its dataclass.

    @with_settings(config=ProbeConfig)
    def probe(pair, bank, config: ProbeConfig = ProbeConfig(), *, tokens=None, **settings): ...

`probe(pair, bank, loss="jsd")` then is `probe(pair, bank, ProbeConfig(loss="jsd"))`, and
`inspect.signature(probe)` and `help(probe)` show every field with its default.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import several, share
from diagnostics.core.names import nearest

RETIRED = {
    "held_out": (
        "Prompts are divided into folds now, and each is held out for the steps on all others: use"
        " folds (4 by default) in its place."
    )
}
"""Settings that are gone, and what replaces each."""
SHARES = ("budget", "budgets", "level")
"""Settings that are shares, which may be written as percentages."""
F = TypeVar("F", bound=Callable[..., Any])
Config = TypeVar("Config", bound=type)


def as_written(config: Config) -> Config:
    """Let a configuration take its shares and lists as a user may write them.

    `ComparisonConfig(budgets="5%")` then is `ComparisonConfig(budgets=(0.05,))`. It stands below
    `@dataclass`, and reads the fields before the class's own checks do.

    Args:
        config: A class that becomes a dataclass.
    """
    checks = getattr(config, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, field in _fields(type(self)).items():
            value = getattr(self, name)
            read = _read(name, value, listed=isinstance(_default(field), tuple))
            object.__setattr__(self, name, read)
        if checks is not None:
            checks(self)

    config.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return config


def with_settings(**configs: type) -> Callable[[F], F]:
    """Let a function take the fields of its configuration objects as keywords.

    Args:
        configs: For each parameter that holds a configuration, its frozen dataclass. No two of
            them, and no other parameter of the function, may share a name.

    Returns:
        A decorator. The decorated function gets whole configuration objects: what was passed (None
        for the defaults), with the keywords in place of its fields. A list given for a field that
        holds a tuple becomes a tuple. An unknown keyword raises DiagnosticsError and names the
        nearest known one; so does an object that is not the parameter's dataclass.
    """

    def decorate(function: F) -> F:
        inner = inspect.signature(function)
        shown = _expanded(inner, configs)

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            _require_known(function.__name__, keywords, shown)
            fields = {name for config in configs.values() for name in _fields(config)}
            given = {name: keywords.pop(name) for name in fields & keywords.keys()}
            bound = inner.bind(*args, **keywords)
            for parameter, config in configs.items():
                passed = bound.arguments.get(parameter)
                bound.arguments[parameter] = _merged(parameter, config, passed, given)
            return function(*bound.args, **bound.kwargs)

        call.__signature__ = shown  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\n{_help(configs)}"
        return cast(F, call)

    return decorate


def _fields(config: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(config)}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _expanded(signature: inspect.Signature, configs: Mapping[str, type]) -> inspect.Signature:
    """The signature with the configurations' fields in place of its `**settings`."""
    kept = [
        parameter.replace(default=None, annotation=configs[name] | None)
        if name in configs
        else parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    added = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[name]
        )
        for config in configs.values()
        for hints in (typing.get_type_hints(config),)
        for name, field in _fields(config).items()
    ]
    return signature.replace(parameters=[*kept, *added])  # refuses a name that appears twice


def _require_known(function: str, keywords: Iterable[str], shown: inspect.Signature) -> None:
    known = list(shown.parameters)
    for name in keywords:
        if name in RETIRED and name not in known:
            raise DiagnosticsError(f"{function}() no longer takes {name!r}. {RETIRED[name]}")
        if name not in known:
            near = nearest(name, known)
            hint = f"Did you mean {near!r}?" if near else f"Known are {', '.join(known)}."
            raise DiagnosticsError(f"{function}() takes no setting {name!r}. {hint}")


def _merged(parameter: str, config: type, passed: Any, given: Mapping[str, Any]) -> Any:
    """The configuration that was passed, with the keywords that are fields of it."""
    if passed is not None and not isinstance(passed, config):
        raise DiagnosticsError(
            f"{parameter} takes a {config.__name__}; got {passed!r}. Pass"
            f" {config.__name__}(...), or its fields as keywords."
        )
    changes = {
        name: _read(name, given[name], listed=isinstance(_default(field), tuple))
        for name, field in _fields(config).items()
        if name in given
    }
    current: Any = config() if passed is None else passed
    return dataclasses.replace(current, **changes)


def _read(name: str, value: Any, *, listed: bool) -> Any:
    """A field as it may be written: one value for a list of one, and a share as `"5%"`."""
    read = share if name in SHARES else lambda each: each
    return tuple(map(read, several(value))) if listed and value is not None else read(value)


def _help(configs: Mapping[str, type]) -> str:
    """The fields as a section of a Google docstring, from the help texts of their flags."""
    lines = ["Keyword Args:"]
    for parameter, config in configs.items():
        for name, field in _fields(config).items():
            text = field.metadata.get("help", "")
            choices = field.metadata.get("choices")
            known = f" One of {', '.join(map(str, choices))}." if choices else ""
            lines.append(
                f"    {name}: {text}.{known} Field of `{parameter}` ({config.__name__}), default"
                f" {_default(field)!r}."
            )
    return "\n".join(lines)
