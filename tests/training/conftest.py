"""A tiny pair and its prompts on disk, for the tests of training."""

import json

import pytest

from tests.conftest import make_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, pair = tmp_path_factory.mktemp("pair"), make_pair()
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(base / name)
        pair.tokenizer.save_pretrained(base / name)
    rows = [{"prompt": f"w{i} w{(7 * i) % 60}"} for i in range(16)]
    (base / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--student",
        str(base / "student"),
        "--teacher",
        str(base / "teacher"),
        "--device",
        "cpu",
        "--quiet",
    ], ["--prompts", str(base / "prompts.jsonl")]
