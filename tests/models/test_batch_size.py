"""How many tokens go into a forward pass: asked for, fixed on the CPU, or what memory holds."""

from types import SimpleNamespace

import pytest
import torch

from diagnostics.models import batch_size
from diagnostics.models.batch_size import choose, fitting, token_bytes
from tests.conftest import make_model

SMALL = SimpleNamespace(
    hidden_size=10,
    intermediate_size=30,
    num_hidden_layers=4,
    num_attention_heads=5,
    num_key_value_heads=2,
    head_dim=3,
    vocab_size=1000,
)


def model(dtype=torch.bfloat16, **changes):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**vars(SMALL) | changes))
    return SimpleNamespace(config=config, dtype=dtype)


def test_what_is_asked_for_is_taken():
    assert choose(60, [make_model(1)]) == 60


def test_on_the_cpu_it_is_the_same_for_every_small_model_and_use():
    found = {choose(None, [make_model(1)], use=use) for use in ("score", "sample", "gradient")}
    assert found == {batch_size.BATCH_TOKENS} == {8192} and choose(None, []) == 8192


def test_on_the_cpu_the_gradient_of_a_large_student_has_smaller_batches(monkeypatch):
    """24 layers of 896 and 4,864 in float32 keep 3.37 MB per token: 318 tokens in 1 GiB."""
    monkeypatch.setattr(batch_size, "_free", lambda model: None)
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    large = model(torch.float32, **sizes)
    assert token_bytes(large, use="gradient") == 4 * 24 * (12 * 896 + 5 * 4864) == 3_366_912
    assert (1 << 30) // 3_366_912 == 318 and choose(None, [large], use="gradient") == 256
    assert choose(None, [large], use="score") == choose(None, [large], use="sample") == 8192
    assert choose(None, [model(torch.float32, num_hidden_layers=10**8)], use="gradient") == 1


def test_estimates_by_hand():
    """Elements times two bytes; a row's distribution is 40 bytes per id, over its tokens."""
    widest = 2 * (8 * 10 + 4 * 30)
    cache = 2 * 2 * 4 * (2 * 3)
    assert token_bytes(model(), use="score") == widest == 400
    assert token_bytes(model(), use="sample", row_tokens=100) == widest + cache + 400.0
    assert token_bytes(model(), use="gradient") == 2 * 4 * (12 * 10 + 5 * 30)
    assert token_bytes(model(torch.float32), use="score") == 800


def test_what_a_configuration_leaves_out_is_inferred():
    """Without grouped keys every head has its own, of the hidden size's share."""
    plain = model(num_key_value_heads=None, head_dim=None, intermediate_size=None)
    assert token_bytes(plain, use="score") == 2 * (8 * 10 + 4 * 40)
    assert token_bytes(plain, use="sample", row_tokens=10**9) == pytest.approx(
        480 + 2 * 2 * 4 * 10, rel=1e-3
    )


@pytest.mark.parametrize(
    "free, needed, tokens",
    [
        (80_000_000_000, 1_000_000, 32_768),  # half is 40,000 tokens
        (81_920 * 100, 100, 32_768),  # exactly 40,960
        (65_536 * 200, 100, 65_536),  # exactly a power of two
        (10**6, 10**6, batch_size.LEAST),
        (10**15, 1, batch_size.MOST),
    ],
)
def test_half_of_the_free_memory_in_powers_of_two(free, needed, tokens):
    assert fitting(free, needed) == tokens


def test_the_fuller_card_and_the_wider_model_decide(monkeypatch):
    small, large = model(), model(hidden_size=1000)
    monkeypatch.setattr(batch_size, "_free", lambda m: 10**9 if m is small else 4 * 10**8)
    needed = token_bytes(large, use="score")
    assert choose(None, [small, large]) == fitting(4 * 10**8, needed)


def test_a_model_off_the_card_does_not_count_as_full(monkeypatch):
    """The teacher that waits in main memory says nothing of the card."""
    here, away = model(), model()
    monkeypatch.setattr(batch_size, "_free", lambda m: 10**9 if m is here else None)
    assert choose(None, [here, away]) == fitting(10**9, 400)
