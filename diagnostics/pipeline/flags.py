"""Flags from the fields of dataclasses, so that a setting is written once, beside its reader.

The type of a field gives the type of the flag, its default the default, and its metadata `help` and
`choices`. `a_name` becomes `--a-name`, a bool becomes `--name/--no-name`, and a tuple becomes a
comma-separated list. Configurations of one command that share a field name share the flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.inputs import read_share
from diagnostics.core.names import nearest
from diagnostics.core.settings import RETIRED, SHARES

BOUNDS = {
    "contexts": (1, 10**9),
    "max_prompt_tokens": (1, 10**9),
    "max_new_tokens": (1, 10**6),
    "samples_per_prompt": (1, 10**6),
    "temperature": (1e-6, 1e6),
    "top_p": (1e-9, 1),
    "top_k": (0, 10**9),
    "seed": (0, 2**32 - 1),
    "k": (1, 10**6),
    "sweep": (1, 10**6),
    "batch_tokens": (1, 10**9),
    "beta": (0, 1),
    "folds": (2, 1000),
    "placebos": (0, 1000),
    "horizon": (0, 10**6),
    "warm_steps": (0, 10**6),
    "minibatch": (1, 10**6),
    "draws": (2, 10**5),
    "level": (0.01, 0.9999),
    "budget": (1e-9, 1),
    "budgets": (1e-9, 1),
    "random_draws": (1, 1000),
    "steps": (1, 10**9),
    "batch": (1, 10**6),
    "accumulation": (1, 10**6),
    "learning_rate": (0, 10),
    "lora_rank": (0, 10**4),
    "seeds": (1, 1000),
    "per_context_minimum": (0, 10**6),
    "workers": (1, 1000),
    "sample": (1, 10**9),
    "eval_every": (0, 10**9),
    "eval_contexts": (0, 10**9),
    "eval_samples": (1, 10**6),
    "save_every": (0, 10**9),
    "probe_every": (0, 10**9),
    "measure_every": (1, 10**9),
    "top_logprobs": (1, 10**6),
    "concurrency": (1, 1000),
    "retries": (0, 100),
    "timeout": (1, 10**6),
}
"""Least and most of a flag's number wherever it appears. A value outside is a typing error, or
would fill the memory, so it is rejected.
"""

Recorded = Literal["always", "maybe", "never"]


@dataclass(frozen=True)
class Flag:
    """A flag, or a positional argument, that no configuration holds."""

    names: tuple[str, ...]
    """As argparse takes them."""
    options: Mapping[str, Any]
    """Keyword arguments of argparse's `add_argument`."""
    recorded: Recorded = "never"
    """Whether the manifest of a finished run has it among the settings of its stage."""
    formerly: str = ""
    """An earlier spelling, which still works, names the setting, and is not shown."""

    @property
    def field(self) -> str:
        """Its name in the parsed flags and in the manifest."""
        return (self.formerly or self.names[0]).lstrip("-").replace("-", "_")

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add it to a parser."""
        if not self.formerly:
            parser.add_argument(*self.names, **self.options)
            return
        both = {**self.options, "dest": self.field}
        parser.add_argument(*self.names, **both)
        parser.add_argument(
            self.formerly, **{**both, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        )


def flag(name: str, *, recorded: Recorded = "never", formerly: str = "", **options: Any) -> Flag:
    """The flag `--name`, once `--formerly`; options are those of argparse's `add_argument`."""
    return Flag((f"--{name}",), options, recorded, formerly and f"--{formerly}")


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add one flag per distinct field of the dataclasses, grouped under the first that has it.

    A flag that the parser has already counts for the field of its name.
    """
    seen = {
        field.name
        for config in configs
        for field in dataclasses.fields(config)
        if "--" + field.name.replace("_", "-") in parser._option_string_actions
    }
    for config in configs:
        group = parser.add_argument_group(
            (config.__doc__ or config.__name__).split("\n")[0].rstrip(".")
        )
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if field.name not in seen:
                seen.add(field.name)
                group.add_argument(
                    "--" + field.name.replace("_", "-"), **_options(field, hints[field.name])
                )


def _options(field: dataclasses.Field, hint) -> dict:
    text = field.metadata.get("help", "")
    options = {"default": field.default, "help": f"{text} (default: {_shown(field.default)})"}
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    kind = kinds[0] if kinds else hint
    read = read_share if field.name in SHARES else kind
    if typing.get_origin(hint) is tuple:
        return options | {"type": _list_of(read), "metavar": "A,B,…"}
    choices = field.metadata.get("choices")
    return (
        options
        | {"type": read}
        | ({"choices": choices} if choices else {"metavar": kind.__name__.upper()})
    )


def _shown(default) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def _list_of(kind: type):
    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated list of {kind.__name__}"
    return parse


def read_flags(arguments: argparse.Namespace, config: type):
    """Fill the dataclass from parsed flags.

    Args:
        arguments: What the parser returned.
        config: The dataclass. A JSON object stays a string, which its owner parses.

    Raises:
        DiagnosticsError: A number lies outside its bounds.
    """
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        least, most = BOUNDS.get(name, (None, None))
        for number in value if isinstance(value, tuple) else (value,):
            if (
                least is not None
                and isinstance(number, (int, float))
                and not least <= number <= most
            ):
                raise _out_of_bounds(name, number, least, most)
    return config(**values)


def _out_of_bounds(name: str, number: float, least: float, most: float) -> DiagnosticsError:
    shown = f"--{name.replace('_', '-')}"
    if name in ("budget", "budgets"):
        meant = f" Did you mean {number:g}%?" if 1 < number <= 100 else ""
        return DiagnosticsError(
            f"{shown} takes shares above 0 and at most 1, as 0.05 or 5%; got {number:g}.{meant}"
        )
    return DiagnosticsError(
        f"{shown} takes a number from {least} to {most}; got {number}. See --help."
    )


class Parser(argparse.ArgumentParser):
    """An argparse parser that takes no abbreviations and raises DiagnosticsError, so that every
    mistake ends the same way: what was wrong, the nearest known word, and whose help says more.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse, and let the command that was chosen refuse what it does not know."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._chosen(found).refuse(unknown)
        return found

    def given(self, args: Sequence[str]) -> frozenset[str]:
        """Names of the flags that these arguments give. The parser is of no further use."""
        command = self._chosen(argparse.Namespace(command=args[0]))
        for action in command._actions:
            action.default = argparse.SUPPRESS
        command._defaults.clear()
        return frozenset(vars(command.parse_known_args(args[1:])[0]))

    def _chosen(self, found: argparse.Namespace) -> Parser:
        commands = self._subparsers._group_actions[0].choices if self._subparsers else {}
        return commands.get(getattr(found, "command", None), self)  # type: ignore[union-attr]

    def refuse(self, unknown: Sequence[str]) -> typing.NoReturn:
        """Raise for arguments that this command does not know."""
        known = [name for action in self._actions for name in action.option_strings]
        first = next((each for each in unknown if each.startswith("-")), "").partition("=")[0]
        self.error(f"unrecognized arguments: {' '.join(unknown)}", near=nearest(first, known))

    def error(self, message: str, *, near: str = "") -> typing.NoReturn:
        """Raise the mistake, with the command whose help says more."""
        retired = [
            text for name, text in RETIRED.items() if f"--{name.replace('_', '-')}" in message
        ]
        hint = "".join(f" {text}" for text in retired)
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            near = nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        hint += f" Did you mean {near}?" if near and not retired else ""
        raise DiagnosticsError(f"{self.prog}: {message}.{hint} See `{self.prog} --help`.")
