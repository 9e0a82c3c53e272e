"""Write what follows from the code: pages of docs/ and the package's stub. `--check` only compares.

- `docs/structure.md`: rooms from the import contract, modules from their first lines;
- `docs/commands.md`: the table of commands, from the registry of stages;
- `docs/columns.md`: every column of the token table, from the schema;
- `diagnostics/__init__.pyi`: the public names, from `diagnostics/__init__.py`.

As a hook of mkdocs (see mkdocs.yml) it also makes the pages that need no file of their own: the
front page from the README, one page per command from the registry, the dataclasses of its settings
and the docstrings, the reference of the public names, the tutorial's figures from a committed
study, and the notebooks, with their outputs where `scripts/notebooks.py` has executed them.

`--figures` draws the picture of the README, `docs/decision.png`, anew.
"""

from __future__ import annotations

import ast
import configparser
import dataclasses
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGE = ROOT / "diagnostics"
PROGRAM = "python -m diagnostics"
STUDY = ROOT / "reports" / "embedded-probe"
"""The committed study whose tables the README and the tutorial draw."""
NOTEBOOKS = ROOT / "notebooks"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[.?])\s|\n\n", text)[0].replace("\n", " ").strip()


# --- docs/structure.md: the rooms


def layers() -> list[list[str]]:
    """The layers of the import contract, lowest first, each with the names of its rooms."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    lines = contract["importlinter:contract:rooms"]["layers"].split("\n")
    rooms = [
        [part.strip().removeprefix("diagnostics.") for part in line.split("|")]
        for line in reversed(lines)
        if line.strip()
    ]
    return [layer for layer in rooms if layer != ["__main__"]]


def rooms() -> str:
    """A section per room, lowest layer first, with a table of its modules."""
    parts = []
    for layer in layers():
        for room in sorted(layer):
            folder = PACKAGE / room
            head = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            beside = [f"`{other}`" for other in sorted(layer) if other != room]
            note = f" It and {' and '.join(beside)} do not import each other." if beside else ""
            parts += [f"### {room}", f"{first_sentence(head)}{note}".strip()]
            if folder.is_dir():
                parts.append(_modules(folder))
    return "\n\n".join(filter(None, parts))


def _modules(folder: Path) -> str:
    rows = [
        f"| `{path.relative_to(folder)}` | {_escaped(first_sentence(path))} |"
        for path in sorted(folder.rglob("*.py"))
        if path != folder / "__init__.py"
    ]
    return "\n".join(["| module | what it holds |", "|---|---|", *rows])


# --- docs/commands.md: the table of commands


def commands() -> str:
    """The table of commands, in the order in which a study uses them."""
    from diagnostics.pipeline.registry import COMMANDS

    rows = [
        f"| `{stage.name}` | {stage.purpose} | {stage.reads} | {stage.writes} |"
        for stage in COMMANDS
    ]
    head = ["| command | what it does | reads | writes |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


# --- docs/columns.md: the token table


def columns() -> str:
    """Every column of the token table, from the schema."""
    from diagnostics.core.schema import SCHEMA

    stages = {
        "key": "Keys: what the row is",
        "before": "Before: measured with the untouched student; may predict",
        "after": "After: measured with another student; may not predict",
        "outcome": "Outcomes: what is predicted",
    }
    parts = [
        "# Columns of the token table",
        "One row per response position. Logarithms are natural; p is the student's distribution, q"
        " the teacher's, y the\nsampled token, S and T the K most likely tokens of each, U both"
        " together. A column marked K depends on it: other K\nstand beside it as `<name>_k<K>`."
        " A measurement from before the step may have a\ncounterpart `<name>_after`, and"
        " `<name>_k<K>_after`, taken with another student. *Imported* are columns of other"
        " programs' tables.\n"
        "*By lists* says what a column is with a teacher that is known by top-K lists alone\n"
        "([inputs](inputs.md)). `scripts/docs.py` writes this page from the schema.",
    ]
    for stage, title in stages.items():
        rows = [
            f"| `{c.name}` | {c.dtype} | {c.unit or '–'} | {'K' if c.by_support else ''} |"
            f" {'' if stage == 'key' else 'imported' if c.imported else c.listed} |"
            f" {c.meaning.replace('|', chr(92) + '|')} |"
            for c in SCHEMA.values()
            if c.stage == stage
        ]
        parts.append(
            f"## {title}\n\n| column | type | unit | | by lists | meaning"
            " |\n|---|---|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(parts) + "\n"


# --- diagnostics/__init__.pyi: the public names for type checkers and editors


def stub() -> str:
    """The package's stub, in ruff's format: the real imports, and `__all__`."""
    import diagnostics

    parts = [
        '"""The public names, for type checkers and editors. Written by scripts/docs.py."""',
        "\n".join(
            _import(f"diagnostics.{home}", sorted(names, key=_import_order))
            for home, names in sorted({**_modules_as_names(), **diagnostics._HOMES}.items())
        ),
        "__version__: str\n__all__ = [\n"
        + "".join(f'    "{name}",\n' for name in sorted(diagnostics.__all__, key=_import_order))
        + "]\n",
    ]
    return "\n\n".join(parts)


def _modules_as_names() -> dict[str, tuple[str, ...]]:
    """Public modules as imports from the package that holds them: `figures as plot`."""
    import diagnostics

    return {
        home.rpartition(".")[0]: (f"{home.rpartition('.')[2]} as {name}",)
        for name, home in diagnostics._MODULES.items()
    }


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= 100:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def _import_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions: ruff's order."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


# --- all files


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between the two markers `<!-- name -->` and `<!-- end of name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"A page needs the markers {begin} and {end} once each.")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n\n{content}\n\n{end}{tail}"


NEAR = 0.95
"""Rank correlation from which two criteria are listed as near duplicates, as everywhere else."""


def near_criteria() -> str:
    """The pairs of criteria that rank a bank nearly alike, without those inside Q3 alone."""
    import pandas as pd

    table = pd.read_csv(ROOT / "reports" / "near-criteria" / "near_criteria.csv")
    inside = table["criterion"].str.startswith("q3") | table["other"].str.startswith("q3")
    rows = [
        f"| `{row.criterion}` | `{row.other}` | {row.spearman:.3f} |"
        for row in table[~inside & (table["spearman"].abs() >= NEAR)].itertuples()
    ]
    return "\n".join(["| one | other | rank correlation |", "|---|---|---|", *rows])


def pages() -> dict[Path, str]:
    """Each generated file with what it should hold."""
    criteria = ROOT / "docs" / "criteria.md"
    structure, table = ROOT / "docs" / "structure.md", ROOT / "docs" / "commands.md"
    return {
        structure: between(structure.read_text(encoding="utf-8"), "rooms", rooms()),
        table: between(table.read_text(encoding="utf-8"), "commands", commands()),
        criteria: between(criteria.read_text(encoding="utf-8"), "near criteria", near_criteria()),
        ROOT / "docs" / "columns.md": columns(),
        PACKAGE / "__init__.pyi": stub(),
    }


# --- the site


def stage_page(name: str) -> str:
    """The page of a command: purpose, inputs, outputs, examples, every setting, its modules."""
    from diagnostics.pipeline.registry import BY_NAME, load_configs

    stage = BY_NAME[name]
    examples = "\n".join(f"{PROGRAM} {example}" for example in stage.example)
    parts = [
        f"# {name}",
        stage.purpose,
        f"Reads {stage.reads}. Writes {stage.writes}.",
        f"```\n{examples}\n```",
        "## Settings",
        _own_flags(stage),
        *(_settings(config) for config in load_configs(name).values()),
        *(f"::: diagnostics.{module}" for module in stage.modules),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _own_flags(stage) -> str:
    """A table of a command's flags that no dataclass holds."""
    from diagnostics.pipeline.registry import flags_of

    rows = [
        f"| `{flag.names[0]}` | {_escaped(flag.options.get('help', ''))} |"
        for flag in flags_of(stage)
    ]
    rows += ["| `--quiet` | print only warnings and errors on stderr |"]
    rows += ["| `--json` | print the result as one JSON object |"]
    rows += ["| `--criterion-module` | Python file that registers criteria of your own |"]
    return "\n".join(["| flag | |", "|---|---|", *rows])


