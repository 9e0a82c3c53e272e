import dataclasses

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.pipeline.flags import Parser, add_flags, read_flags


@dataclasses.dataclass(frozen=True)
class One:
    """First settings."""

    size_of_it: int = dataclasses.field(default=3, metadata={"help": "how large"})
    name: str | None = dataclasses.field(default=None, metadata={"help": "which"})
    kind: str = dataclasses.field(default="a", metadata={"help": "what", "choices": ("a", "b")})
    ks: tuple[int, ...] = dataclasses.field(default=(4, 8), metadata={"help": "several"})
    fast: bool = dataclasses.field(default=True, metadata={"help": "hurry"})


@dataclasses.dataclass(frozen=True)
class Two:
    """Second settings."""

    size_of_it: int = dataclasses.field(default=3, metadata={"help": "how large"})
    share: float = dataclasses.field(default=0.5, metadata={"help": "part"})


def parse(*arguments):
    parser = Parser(prog="x")
    add_flags(parser, One, Two)
    return parser.parse_args(arguments), parser


def test_defaults_come_from_the_dataclass():
    flags, parser = parse()
    assert read_flags(flags, One) == One() and read_flags(flags, Two) == Two()
    assert (
        "how large (default: 3)" in parser.format_help()
        and "First settings" in parser.format_help()
    )


def test_values_take_the_fields_type():
    flags, _ = parse(
        "--size-of-it",
        "7",
        "--name",
        "n",
        "--kind",
        "b",
        "--ks",
        "2,16",
        "--no-fast",
        "--share",
        "0.25",
    )
    assert read_flags(flags, One) == One(7, "n", "b", (2, 16), False)
    assert read_flags(flags, Two) == Two(7, 0.25)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("--size-of-it", "many"),
            r"^x: argument --size-of-it: invalid int value: 'many'\. See `x --help`\.$",
        ),
        (("--kind", "c"), r"^x: argument --kind: invalid choice: 'c'"),
        (("--ks", "4,x"), r"^x: argument --ks: invalid comma-separated list of int value: '4,x'"),
        (("--nothing",), r"^x: unrecognized arguments: --nothing"),
    ],
)
def test_mistakes_are_one_paragraph(arguments, message):
    with pytest.raises(DiagnosticsError, match=message):
        parse(*arguments)
