"""Write the README's file tree from the first line of each module's docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "types parallel runs divergences criteria losses pairs prompts tasks rollouts interop scores probe attribution intervention trainer training "
    "evaluation validation statistics tables analysis comparison agreement verdicts plates figures tokenview narrative report config stages cli"
).split()
OTHER = {
    "data/embedded": "the embedded pair and its card",
    "data/prompts.jsonl": "instruction prompts for the smollm2 pair",
    "scripts": "how the embedded pair was made; this tree",
    "benchmarks": "cost against its floor, calibration of the intervals, and measured results",
    "docs": "scale, criteria, figures of this page",
    "notebooks": "the instrument from Jupyter, step by step",
    "reports": "committed studies",
    "tests": "one file a module",
}


def line(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s|\n\n", text.replace("\n", " ", 1))[0].strip()


def tree() -> str:
    """The tree as a fenced block, modules in the order in which they may import each other."""
    modules = {path.stem: path for path in (ROOT / "diagnostics").glob("*.py")}
    names = [name for name in ORDER if name in modules] + sorted(set(modules) - set(ORDER) - {"__init__", "__main__"})
    rows = [("diagnostics/", "a module imports only from those above it")]
    rows += [(f"  {name}.py", line(modules[name])) for name in names]
    rows += [(name, text) for name, text in OTHER.items() if (ROOT / name).exists()]
    width = max(len(name) for name, _ in rows)
    return "```\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows) + "\n```"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    readme.write_text(re.sub(r"(## Where things are\n\n).*?(?=\n\n## )", lambda match: match[1] + tree(), text, flags=re.S))
