import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(path):
    code = "\n".join(cells(path, "code")) + "\nprint('the end')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=path.parent,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout.endswith("the end\n"), done.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_store_no_outputs_and_use_the_public_api(path):
    assert not any(cell.get("outputs") for cell in json.loads(path.read_text())["cells"])
    imports = [
        line
        for source in cells(path, "code")
        for line in source.split("\n")
        if line.startswith(("import diag", "from diag"))
    ]
    assert imports == ["import diagnostics as dx"]
    assert len(cells(path, "markdown")) >= 3
