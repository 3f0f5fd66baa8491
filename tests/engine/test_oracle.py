"""What stays, and what is answered, against an independent eager implementation."""

import pytest
import torch
from oracle import Oracle

from vllm_avl.backend import compaction
from vllm_avl.testing.engine import Ask, picture

ASKS = [
    Ask((1,), "What is it?", 24),
    Ask((2, 3), "Compare the two pictures in a long and winding question.", 24),
    Ask((4, 5, 6), "?", 24, prefix="A system prompt before everything. "),
]


@pytest.fixture(scope="module")
def oracle(checkpoints):
    return Oracle(checkpoints("llava"))


@pytest.fixture
def evictions(monkeypatch):
    """Records (plan, kept vision positions) of every layer's eviction, in order."""
    seen = []
    original = compaction.moves

    def moves(plan, vision_rows, scores):
        source, target = original(plan, vision_rows, scores)
        vision = set(vision_rows.tolist())
        slots = dict(zip(target.tolist(), source.tolist(), strict=True))
        full = plan.num_full_blocks * plan.block_size
        tail = range(plan.num_freed_tokens, full)
        seen.append((plan, {slots.get(slot, slot) for slot in tail} & vision))
        return source, target

    monkeypatch.setattr(compaction, "moves", moves)
    return seen


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("ratio", [0.7, 0.3, 0.05])
def test_kept_tokens_and_logits(engines, oracle, evictions, ratio, window):
    engine = engines(avl={"vision_store_ratio": ratio, "observation_window": window})
    for ask in ASKS:
        evictions.clear()
        engine.llm.reset_prefix_cache()
        prompt = engine.prompt(ask)
        (output,) = engine.llm.generate(prompt, ask.params(logprobs=5), use_tqdm=False)
        plan = evictions[0][0]
        expected = oracle.answer(
            prompt["prompt"],
            [picture(seed) for seed in ask.images],
            plan.num_full_blocks * plan.block_size,
            plan.num_stored_vision,
            ask.max_tokens,
            plan.num_scoring_rows,
        )
        assert len(evictions) == len(expected.kept)
        for (_, kept), theirs, score in zip(
            evictions, expected.kept, expected.scores, strict=True
        ):
            assert_same_up_to_ties(kept, theirs, score)
        completion = output.outputs[0]
        assert list(completion.token_ids) == expected.tokens
        for ours, theirs in zip(completion.logprobs, expected.logprobs, strict=True):
            for token, logprob in ours.items():
                assert logprob.logprob == pytest.approx(theirs[token].item(), abs=2e-4)


def assert_same_up_to_ties(ours, theirs, score):
    """Tokens that differ must have scores that fp32 cannot tell apart."""
    assert len(ours) == len(theirs)
    differing = torch.tensor(sorted(ours ^ theirs), dtype=torch.long)
    if len(differing):
        values = score[differing]
        assert values.max() - values.min() <= 1e-5 * score.max()
