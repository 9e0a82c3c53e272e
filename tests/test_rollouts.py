import numpy as np
import pytest
import torch

from diagnostics.pairs import assemble
from diagnostics.rollouts import Chooser, rollout
from diagnostics.types import DiagnosticsError, Prompt
from tests.conftest import make_model, make_prompts, make_tokenizer


def test_same_seed_same_text(pair):
    first, second = (rollout(pair, make_prompts(6), max_new_tokens=10, seed=3) for _ in range(2))
    assert first == second != rollout(pair, make_prompts(6), max_new_tokens=10, seed=4)


def test_text_does_not_depend_on_the_batch(pair):
    together = rollout(pair, make_prompts(9), max_new_tokens=10)
    alone = rollout(pair, make_prompts(9), max_new_tokens=10, batch_tokens=1)
    assert together == alone


def test_samples_of_a_prompt_differ(pair):
    bank = rollout(pair, make_prompts(2), max_new_tokens=10, samples_per_prompt=3)
    assert [c.context_id for c in bank] == ["p0-0", "p0-1", "p0-2", "p1-0", "p1-1", "p1-2"]
    assert len({c.response_ids for c in bank}) == 6


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_responses_end_at_their_first_end_token(pad_is_eos):
    pair = assemble("tiny", make_model(1), make_model(2), make_tokenizer(pad_is_eos=pad_is_eos))
    with torch.no_grad():
        pair.student.model.lm_head.weight[1] += 0.15 * pair.student.model.lm_head.weight[4:].std()
    bank = rollout(pair, make_prompts(24), max_new_tokens=16)
    finished = [c for c in bank if c.finished]
    assert finished and len({len(c.response_ids) for c in finished}) > 1
    for context in bank:
        assert context.finished == (context.response_ids[-1] == 1)
        assert 1 not in context.response_ids[:-1]
        assert context.finished or len(context.response_ids) == 16


def test_chosen_tokens_follow_the_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3, 0.0]]))
    chooser = Chooser([np.random.default_rng(0)], 1.0, 1.0, 0, 4)
    counts = np.zeros(4)
    for _ in range(4000):
        counts[int(chooser(torch.zeros(1, 1, dtype=torch.long), logits).argmax())] += 1
    assert counts[3] == 0
    np.testing.assert_allclose(counts / 4000, [0.5, 0.2, 0.3, 0.0], atol=0.025)


@pytest.mark.parametrize("options, allowed", [((1.0, 1.0, 1), {0}), ((1.0, 0.6, 0), {0, 2}), ((0.01, 1.0, 0), {0}), ((1.0, 1.0, 0, 2), {0, 1})])
def test_sampling_settings_narrow_the_choice(options, allowed):
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.3]]))
    temperature, top_p, top_k, vocabulary = (*options, 3)[:4]
    chooser = Chooser([np.random.default_rng(0)], temperature, top_p, top_k, vocabulary)
    assert {int(chooser(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) for _ in range(200)} == allowed


def test_settings_and_prompts_that_cannot_be_used(pair):
    with pytest.raises(DiagnosticsError, match=r"^max_new_tokens=0, samples_per_prompt=1 and temperature=1\.0 must be positive\.$"):
        rollout(pair, make_prompts(1), max_new_tokens=0)
    silent = make_tokenizer()
    silent.backend_tokenizer.post_processor = None
    bare = assemble("tiny", make_model(1), make_model(2), silent)
    with pytest.raises(DiagnosticsError, match=r"^Prompt 'p' has no tokens \(''\)\. Remove it, or add a start token\.$"):
        rollout(bare, [Prompt("p", "")])
