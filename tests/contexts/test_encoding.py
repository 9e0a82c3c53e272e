"""One tokenisation of prompts: every chat template's ids in sampling, evaluation, training and
imports.

The templates are the essential forms of the families they are named after, over a byte-level
tokenizer that holds their tokens, flagged special, and puts nothing, a start token, or start and
end around what it encodes."""

import json

import pytest
import torch

from diagnostics.contexts import generation, generation_settings, rollouts
from diagnostics.contexts.encoding import encode_prompt, special_ids, start_ids, uses_clock
from diagnostics.contexts.import_rollouts import read_rollouts
from diagnostics.contexts.prompts import PromptConfig, read_prompts
from diagnostics.contexts.rollouts import rollout
from diagnostics.core.errors import DiagnosticsError
from diagnostics.core.types import Prompt
from diagnostics.models import identity
from diagnostics.models.pair import PairConfig, assemble
from diagnostics.pipeline.stages.rollout import rollout_stage
from diagnostics.training.evaluation import evaluate
from diagnostics.training.run import EngineConfig, TrainConfig, _ids, train
from tests.conftest import make_model

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in"
    " messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b"
    " %Y') %}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string"
    " }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{"
    " m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt"
    " %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role =="
    " 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if"
    " add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
    " [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>\n{% endif %}"
)
QWEN_3 = (
    CHATML
    + "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false"
    " %}<think>\n\n</think>\n\n{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content"
    " }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt"
    " %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
BARE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}[go]{% endif %}"
)
FAMILIES = {
    "chatml": (CHATML, {}),
    "tools": (CHATML, {"tools": [{"type": "function", "function": {"name": "add"}}]}),
    "llama_3": (LLAMA_3, {}),
    "gemma": (GEMMA, {}),
    "mistral": (MISTRAL, {}),
    "phi": (PHI, {}),
    "qwen_3": (QWEN_3, {}),
    "no_thinking": (QWEN_3, {"enable_thinking": False}),
    "command_r": ({"default": COMMAND_R, "tool_use": "other"}, {}),
    "without_special_tokens": (BARE, {}),
}
FLAGGED = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
]
AROUND = {"nothing": "$A", "start": "<s> $A", "start_and_end": "<s> $A </s>", "end": "$A </s>"}


def make_tokenizer(template=None, around="$A"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["what is two and two"],
        trainers.BpeTrainer(
            vocab_size=0,
            special_tokens=["<s>", "</s>", *FLAGGED],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.chat_template = template
    return made


def make_pair(template=None, around="$A"):
    tokenizer = make_tokenizer(template, around)
    return assemble(
        "tiny", *(make_model(seed, vocabulary=len(tokenizer)) for seed in (1, 2)), tokenizer
    )


def expected(tokenizer, text, kwargs):
    return tuple(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **kwargs,
        )
    )


def prompt_file(path, count=3):
    path.write_text("".join(json.dumps({"prompt": f"what is {i}?"}) + "\n" for i in range(count)))
    return path


@pytest.fixture
def handed_over(monkeypatch):
    """The prompts' ids as `generate` got them."""
    seen, generate = [], generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda model, prompts, *rest, **more: (
            seen.extend(tuple(map(int, ids)) for ids in prompts),
            generate(model, prompts, *rest, **more),
        )[1],
    )
    return seen


@pytest.mark.parametrize("around", ["$A", "<s> $A </s>"], ids=["nothing", "start_and_end"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_sees_the_ids_of_the_template(family, around, tmp_path, handed_over):
    template, kwargs = FAMILIES[family]
    pair = make_pair(template, around)
    file = prompt_file(tmp_path / "p.jsonl")
    right = [expected(pair.tokenizer, f"what is {i}?", kwargs) for i in range(3)]
    prompts = read_prompts(file, tokenizer=pair.tokenizer, chat_template_kwargs=kwargs).prompts
    assert [
        context.prompt_ids for context in rollout(pair, prompts, max_new_tokens=2)
    ] == right and set(handed_over) == set(right)
    handed_over.clear()
    evaluate(pair, prompts, samples=1, max_new_tokens=2)
    assert set(handed_over) == set(right)
    assert [tuple(ids) for ids in _ids(pair, prompts, EngineConfig(max_new_tokens=2))] == right
    rows = tmp_path / "r.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"what is {i}?", "response": "four"}) + "\n" for i in range(3)
        )
    )
    assert [
        context.prompt_ids for context in read_rollouts(pair, rows, chat_template_kwargs=kwargs)
    ] == right


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "without_special_tokens"])
def test_text_that_a_template_rendered_elsewhere_has_the_same_ids(family, around):
    template, kwargs = FAMILIES[family]
    tokenizer = make_tokenizer(template, around)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "two?"}], tokenize=False, add_generation_prompt=True, **kwargs
    )
    assert (
        encode_prompt(tokenizer, text)
        == encode_prompt(tokenizer, text, rendered=True)
        == expected(tokenizer, "two?", kwargs)
    )


