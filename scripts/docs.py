"""Write what can be read off the code: the README's file tree and docs/columns.md. `--check` only compares."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "types parallel runs divergences criteria losses pairs prompts tasks rollouts interop scores probe attribution intervention trainer training "
    "evaluation validation statistics tables analysis comparison agreement verdicts plates figures tokenview narrative report config stages rerun cli"
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


def columns() -> str:
    """docs/columns.md: every column of the token table, from the schema."""
    sys.path.insert(0, str(ROOT))
    from diagnostics.types import SCHEMA

    stages = {
        "key": "Keys: what the row is", "before": "Before: measured with the untouched student; may predict",
        "after": "After: measured with another student; may not predict", "outcome": "Outcomes: what is predicted",
    }
    parts = ["# Columns of the token table\n\nOne row a response position. Logarithms are natural; p is the student's distribution, q the "
             "teacher's, y the sampled\ntoken, S and T the K likeliest tokens of each, U both together. A column marked K depends on it: "
             "other K stand beside it\nas `<name>_k<K>`. Written from the schema by `scripts/docs.py`."]
    for stage, title in stages.items():
        rows = [f"| `{c.name}` | {c.dtype} | {c.unit or '–'} | {'K' if c.by_support else ''} | {c.meaning.replace('|', chr(92) + '|')} |"
                for c in SCHEMA.values() if c.stage == stage]
        parts.append(f"## {title}\n\n| column | type | unit | | meaning |\n|---|---|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """Each generated page with what it should hold."""
    readme = ROOT / "README.md"
    text = re.sub(r"(## Where things are\n\n).*?(?=\n\n## )", lambda match: match[1] + tree(), readme.read_text(), flags=re.S)
    return {readme: text, ROOT / "docs" / "columns.md": columns()}


def main() -> int:
    """Write the pages, or with `--check` name those that are behind the code."""
    behind = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        print("\n".join(f"{path.relative_to(ROOT)} is behind the code: run scripts/docs.py" for path in behind) or "pages are current")
        return int(bool(behind))
    for path in behind:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages()[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
