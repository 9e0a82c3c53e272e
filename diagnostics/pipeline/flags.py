"""Flags from dataclass fields: a stage's settings are written once, beside the code that reads
them.

A field's type gives the flag's type, its default the default, and its metadata `help` and
`choices`. `a_name` becomes `--a-name`, a bool `--name/--no-name`, a tuple of numbers a
comma-separated list. Stages that share a field name share the flag."""

from __future__ import annotations

import argparse
import dataclasses
import typing

from diagnostics.core.errors import DiagnosticsError

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
    "held_out": (0, 1),
    "draws": (2, 10**5),
    "level": (0.01, 0.9999),
    "random_draws": (1, 1000),
    "steps": (1, 10**9),
    "batch": (1, 10**6),
    "accumulation": (1, 10**6),
    "learning_rate": (0, 10),
    "lora_rank": (0, 10**4),
    "seeds": (1, 1000),
    "workers": (1, 1000),
    "sample": (1, 10**9),
    "eval_every": (0, 10**9),
    "eval_contexts": (0, 10**9),
    "eval_samples": (1, 10**6),
    "save_every": (0, 10**9),
    "probe_every": (0, 10**9),
}
"""Least and most of a flag's number wherever it appears: what lies outside is a slip of the hand,
or would fill the memory.
"""


def add_flags(parser: argparse.ArgumentParser, *configs: type) -> None:
    """Add one flag for every distinct field of the dataclasses, grouped under the first that has
    it.
    """
    seen: set[str] = set()
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
    if typing.get_origin(hint) is tuple:
        return options | {"type": _list_of(kinds[0]), "metavar": "A,B,…"}
    kind = kinds[0] if kinds else hint
    choices = field.metadata.get("choices")
    return (
        options
        | {"type": kind}
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
    """The dataclass filled from parsed flags; a dict-valued string stays a string for its owner to
    parse.
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
                raise DiagnosticsError(
                    f"--{name.replace('_', '-')} takes a number from {least} to {most}; got"
                    f" {number}. See --help."
                )
    return config(**values)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are DiagnosticsError, so that every mistake ends the same
    way.
    """

    def error(self, message: str) -> typing.NoReturn:
        raise DiagnosticsError(f"{self.prog}: {message}. See `{self.prog} --help`.")