@pytest.mark.parametrize("family", ["llama_3", "without_special_tokens"])
def test_training_generates_after_the_ids_of_the_template(family, tmp_path, handed_over):
    template, kwargs = FAMILIES[family]
    pair = make_pair(template, "<s> $A </s>")
    prompts = read_prompts(
        prompt_file(tmp_path / "p.jsonl"), tokenizer=pair.tokenizer, chat_template_kwargs=kwargs
    ).prompts
    train(
        pair,
        prompts,
        output_dir=tmp_path / "out",
        config=TrainConfig(steps=1, batch=2, criterion="full"),
        engine=EngineConfig(max_new_tokens=2, save_every=0),
    )
    right = {expected(pair.tokenizer, f"what is {i}?", kwargs) for i in range(3)}
    assert len(handed_over) == 2 and set(handed_over) <= right


@pytest.mark.parametrize(
    "around, start",
    [
        ("$A", ()),
        ("<s> $A", (0,)),
        ("<s> $A </s>", (0,)),
        ("$A </s>", ()),
        ("<s> <|im_start|> $A", (0, 2)),
    ],
)
def test_plain_text_keeps_the_start_and_never_an_end(around, start):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", 0), ("</s>", 1), ("<|im_start|>", 2)]
    )
    bare = tuple(tokenizer("two and two", add_special_tokens=False)["input_ids"])
    assert start_ids(tokenizer) == start and encode_prompt(tokenizer, "two and two") == start + bare
    assert encode_prompt(tokenizer, "") == start and encode_prompt(tokenizer, "two</s>")[-1] == 1


def test_special_is_what_decoding_leaves_out():
    tokenizer = make_tokenizer()
    named = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>")}
    assert (
        set(tokenizer.all_special_ids)
        == named
        < special_ids(tokenizer)
        == set(range(2 + len(FLAGGED)))
    )
    assert all(
        tokenizer.decode([i], skip_special_tokens=True) == "" for i in special_ids(tokenizer)
    )


# --- ids of prompts, and the clock
# ----------------------------------------------------------------------


class Clock:
    """The day that the template's clock shows."""

    day = 1

    @classmethod
    def now(cls):
        import datetime

        return datetime.datetime(2026, 5, cls.day)


