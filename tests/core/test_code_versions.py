"""Every module that a stage names as its code is one, so that a code version never stands for
nothing.
"""

import ast
from pathlib import Path

import pytest

import diagnostics
from diagnostics.core import fingerprints

PACKAGE = Path(diagnostics.__file__).parent


def named_modules() -> list[str]:
    """Names that the package gives as a stage's code, by its syntax trees."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_bytes())
        held = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "code":
                value = held.get(getattr(node.value, "id", ""), node.value)
                found += [each for each in ast.walk(value) if isinstance(each, ast.Constant)]
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if getattr(key, "value", None) == "code" and isinstance(value, ast.Tuple):
                        found += [each for each in value.elts if isinstance(each, ast.Constant)]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "code_version":
                found += [each for each in node.args if isinstance(each, ast.Constant)]
    return sorted({each.value for each in found if isinstance(each.value, str)})


def test_every_module_that_decides_numbers_is_there():
    names = named_modules()
    assert {"training.trl_trainer", "probing.intervention", "analysis.study"} <= set(names)
    for name in names:
        assert fingerprints.code_version(name)


def test_a_name_that_is_no_module_has_no_code_version():
    with pytest.raises(ValueError, match="trainer_of_old"):
        fingerprints.code_version("analysis.study", "trainer_of_old")


def test_modules_that_only_move_files_are_there():
    assert [name for name in fingerprints.PLUMBING if fingerprints._place(name) is None] == []
