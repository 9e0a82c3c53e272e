"""Print the figures of the code as a table: sizes, line widths, docstrings, annotations, imports.

    python scripts/measure_code.py            the table
    python scripts/measure_code.py --long     functions over its limits of lines and parameters
    python scripts/measure_code.py --missing  undocumented arguments of public functions

`CONTRIBUTING.md` holds the table as it was last taken. Nothing is imported but the standard library
and, for the arguments of public functions, the package's list of public names: files are parsed.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGE = ROOT / "diagnostics"
WIDTH = 100
"""Columns that a line may have: ruff's setting."""
LONG, MANY = 40, 7
"""Lines of code and parameters beyond which a function needs a reason."""
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
"""Tokens that make no line a line of code."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(folder: Path = PACKAGE) -> dict[str, ast.Module]:
    """The parsed modules below a folder, by dotted name."""
    return {
        _dotted(path): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of a module, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def public_functions(tree: ast.AST) -> Iterator[Function]:
    """Functions and methods of public names, outside functions and private classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)


def arguments(function: Function) -> list[ast.arg]:
    """The arguments of a function but for `self` and `cls`."""
    given = function.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def length(function: Function) -> int:
    """Lines of a function, its decorators left out and its docstring included."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold more than a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        line
        for token in tokens
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }


def code_length(function: Function, lines: set[int]) -> int:
    """Lines of code of a function, from its `def` on, without its docstring.

    Args:
        function: The function.
        lines: The lines of code of its module.
    """
    own = lines & set(range(function.lineno, (function.end_lineno or function.lineno) + 1))
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        own -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(own)


def long_functions() -> list[tuple[int, int, str]]:
    """Lines of code, parameters and place of every function, the longest first."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = code_lines(source)
        for function in functions(ast.parse(source)):
            place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            found.append((code_length(function, lines), len(arguments(function)), place))
    return sorted(found, reverse=True)


def share(part: int, whole: int) -> str:
    """`part` of `whole` in per cent."""
    return f"{100 * part / whole:.3g} % of {whole}" if whole else "none"


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """The package's modules that a module imports at its top level."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> int:
    """The number of modules that import themselves by way of others."""
    return sum(name in _reached(graph, name) for name in graph)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead.extend(graph[name])
    return seen


def undocumented_arguments() -> list[str]:
    """Arguments of the functions of `diagnostics.__all__` that their docstring's Args lacks."""
    import diagnostics

    missing = []
    for home, names in diagnostics._HOMES.items():
        path = PACKAGE / home.replace(".", "/")
        source = (
            path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        )
        body = ast.parse(source.read_text(encoding="utf-8")).body
        for node in body:
            if isinstance(node, Function) and node.name in names:
                described = _described(ast.get_docstring(node) or "")
                missing += [
                    f"{node.name}({arg.arg})" for arg in arguments(node) if arg.arg not in described
                ]
    return missing


def _described(docstring: str) -> set[str]:
    """Names under `Args:`; one line may name several, as `low, high: …`."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, flags=re.M)
    heads = re.findall(r"^    (\S[^:\n]*):", section[1], flags=re.M) if section else []
    return {name.strip(" *`") for head in heads for name in head.split(",")}


def _quantile(values: list[int], share_of: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share_of * len(values)))]


def rows() -> dict[str, str]:
    """Each figure by its name."""
    parsed = modules()
    graph = {name: imports(name, tree, set(parsed)) for name, tree in parsed.items()}
    every = [function for tree in parsed.values() for function in functions(tree)]
    public = [function for tree in parsed.values() for function in public_functions(tree)]
    given = [arg for function in every for arg in arguments(function)]
    lengths = [length(function) for function in every]
    counts = [len(arguments(function)) for function in every]
    lines = _lines(PACKAGE)
    top = [
        path
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    tops = [path for path in top if not path.name.startswith("__")]
    documented = sum(ast.get_docstring(function) is not None for function in public)
    return {
        "modules; lines": f"{len(parsed)}; {len(lines)}",
        "names at the top of the package": str(len(tops)),
        "modules in a circle of imports": str(circles(graph)),
        "functions": str(len(every)),
        "lines per function: median / 90 % / longest": (
            f"{statistics.median(lengths):.0f} / {_quantile(lengths, 0.9)} / {max(lengths)}"
        ),
        f"functions over {LONG} lines of code (docstring and comments not counted)": str(
            sum(length > LONG for length, _, _ in long_functions())
        ),
        "parameters per function: median / 90 % / most": (
            f"{statistics.median(counts):.0f} / {_quantile(counts, 0.9)} / {max(counts)}"
        ),
        f"functions over {MANY} parameters": str(sum(value > MANY for value in counts)),
        f"lines over {WIDTH} columns: package / tests": (
            f"{_wide(lines)} / {_wide(_lines(ROOT / 'tests'))}"
        ),
        "comment lines": share(sum(line.lstrip().startswith("#") for line in lines), len(lines)),
        "modules with a docstring": share(
            sum(ast.get_docstring(tree) is not None for tree in parsed.values()), len(parsed)
        ),
        "public functions with a docstring": share(documented, len(public)),
        "annotated arguments": share(sum(arg.annotation is not None for arg in given), len(given)),
        "annotated returns": share(sum(one.returns is not None for one in every), len(every)),
        "arguments of `dx` functions that Args lacks": str(len(undocumented_arguments())),
    }


def _lines(folder: Path) -> list[str]:
    return [
        line
        for path in sorted(folder.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def _wide(lines: list[str]) -> int:
    return sum(len(line) > WIDTH for line in lines)


def main() -> int:
    """Print the table, or a list of what is beyond its limits."""
    if "--long" in sys.argv:
        rows_of = [row for row in long_functions() if row[0] > LONG or row[1] > MANY]
        print(
            "\n".join(
                f"{length:4d} lines {count:3d} parameters  {place}"
                for length, count, place in rows_of
            )
        )
        return 0
    if "--missing" in sys.argv:
        print("\n".join(undocumented_arguments()))
        return 0
    print("| figure | value |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
