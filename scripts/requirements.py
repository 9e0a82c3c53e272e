"""Write requirements.txt: what pyproject.toml requires, at the versions in requirements.lock.

pyproject.toml is the only list written by hand. `make lock` resolves it, with all extras, into
requirements.lock; this script then pins what pyproject.toml names by what the lock holds.
`--check` only compares; `--print GROUP …` prints the pins of some groups (`run`, or an extra).
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = (
    "# Every requirement of pyproject.toml, extras included, at the version in requirements.lock.\n"
    "# Written by scripts/requirements.py: change pyproject.toml, then run `make lock`.\n"
)
RUN = "run"


class Behind(Exception):
    """One of the three files does not follow from the others."""


def name_of(requirement: str) -> str:
    """A requirement's package, normalised as package indexes do."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise Behind(f"pyproject.toml has the requirement {requirement!r}, which names no package.")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def groups(pyproject: str) -> dict[str, list[str]]:
    """Requirements per group: `run` for what is always needed, then each extra."""
    project = tomllib.loads(pyproject)["project"]
    return {RUN: project["dependencies"], **project["optional-dependencies"]}


def locked(lock: str) -> dict[str, list[str]]:
    """Pins per package as `==version`, with a marker where the lock has one."""
    pins: dict[str, list[str]] = {}
    for name, pin in re.findall(r"^([A-Za-z0-9._-]+)(==[^\\\n]+)", lock, flags=re.M):
        pins.setdefault(name_of(name), []).append(pin.strip())
    return pins


def pinned(requirement: str, pins: dict[str, list[str]]) -> list[str]:
    """A requirement's lines in requirements.txt. Raises Behind where the lock does not meet it."""
    from packaging.requirements import Requirement

    name, wanted = name_of(requirement), Requirement(requirement).specifier
    if name not in pins:
        raise Behind(f"requirements.lock lacks {name}: run `make lock`.")
    for pin in pins[name]:
        version = pin.split(";")[0].strip().removeprefix("==")
        if not wanted.contains(version, prereleases=True):
            raise Behind(f"requirements.lock has {name} {version}, not {wanted}: run `make lock`.")
    return [name + pin for pin in pins[name]]


def requirements(pyproject: str, lock: str) -> str:
    """What requirements.txt should hold; a package that an earlier group names is not repeated."""
    pins, parts, seen = locked(lock), [HEAD], set()
    for group, wanted in groups(pyproject).items():
        fresh = [requirement for requirement in wanted if name_of(requirement) not in seen]
        seen |= {name_of(requirement) for requirement in fresh}
        lines = [line for requirement in fresh for line in pinned(requirement, pins)]
        parts.append("".join(f"{line}\n" for line in [f"# {group}", *lines]))
    return "".join(parts)


def only(text: str, wanted: list[str]) -> str:
    """The pins of some groups of requirements.txt. Raises Behind for a group that it lacks."""
    found = dict(re.findall(r"^# (\S+)\n((?:[^#\n].*\n)*)", text.removeprefix(HEAD), flags=re.M))
    missing = [group for group in wanted if group not in found]
    if missing:
        raise Behind(f"requirements.txt has no group {missing[0]!r}; it has {', '.join(found)}.")
    return "".join(found[group] for group in wanted)


def main(arguments: list[str] | None = None) -> int:
    """Write requirements.txt, compare it, or print a part of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--print", nargs="+", metavar="GROUP", help="print these groups' pins")
    parsed = parser.parse_args(arguments)
    target = ROOT / "requirements.txt"
    try:
        if parsed.print:
            print(only(target.read_text(), parsed.print), end="")
            return 0
        lock = (ROOT / "requirements.lock").read_text()
        text = requirements((ROOT / "pyproject.toml").read_text(), lock)
        if parsed.check and target.read_text() != text:
            raise Behind("requirements.txt is behind: run scripts/requirements.py.")
    except Behind as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not parsed.check:
        target.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