def _settings(config: type) -> str:
    """A table of a dataclass's fields as flags."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        flag, default = field.name.replace("_", "-"), _shown(field.default)
        meaning = _escaped(field.metadata.get("help", ""))
        rows.append(f"| `--{flag}` | {f'`{default}`' if default else '–'} | {meaning} |")
    return f"*{(config.__doc__ or '').split(chr(10))[0].rstrip('.')}*\n\n" + "\n".join(rows)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is None else str(default)


def _escaped(text: str) -> str:
    """Plain text in a table's cell: neither a further cell nor a reference."""
    return re.sub(r"([|\[\]])", r"\\\1", text)


def public_names() -> str:
    """A table of every public name, with a link to its parameters and a sentence on each."""
    import diagnostics

    rows = [
        f"| [`dx.{name}`][diagnostics.{home}.{name}] | {_escaped(_sentence(home, name))} |"
        for home, names in diagnostics._HOMES.items()
        for name in names
    ]
    rows += [
        f"| [`dx.{name}`][diagnostics.{home}] | {first_sentence(_place(home))} |"
        for name, home in diagnostics._MODULES.items()
    ]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def _place(module: str) -> Path:
    folder = PACKAGE / module.replace(".", "/")
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _sentence(module: str, name: str) -> str:
    """The first sentence on a public name: of its docstring, or of the text below a constant."""
    import inspect

    import diagnostics

    value = getattr(diagnostics, name)
    text = inspect.getdoc(value) if callable(value) else _below(_place(module), name)
    return re.split(r"(?<=[.?])\s|\n\n", text or "")[0].replace("\n", " ").strip()


