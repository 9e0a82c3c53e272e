"""Tiny random models over one word-level tokenizer: real architectures, milliseconds a forward."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from diagnostics.core import progress
from diagnostics.core.types import Bank, Context, Prompt

torch.set_num_threads(1)  # models this small lose time to a second thread


LONG = (
    "test_notebooks.py",
    "test_faults.py",
    "test_answered_run.py",
    "test_paper_stage.py",
    "test_packaging.py",
    "test_readme.py",
    "test_public_names.py",
    "test_grid.py",
    "test_run.py",
    "test_fused.py",
    "test_fsdp.py",
    "test_fuzz.py",
    "test_selectors.py",
    "test_paper_page.py",
    "test_distributed.py",
    "test_memory.py",
    "test_directions.py",
    "test_trl_trainer.py",
    "test_page.py",
    "test_topk_teacher.py",
    "test_divergences.py",
    "test_figures.py",
    "test_losses.py",
    "test_reproduce.py",
    "test_stages.py",
    "test_intervention.py",
    "test_sharding.py",
)
"""Files that take longest. They come first, so that no process waits for another's at the end."""


def pytest_collection_modifyitems(items):
    """Begin with the longest files; each file's tests keep their order."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True, scope="session")
def notes_of_places_apart(tmp_path_factory):
    """No test reads or writes the user's own notes of where models lie."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    yield
    os.environ.pop("XDG_STATE_HOME")
    if before is not None:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(autouse=True, scope="session")
def pages_in_outline():
    """Pages have their figures in outline, and a run has no second process, where no test asks for
    more.
    """
    from tests import outlines

    with outlines.instead({**outlines.OUTLINES, **outlines.ALONE}):
        yield


@pytest.fixture(autouse=True)
def only_warnings_are_logged():
    """A test begins with warnings alone being logged, whatever a command line before it asked
    for.
    """
    logging.getLogger().setLevel(logging.WARNING)


WORDS = [f"w{i}" for i in range(60)]


def make_tokenizer(words=WORDS, *, pad_is_eos: bool = False):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if pad_is_eos else "<pad>",
    )


def make_model(seed: int, *, vocabulary: int = 64, hidden: int = 32, layers: int = 2, **options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
        **options,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    torch.random.set_rng_state(state)
    return model


def make_pair(student_seed: int = 1, teacher_seed: int = 2, **options):
    from diagnostics.models.pair import assemble

    return assemble(
        "tiny",
        make_model(student_seed, **options),
        make_model(teacher_seed, hidden=48, **options),
        make_tokenizer(),
    )


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"p{i}", " ".join(WORDS[(7 * i + j) % 60] for j in range(2 + i % 5)))
        for i in range(count)
    ]


def make_bank(lengths, *, prompt_lengths=None, seed: int = 0) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    contexts = []
    for i, length in enumerate(lengths):
        prompt_length = prompt_lengths[i] if prompt_lengths else 2 + i % 4
        drawn = torch.randint(4, 64, (prompt_length,), generator=generator).tolist()
        prompt = [0, *drawn]
        response = torch.randint(4, 64, (length,), generator=generator).tolist()
        contexts.append(
            Context(f"c{i}", f"p{i}", "prompt", tuple(prompt), "response", tuple(response), False)
        )
    return Bank(tuple(contexts))


@pytest.fixture(scope="session")
def pair():
    return make_pair()


@pytest.fixture
def bank():
    return make_bank([5, 9, 1, 7, 12, 4])


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny pair and a prompt file on disk, and the flags that name them."""
    base = tmp_path_factory.mktemp("pair")
    pair = make_pair()
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(base / name)
        pair.tokenizer.save_pretrained(base / name)
    rows = [{"prompt": f"w{i} w{(7 * i) % 60} w{(11 * i) % 60}"} for i in range(30)]
    (base / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "--student",
        str(base / "student"),
        "--teacher",
        str(base / "teacher"),
        "--prompts",
        str(base / "prompts.jsonl"),
        "--contexts",
        "20",
        "--max-new-tokens",
        "10",
        "--draws",
        "50",
        "--folds",
        "2",
        "--device",
        "cpu",
        "--quiet",
        "--quick",
    ]


@pytest.fixture(scope="session")
def finished(folders, tmp_path_factory):
    """A finished run, its page in outline whichever test asks for it first."""
    directory = tmp_path_factory.mktemp("run") / "out"
    from diagnostics.pipeline.cli import main
    from tests import outlines

    with outlines.instead({**outlines.OUTLINES, **outlines.ALONE}):
        assert main(["run", *folders, "--output-dir", str(directory)]) == 0
    return directory


@pytest.fixture
def registry(monkeypatch):
    """A registry that forgets what a test adds, and the files that it came from."""
    from diagnostics import criteria

    monkeypatch.setattr(criteria, "_REGISTRY", dict(criteria._REGISTRY))
    monkeypatch.setattr(criteria, "_ALIASES", dict(criteria._ALIASES))
    monkeypatch.setattr(criteria, "_MODULES", {})
    monkeypatch.setenv(criteria.MODULES_VARIABLE, "")


@pytest.fixture
def elsewhere(tmp_path):
    for name in ("analyze-0123456789abcdef/data", "notes.txt", ".lock"):
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / name).write_bytes(b"precious")
    return tmp_path / "elsewhere"


@pytest.fixture
def at_once(monkeypatch):
    """Every batch is written when it is done."""
    monkeypatch.setattr(progress, "SHARD_SECONDS", 0.0)
