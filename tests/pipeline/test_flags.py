"""Flags follow from dataclasses, and values outside their bounds are refused."""

import dataclasses

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.names import nearest
from diagnostics.pipeline.flags import Flag, Parser, add_flags, flag, read_flags


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


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares."""

    budgets: tuple[float, ...] = dataclasses.field(default=(0.05,), metadata={"help": "shares"})
    level: float = dataclasses.field(default=0.95, metadata={"help": "coverage"})


def shares(*arguments):
    parser = Parser(prog="x")
    add_flags(parser, Shares)
    return read_flags(parser.parse_args(arguments), Shares)


def test_shares_may_be_percentages():
    assert shares("--budgets", "5%,0.1, 30 %", "--level", "90%") == Shares((0.05, 0.1, 0.3), 0.9)


@pytest.mark.parametrize(
    "given, said",
    [
        ("5", r"--budgets takes shares above 0 and at most 1, as 0\.05 or 5%; got 5\. .*mean 5%\?"),
        ("0", r"at most 1, as 0\.05 or 5%; got 0\.$"),
        ("500%", r"got 5\. Did you mean 5%\?"),
        ("much", r"argument --budgets: invalid"),
    ],
)
def test_a_budget_that_is_no_share_is_refused_with_the_remedy(given, said):
    with pytest.raises(DiagnosticsError, match=said):
        shares("--budgets", given)


def test_no_flag_is_abbreviated_and_the_nearest_is_named():
    with pytest.raises(DiagnosticsError, match=r"--siz-of-it 7\. Did you mean --size-of-it\?"):
        parse("--siz-of-it", "7")
    with pytest.raises(DiagnosticsError, match=r"--size 7\. Did you mean --size-of-it\? See"):
        parse("--size", "7")
    with pytest.raises(DiagnosticsError, match=r"invalid choice: 'bb'.* Did you mean b\?"):
        parse("--kind", "bb")


def test_nothing_is_suggested_that_is_not_alike():
    assert nearest("--zebra", ["--size-of-it", "--name"]) == ""


def test_an_earlier_spelling_still_names_the_setting_and_is_not_shown():
    own = flag("against", formerly="offline", help="another run")
    parser = Parser(prog="x")
    own.add(parser)
    assert own.field == "offline" and "--offline" not in parser.format_help()
    assert parser.parse_args(["--offline", "a"]).offline == "a"
    assert parser.parse_args(["--against", "b"]).offline == "b"
    assert parser.parse_args([]).offline is None
    assert Flag(("directory",), {}).field == "directory"