@pytest.fixture
def clock(monkeypatch):
    import transformers.utils.chat_template_utils as library

    monkeypatch.setattr(library, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", 1)
    return Clock


def test_ids_of_prompts_hang_neither_on_the_template_nor_on_the_day(tmp_path, clock):
    file = prompt_file(tmp_path / "p.jsonl")
    found = [
        read_prompts(file, tokenizer=make_tokenizer(template)).prompts
        for template in (None, CHATML, LLAMA_3)
    ]
    clock.day = 2
    found.append(read_prompts(file, tokenizer=make_tokenizer(LLAMA_3)).prompts)
    assert len({tuple(prompt.prompt_id for prompt in prompts) for prompts in found}) == 1
    assert "01 May" in found[2][0].prompt and "02 May" in found[3][0].prompt


def test_messages_have_one_id_whoever_wrote_them(tmp_path):
    import pandas as pd

    rows = [
        {"messages": [{"role": "user", "content": "two?"}]},
        {"messages": [{"role": "user", "content": "two?", "name": "ann"}]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_parquet(
        tmp_path / "p.parquet"
    )  # which gives the first message an empty name
    names = "{% for m in messages %}{{ m.name | default('', true) }}: {{ m.content }}{% endfor %}"
    first, second = (
        [
            p.prompt_id
            for p in read_prompts(tmp_path / name, tokenizer=make_tokenizer(names)).prompts
        ]
        for name in ("p.jsonl", "p.parquet")
    )
    assert first == second and len(set(first)) == 2


def test_a_clock_in_the_template_is_found_where_it_is_asked():
    assert uses_clock(make_tokenizer(LLAMA_3)) and not uses_clock(
        make_tokenizer(LLAMA_3), {"date_string": "26 Jul 2024"}
    )
    assert (
        not uses_clock(make_tokenizer(CHATML))
        and not uses_clock(make_tokenizer())
        and not uses_clock(make_tokenizer("{{ raise_exception('no') }}"))
    )


@pytest.fixture
def folders(tmp_path, clock):
    pair = make_pair(LLAMA_3)
    for name, readout in (("student", pair.student), ("teacher", pair.teacher)):
        readout.model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    return PairConfig(student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))


def _roll(directory, config, file):
    from diagnostics.pipeline.run import open_run

    with open_run(directory) as run:
        rollout_stage(
            run,
            identity.Models(config),
            PromptConfig(prompts=str(file)),
            rollouts.RolloutConfig(max_new_tokens=8, batch_tokens=1),
        )


def test_a_rollout_resumed_the_next_day_mixes_nothing(
    tmp_path, folders, clock, monkeypatch, caplog
):
    from diagnostics.core import progress as run_directory
    from diagnostics.core.types import read_bank

    monkeypatch.setattr(run_directory, "SHARD_SECONDS", 0)
    file, generate, calls = prompt_file(tmp_path / "p.jsonl", 4), generation.generate, []
    monkeypatch.setattr(
        generation,
        "generate",
        lambda *a, **k: calls.append(1) or (generate(*a, **k) if len(calls) < 3 else 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        _roll(tmp_path / "resumed", folders, file)
    monkeypatch.setattr(generation, "generate", generate)
    assert "the chat template writes the date of the day" in caplog.text
    clock.day = 2
    _roll(tmp_path / "resumed", folders, file)
    _roll(tmp_path / "next_day", folders, file)
    assert "was interrupted when the prompts were rendered otherwise" in caplog.text
    resumed, whole = (
        read_bank(tmp_path / name / "contexts.parquet") for name in ("resumed", "next_day")
    )
    assert resumed == whole and all("02 May" in context.prompt for context in resumed)


def test_a_rollout_resumed_the_same_day_goes_on(tmp_path, folders, clock, monkeypatch):
    from diagnostics.core import progress as run_directory

    monkeypatch.setattr(run_directory, "SHARD_SECONDS", 0)
    file, generate, calls = prompt_file(tmp_path / "p.jsonl", 4), generation.generate, []
    monkeypatch.setattr(
        generation,
        "generate",
        lambda *a, **k: calls.append(1) or (generate(*a, **k) if len(calls) != 3 else 1 / 0),
    )
    with pytest.raises(ZeroDivisionError):
        _roll(tmp_path / "resumed", folders, file)
    _roll(tmp_path / "resumed", folders, file)
    assert len(calls) == 5  # four batches, one of them twice


def test_rerun_says_that_the_prompts_were_rendered_otherwise(caplog):
    from diagnostics.pipeline.reproduce import compared

    was, now = (
        {
            "versions": {},
            "stages": {
                "rollout": {
                    "files": {"contexts.parquet": sha},
                    "facts": {"rendered_prompts_sha256": sha},
                }
            },
        }
        for sha in "ab"
    )
    assert (
        not compared(was, now).same.any()
        and "stage rollout read other prompts: they were rendered otherwise then (sha256 a, now b)"
        in caplog.text
    )
    caplog.clear()
    assert compared(was, was).same.all() and not caplog.text


# --- what cannot be sampled
# ----------------------------------------------------------------------------


def test_a_token_beyond_a_vocabulary_is_refused_by_name_before_sampling(handed_over):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    extra = len(tokenizer) - 1
    small, large = (
        make_model(seed, vocabulary=size) for seed, size in ((1, extra), (2, extra + 1))
    )
    for student, teacher, whose in ((small, small, "student's"), (large, small, "teacher's")):
        with pytest.raises(
            DiagnosticsError,
            match=(
                rf"^Prompt 'p' holds the token '<think>' with id {extra}, and the {whose}"
                rf" vocabulary ends before it: {extra} ids"
            ),
        ):
            rollout(
                assemble("tiny", student, teacher, tokenizer),
                [Prompt("p", "<think>")],
                max_new_tokens=2,
            )
    pair = assemble("tiny", small, small, tokenizer)
    for prompt in (Prompt("p", "two", teacher_prompt="<think>"),):
        with pytest.raises(DiagnosticsError, match="holds the token '<think>'"):
            rollout(pair, [prompt], max_new_tokens=2)
    with pytest.raises(DiagnosticsError, match="holds the token '<think>'"):
        _ids(pair, [Prompt("p", "<think>")], EngineConfig(max_new_tokens=2))
    assert not handed_over


def test_no_room_for_a_response_names_window_and_flag(tmp_path, folders):
    from diagnostics.pipeline.run import open_run

    file = prompt_file(tmp_path / "p.jsonl")
    with open_run(tmp_path / "out") as run:
        with pytest.raises(
            DiagnosticsError,
            match=(
                r"^The models' window of 256 tokens leaves no room for a prompt beside a response"
                r" of --max-new-tokens 256\."
            ),
        ):
            rollout_stage(
                run,
                identity.Models(folders),
                PromptConfig(prompts=str(file)),
                rollouts.RolloutConfig(max_new_tokens=256),
            )
        with pytest.raises(
            DiagnosticsError,
            match=(
                r"holds 0 usable prompts \(3 are longer than 6 tokens\)\. Add"
                r" prompts, lower --contexts or --max-new"
            ),
        ):
            rollout_stage(
                run,
                identity.Models(folders),
                PromptConfig(prompts=str(file)),
                rollouts.RolloutConfig(max_new_tokens=250),
            )
    with pytest.raises(
        DiagnosticsError,
        match=(
            r"^Prompt 'p' has 3 tokens, and with --max-new-tokens 254 that is more than the models'"
            r" window of 256\."
        ),
    ):
        rollout(make_pair(), [Prompt("p", "two")], max_new_tokens=254)


def test_a_turn_end_that_ends_no_response_is_named_and_counted(caplog):
    pair = make_pair(CHATML)
    with torch.no_grad():
        pair.student.model.lm_head.weight *= 0.1  # so that every token is drawn now and then
    end = pair.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation_settings.unlisted_turn_end(pair) == end
    bank = rollout(pair, [Prompt(f"p{i}", "two") for i in range(20)], max_new_tokens=40)
    after = [
        len(c.response_ids) - 1 - c.response_ids.index(end) for c in bank if end in c.response_ids
    ]
    assert sum(after) and generation_settings.positions_after_turn_end(pair, bank) == {
        "token": "<|im_end|>",
        "id": end,
        "responses": sum(n > 0 for n in after),
        "positions": sum(after),
    }
    assert (
        f"ends a turn with '<|im_end|>', which does not end a response: add its id {end} to"
        " eos_token_id" in caplog.text
    )
    assert (
        f"{sum(after)} of {bank.positions} positions come after a '<|im_end|>' (id {end}) that"
        " ended the turn" in caplog.text
    )
    pair.student.model.generation_config.eos_token_id = [1, end]
    caplog.clear()
    assert (
        generation_settings.unlisted_turn_end(pair) is None
        and generation_settings.positions_after_turn_end(
            pair, rollout(pair, [Prompt("p", "two")], max_new_tokens=20)
        )
        == {}
        and not caplog.text
    )


@pytest.mark.parametrize(
    "template",
    [
        None,
        MISTRAL,
        BARE,
        GEMMA.replace("<end_of_turn>", "</s>"),
        "{{ raise_exception('no') }}",
        "{{ messages[0].content }}",
    ],
)
def test_templates_whose_turns_end_well_or_not_at_all(template):
    assert generation_settings.unlisted_turn_end(make_pair(template)) is None


def test_no_token_that_can_end_a_response_is_said(caplog):
    pair = make_pair()
    pair.tokenizer.eos_token = "<|end|>"
    pair.student.model.generation_config.eos_token_id = None
    pair.student.vocabulary = pair.tokenizer.eos_token_id
    bank = rollout(pair, [Prompt("p", "<s>")], max_new_tokens=5)
    assert not bank[0].finished and "no token that ends a response is among the" in caplog.text


def test_is_special_follows_the_flags():
    from diagnostics.core.types import Bank, Context
    from diagnostics.probing.scores import score

    pair = make_pair()
    bank = Bank(
        (
            Context(
                "c",
                "p",
                "a",
                (0, 40),
                "",
                (41, pair.tokenizer.convert_tokens_to_ids("<|im_end|>")),
                True,
            ),
        )
    )
    with torch.no_grad():
        assert score(pair, bank, sweep=()).is_special.tolist() == [False, True]
