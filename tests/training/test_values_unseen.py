"""A value that may be a token is not repeated by an error, nor taken where nobody reads it."""

import json

import pytest

from diagnostics.core.errors import DiagnosticsError
from diagnostics.training import engine_options

TOKEN = "hf_a_token_of_somebody"


@pytest.mark.parametrize("name", sorted(engine_options.TRL_FIELDS))
def test_a_text_in_place_of_another_type_is_not_shown(name):
    hint = engine_options._hints()[name]
    if engine_options.fits(hint, TOKEN):
        pytest.skip("a field of text")
    for flag, read in (("--trl", engine_options.trl_fields),):
        with pytest.raises(DiagnosticsError) as said:
            read(json.dumps({name: TOKEN}))
        assert TOKEN not in str(said.value) and flag in str(said.value)


@pytest.mark.parametrize("name", sorted(engine_options.PEFT_FIELDS))
@pytest.mark.parametrize("value", [TOKEN, [TOKEN], {"a": TOKEN}])
def test_values_for_an_adapter_are_not_shown_either(name, value):
    said = ""
    try:
        engine_options.peft_fields(json.dumps({name: value}))
    except DiagnosticsError as error:
        said = str(error)
    assert TOKEN not in said


@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "lr_scheduler_kwargs"])
def test_a_text_is_no_object(name):
    with pytest.raises(DiagnosticsError, match="an object"):
        engine_options.trl_fields(json.dumps({name: "{}"}))


@pytest.mark.parametrize("count", [-1, 65, 10**6])
def test_processes_that_read_prompts_are_bounded(count):
    with pytest.raises(DiagnosticsError, match="0 to 64 processes"):
        engine_options.trl_fields(json.dumps({"dataloader_num_workers": count}))
    assert engine_options.trl_fields('{"dataloader_num_workers": 2}')