def _below(path: Path, name: str) -> str:
    """The text below the assignment of a module's constant."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    after = next(
        (
            body[i + 1]
            for i, node in enumerate(body[:-1])
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in ast.unparse(node)[:60]
        ),
        None,
    )
    return str(getattr(getattr(after, "value", None), "value", ""))


def reference() -> str:
    """The docstring of every public name, with the table of its parameters."""
    import diagnostics

    return "\n\n".join(
        f"::: diagnostics.{home}.{name}"
        for home, names in diagnostics._HOMES.items()
        for name in names
    )


def on_config(config):
    """mkdocs: the order of the pages; those of docs/ that are not named here follow by name."""
    sys.path.insert(0, str(ROOT))  # mkdocs puts the path back after it has loaded its hooks
    from diagnostics.pipeline.registry import COMMANDS

    first = ["tutorial.md", "glossary.md", "commands.md", "statistics.md", "columns.md"]
    first += ["criteria.md"]
    first += ["the_paper.md", "python.md", "structure.md"]
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in first)
    config.nav = [
        {"Overview": "index.md"},
        {"Commands": [f"stages/{stage.name}.md" for stage in COMMANDS]},
        *first,
        {"Notebooks": [f"notebooks/{path.stem}.md" for path in sorted(NOTEBOOKS.glob("*.ipynb"))]},
        *others,
        "contributing.md",
    ]
    return config


def on_files(files, config):
    """mkdocs: add the pages that are made from the code."""
    from mkdocs.structure.files import File

    from diagnostics.pipeline.registry import COMMANDS

    made = {f"stages/{stage.name}.md": stage_page(stage.name) for stage in COMMANDS}
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    front = re.sub(r"\[([^]]*)\]\(reports/[^)]*\)", r"\1", front)  # no part of the site
    made["index.md"] = front.replace("](docs/", "](").replace(
        "](CONTRIBUTING.md)", "](contributing.md)"
    )
    made["contributing.md"] = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    )
    made |= {
        name: text
        for name, text in notebook_pages().items()
        if files.get_file_from_path(name) is None  # executed by scripts/notebooks.py
    }
    for path, content in {**made, **tutorial_figures()}.items():
        files.append(File.generated(config, path, content=content))
    return files


def notebook_pages() -> dict[str, str]:
    """A page for each notebook, of its prose and code alone."""
    import json

    found = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        parts = [
            "".join(cell["source"])
            if cell["cell_type"] == "markdown"
            else "```python\n" + "".join(cell["source"]) + "\n```"
            for cell in cells
        ]
        note = "*The outputs are not here: `python scripts/notebooks.py` adds them to this page.*"
        found[f"notebooks/{path.stem}.md"] = "\n\n".join([parts[0], note, *parts[1:]]) + "\n"
    return found


FIGURES = {
    "decision": "decision",
    "horizon_criteria": "horizon",
    "correlations": "correlations",
    "q3_contrast": "q3_contrast",
}
"""The tutorial's figures, each with the table that it draws."""


def tutorial_figures() -> dict[str, bytes]:
    """The tutorial's figures as PNG, by the path of the site, drawn from the committed study."""
    return {f"figures/{name}.png": drawn(name, FIGURES[name]) for name in FIGURES}


def drawn(figure: str, table: str) -> bytes:
    """A figure of the committed study as PNG."""
    import io

    import diagnostics as dx
    from diagnostics.core.tables import read_csv

    content = io.BytesIO()
    frame = read_csv(STUDY / "tables" / f"{table}.csv")
    getattr(dx.plot, figure)(frame).savefig(content, format="png", dpi=150, metadata={})
    return content.getvalue()


def on_page_markdown(markdown, page, config, files):
    """mkdocs: fill in the public names and their reference."""
    if page.file.src_uri != "python.md":
        return markdown
    return markdown.replace("{{ names }}", public_names()).replace("{{ reference }}", reference())


def main() -> int:
    """Write the files, or with `--check` name those that are behind the code."""
    if "--figures" in sys.argv:
        (ROOT / "docs" / "decision.png").write_bytes(drawn("decision", "decision"))
    wanted = pages()
    behind = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
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
        path.write_text(wanted[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
