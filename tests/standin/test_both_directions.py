"""Gemma 3 on vLLM's CUDA code path: pictures that are seen in both directions.

vLLM's CPU build has no such mask, so what is right is what Hugging Face's model says.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.masking_utils import eager_mask

from benchmarks.testing import models
from standin import checkpoint
from standin.asks import BUDGET, ON_TRITON, ask, check_orders
from standin.process import generate

STOCK = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"
FULL_LAYER, NUM_KV_HEADS = 2, 2
NUM_TOKENS = 3
REQUESTS = [
    {**one, "family": "gemma3"}
    for one in (
        ask(1, max_tokens=NUM_TOKENS),
        ask(1, max_tokens=NUM_TOKENS, avl=0),
        # Its window of 32 tokens would reach into the picture.
        ask(3, text="?", max_tokens=NUM_TOKENS, avl_policy="snapkv"),
    )
]
LLM = {
    "block_size": 16,
    "max_model_len": 320,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 2},
    # A picture of which a chunk has computed a part has not been seen to its end.
    "disable_chunked_mm_input": True,
    "enable_prefix_caching": True,
}
ORDERS = [[[1], [0], [1]]]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return checkpoint.build_gemma3(tmp_path_factory.mktemp("standin") / "gemma3")


@dataclass
class Followed:
    """What Hugging Face's model says of an answer."""

    logprobs: list
    scores: torch.Tensor
    """[num_prompt_tokens] attention in the layer with full attention."""
    is_vision: list


class Eager:
    """Hugging Face's model, whose answers do not see what was evicted."""

    def __init__(self, folder):
        AttentionInterface.register("evicting", self._attend)
        AttentionMaskInterface.register("evicting", eager_mask)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder,
            attn_implementation={"text_config": "evicting", "vision_config": "eager"},
            dtype=torch.float32,
        ).eval()

    @torch.no_grad()
    def follow(self, request, tokens, evicted, num_scoring):
        pictures = [
            models.random_image(seed, width=112, height=112)
            for seed in request["images"]
        ]
        text = models.image_prompt("gemma3", len(pictures), request["text"])
        inputs = self.processor(
            text=text, images=pictures, return_tensors="pt", add_special_tokens=False
        )
        ids = inputs["input_ids"][0]
        self.evicted, self.num_scoring, self.scores = [], num_scoring, None
        output = self.model(**inputs, use_cache=True)
        scores, self.evicted = self.scores, evicted
        logprobs = []
        for token in tokens:
            logprobs.append(output.logits[0, -1].log_softmax(-1)[token].item())
            output = self.model(
                input_ids=torch.tensor([[token]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        is_vision = ids == self.model.config.image_token_id
        return Followed(logprobs, scores, is_vision.tolist())

    def _attend(self, module, query, key, value, mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        keys, values = (x[0].repeat_interleave(group, 0) for x in (key, value))
        logits = query[0] @ keys.transpose(1, 2) * scaling
        if mask is not None:
            logits = logits + mask[0, :, :, : keys.shape[1]]
        if module.layer_idx == FULL_LAYER:
            for head, positions in enumerate(self.evicted):
                first = head * group if len(self.evicted) > 1 else 0
                last = first + group if len(self.evicted) > 1 else None
                logits[first:last, :, positions] = -torch.inf
        attention = logits.softmax(-1)
        if module.layer_idx == FULL_LAYER and self.scores is None:
            self.scores = attention[:, -self.num_scoring :].sum((0, 1))
        return (attention @ values).transpose(0, 1).unsqueeze(0), None


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_what_is_kept_and_said_is_what_an_eager_model_says(gemma, runner):
    options = ("--runner", runner, "--logprobs", "--kept")
    avl = {"store_ratio": 0.5, "introspection": 8}
    spec = {"requests": REQUESTS, "orders": ORDERS}
    spec["llm"] = LLM | {"additional_config": {"avl": avl}}
    report = generate(gemma, spec, *options, "--backend", "AVL")
    assert report["ran"]["backend"] == f"{STOCK}, {ON_TRITON}"
    eager, kept = Eager(gemma), dict(zip((0, 2), report["kept"], strict=True))
    stock = {"num_scoring": 1, "evicted": [[[]]]}
    for index, request in enumerate(REQUESTS):
        of_request = kept.get(index, stock)
        (gone,) = of_request["evicted"]
        tokens = report["tokens"][index]
        said = eager.follow(request, tokens, gone, of_request["num_scoring"])
        assert report["logprobs"][index] == pytest.approx(said.logprobs, abs=BUDGET)
        num_behind = len(said.is_vision) - 1 - max(np.flatnonzero(said.is_vision))
        assert of_request["num_scoring"] < num_behind
        if request["xargs"].get("avl_policy", "avl") == "avl" and gone[0]:
            check_choice(gone[0], said)
    assert len(kept[0]["evicted"][0][0]) >= 32
    assert len(set(map(tuple, kept[2]["evicted"][0]))) == NUM_KV_HEADS
    assert report["logprobs"][0] != pytest.approx(report["logprobs"][1], abs=0.01)
    check_orders(report, report["tokens"], ORDERS)
    hits = report["orders"][0]["hits"]
    assert hits[0] == 0 < min(hits[1:])


def check_choice(gone, said):
    """Assert that no vision token that is gone was attended to more than one kept."""
    assert all(said.is_vision[position] for position in gone)
    kept = [
        position
        for position in range(len(said.is_vision) // 16 * 16)
        if said.is_vision[position] and position not in gone
    ]
    assert said.scores[gone].max() <= said.scores[kept].min() * (1 + 1e-5)
