"""What is stored, read and answered, against an independent eager implementation.

Every request is served among others with other settings, in chunks smaller than a
picture, cold and again over its own prefix.
"""

import pytest
from following import ask, compare, watch
from oracle import Oracle

from vllm_avl import plan as plans


def grid(**server):
    """Requests of one batch; they differ in S, C, K, T, policy and pictures."""
    return [
        ask("one", store_ratio=0.5, core_ratio=0.3, refresh_interval=3, **server),
        ask("two", store_ratio=0.3, core_ratio=0.1, refresh_interval=8, **server),
        ask("three", store_ratio=0.7, core_ratio=0.2, refresh_interval=2, **server),
        ask("two", store_ratio=1, core_ratio=0.3, refresh_interval=3, **server),
        ask("one", store_ratio=0.3, refresh_interval=0, **server),
        ask("three", store_ratio=0.05, core_ratio=0.05, **server),
    ]


BATCHES = {
    "avl": ({}, grid()),
    "avl-text": ({}, grid(text_keep_ratio=0.3)),
    "avl-text-half-without-vision": (
        {},
        [
            ask("two", store_ratio=1, text_keep_ratio=0.5),
            ask("one", store_ratio=1, refresh_interval=0, text_keep_ratio=0.2),
            ask("two", store_ratio=0.4, refresh_interval=100, text_keep_ratio=0.2),
        ],
    ),
    "avl-max-window-8": (
        {"head_reduction": "max", "observation_window": 8},
        grid(text_keep_ratio=0.6),
    ),
    **{name: ({}, grid(policy=name)) for name in ("fastv", "random", "streaming")},
    **{name: ({}, grid(policy=name)) for name in ("h2o", "snapkv")},
    **{name: ({}, grid(policy=name)) for name in ("keydiff", "mixkv")},
    "mixkv-max": ({"head_reduction": "max"}, grid(policy="mixkv")),
    "h2o-text": ({}, grid(policy="h2o", text_keep_ratio=0.3)),
    "mixed": (
        {},
        [
            ask("one", store_ratio=0.5, core_ratio=0.3, policy="avl"),
            ask("one", store_ratio=0.5, core_ratio=0.3, policy="h2o"),
            ask("one", store_ratio=0.5, core_ratio=0.3, policy="fastv"),
            ask("one", store_ratio=0.5, core_ratio=0.3, text_keep_ratio=0.4),
            ask("two", policy="full"),
        ],
    ),
}
WINDOWS = {"avl-text-half-without-vision": {"HEAVY_RATIO": 0.4, "MIN_TOKENS": 5}}
"""Of aged text, where other than the method's."""
CASES = [
    *[pytest.param("llava", name, id=f"llava-{name}") for name in BATCHES],
    *[
        pytest.param("qwen2_5_vl", name, id=f"qwen2_5_vl-{name}")
        for name in ("avl", "avl-text", "h2o")
    ],
]


@pytest.fixture(scope="module")
def oracles(checkpoints):
    made = {}

    def oracle(architecture):
        if architecture not in made:
            made[architecture] = Oracle(checkpoints(architecture))
        return made[architecture]

    return oracle


@pytest.mark.parametrize(("architecture", "batch"), CASES)
def test_stored_core_and_logits(engines, oracles, architecture, batch, monkeypatch):
    settings, asks = BATCHES[batch]
    for name, value in WINDOWS.get(batch, {}).items():
        monkeypatch.setattr(plans, f"TEXT_{name}", value)
    engine = engines(
        architecture,
        avl=settings | {"introspection": 16},
        max_num_batched_tokens=400,
        kv_cache_memory_bytes=256 << 20,
        limit_mm_per_prompt={"image": 3},
    )
    engine.llm.reset_prefix_cache()
    disagreements = 0
    for turn in ("cold", "warm"):
        answers = watch(engine, asks, f"{batch}.{turn}")
        for one, answer in zip(asks, answers, strict=True):
            disagreements += compare(engine, oracles(architecture), one, answer)
    # Ties are rare (none here), or the comparison would mean nothing.
    assert disagreements <= 2
