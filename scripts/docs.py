"""Write what can be read off the code: the README's file tree and docs/columns.md. `--check` only
compares.

As a hook of mkdocs (see mkdocs.yml) it also makes the pages that need no file of their own: the
front page from the README, and one page a stage from the command line, the settings' dataclasses
and the docstrings."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ORDER = (
    "types parallel files runs divergences criteria losses templates conversations prompts remote"
    " sources pairs tasks rollouts archives banks interop scores probe attribution intervention"
    " trainer training evaluation validation statistics tables exactness analysis comparison"
    " agreement verdicts plates figures tokenview narrative report config stages rerun cli"
).split()
OTHER = {
    "data/embedded": "the embedded pair and its card",
    "data/prompts.jsonl": "instruction prompts for the smollm2 pair",
    "scripts": "how the embedded pair was made; requirements.txt; this tree and the site's pages",
    "benchmarks": "cost against its floor, calibration of the intervals, and measured results",
    "docs": (
        "the site's pages that are not made from the code: statistics, columns, criteria, scale, …"
    ),
    "notebooks": "the instrument from Jupyter, step by step",
    "reports": "committed studies",
    "tests": "one file a module",
}


MODULES = {
    "rollout": "prompts conversations templates rollouts banks",
    "score": "scores divergences",
    "probe": "probe losses",
    "analyze": "analysis regressions robustness interop",
    "compare": "comparison criteria",
    "intervene": "intervention agreement",
    "attribute": "attribution",
    "report": "report narrative tokenview sidebyside",
    "train": "training trainer evaluation",
    "validate": "validation",
    "run": "stages",
    "rerun": "rerun",
}
"""Modules whose docstrings a stage's page shows."""


def line(path: Path) -> str:
    """First sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s|\n\n", text)[0].replace("\n", " ").strip()


def tree() -> str:
    """The tree as a fenced block, modules in the order in which they may import each other."""
    modules = {path.stem: path for path in (ROOT / "diagnostics").glob("*.py")}
    names = [name for name in ORDER if name in modules] + sorted(
        set(modules) - set(ORDER) - {"__init__", "__main__"}
    )
    rows = [("diagnostics/", "a module imports only from those above it")]
    rows += [(f"  {name}.py", line(modules[name])) for name in names]
    rows += [(name, text) for name, text in OTHER.items() if (ROOT / name).exists()]
    width = max(len(name) for name, _ in rows)
    return "```\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows) + "\n```"


def columns() -> str:
    """docs/columns.md: every column of the token table, from the schema."""
    from diagnostics.core.schema import SCHEMA

    stages = {
        "key": "Keys: what the row is",
        "before": "Before: measured with the untouched student; may predict",
        "after": "After: measured with another student; may not predict",
        "outcome": "Outcomes: what is predicted",
    }
    parts = [
        "# Columns of the token table\n\nOne row a response position. Logarithms are natural; p is"
        " the student's distribution, q the teacher's, y the sampled\ntoken, S and T the K"
        " likeliest tokens of each, U both together. A column marked K depends on it: other K stand"
        " beside it\nas `<name>_k<K>`; *by lists* says what it is with a teacher that is known by"
        " top-K lists alone (docs/inputs.md). Written from\nthe schema by `scripts/docs.py`."
    ]
    for stage, title in stages.items():
        rows = [
            f"| `{c.name}` | {c.dtype} | {c.unit or '–'} | {'K' if c.by_support else ''} |"
            f" {'' if stage == 'key' else c.listed} | {c.meaning.replace('|', chr(92) + '|')} |"
            for c in SCHEMA.values()
            if c.stage == stage
        ]
        parts.append(
            f"## {title}\n\n| column | type | unit | | by lists | meaning"
            " |\n|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """Each generated page with what it should hold."""
    readme = ROOT / "README.md"
    text = re.sub(
        r"(## Where things are\n\n).*?(?=\n\n## )",
        lambda match: match[1] + tree(),
        readme.read_text(),
        flags=re.S,
    )
    return {readme: text, ROOT / "docs" / "columns.md": columns()}


# --- the site
# --------------------------------------------------------------------------------------


def stage_page(name: str) -> str:
    """A stage's page: what it is for, what it reads and writes, examples, every setting, and its
    modules.
    """
    from diagnostics.pipeline import cli

    parts = [
        f"# {name}",
        cli.PURPOSE[name][0].upper() + cli.PURPOSE[name][1:] + ".",
        _files_of(name),
        f"```\n{_dedented(cli.EXAMPLES[name])}\n```",
    ]
    configs = cli._configs(name)
    if configs:
        parts += ["## Settings", *(_settings(config) for config in configs)]
    parts += [f"::: diagnostics.{module}" for module in MODULES.get(name, "").split()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _dedented(text: str) -> str:
    return "\n".join(part.strip() for part in text.split("\n"))


def _files_of(name: str) -> str:
    """The stage's row of the README's table, in words."""
    for row in re.findall(
        r"^\|([^|\n]+)\|([^|\n]+)\|([^|\n]+)\|$", (ROOT / "README.md").read_text(), flags=re.M
    ):
        if f"`{name}`" in row[0]:
            return f"Reads {row[1].strip()}; writes {row[2].strip()}."
    return ""


def _settings(config: type) -> str:
    """A table of a dataclass's fields as flags."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        default = (
            ",".join(map(str, field.default))
            if isinstance(field.default, tuple)
            else ""
            if field.default is None
            else str(field.default)
        )
        rows.append(
            f"| `--{field.name.replace('_', '-')}` | {f'`{default}`' if default else '–'} |"
            f" {_escaped(field.metadata.get('help', ''))} |"
        )
    return f"*{(config.__doc__ or '').split(chr(10))[0].rstrip('.')}*\n\n" + "\n".join(rows)


def _escaped(text: str) -> str:
    """Plain text in a table's cell: neither a further cell nor a reference."""
    return re.sub(r"([|\[\]])", r"\\\1", text)


def public_names() -> str:
    """Every name of the package with the module that it comes from."""
    import diagnostics

    rows = [
        f"| {', '.join(f'`dx.{name}`' for name in names)} | `{home}` |"
        for home, names in diagnostics._HOMES.items()
    ]
    rows += [f"| `dx.{name}` | `{home}` |" for name, home in diagnostics._MODULES.items()]
    return "\n".join(["| names | module |", "|---|---|", *rows])


def on_config(config):
    """mkdocs: the order of the pages; those of docs/ that are not named here follow by name."""
    sys.path.insert(0, str(ROOT))  # mkdocs puts the path back after it has loaded its hooks
    from diagnostics.pipeline import cli

    first = ["commands.md", "statistics.md", "columns.md", "criteria.md", "python.md"]
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in first)
    config.nav = [
        {"Overview": "index.md"},
        {"Stages": [f"stages/{name}.md" for name in cli.PURPOSE if name != "criteria"]},
        *first,
        *others,
        "contributing.md",
    ]
    return config


def on_files(files, config):
    """mkdocs: add the pages that are made from the code."""
    from mkdocs.structure.files import File

    from diagnostics.pipeline import cli

    made = {f"stages/{name}.md": stage_page(name) for name in cli.PURPOSE if name != "criteria"}
    made["index.md"] = (
        (ROOT / "README.md")
        .read_text()
        .replace("](docs/", "](")
        .replace("](CONTRIBUTING.md)", "](contributing.md)")
    )
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text()
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """mkdocs: fill in the list of names."""
    return (
        markdown.replace("{{ names }}", public_names())
        if page.file.src_uri == "python.md"
        else markdown
    )


def main() -> int:
    """Write the pages, or with `--check` name those that are behind the code."""
    behind = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    if "--check" in sys.argv:
        print(
            "\n".join(
                f"{path.relative_to(ROOT)} is behind the code: run scripts/docs.py"
                for path in behind
            )
            or "pages are current"
        )
        return int(bool(behind))
    for path in behind:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages()[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
