"""Model families on vLLM's CUDA code path: what is kept and said is the CPU build's.

Gemma and Qwen3.5, whose answers the CPU build gives otherwise, are held to an eager
model elsewhere.
"""

from dataclasses import replace

import pytest

from benchmarks.testing import models
from standin import checkpoint, generate
from standin.asks import ON_TRITON, TORCH, ask, check

# A program of the interpreted kernels is for a KV head; some have no free head size.
SMALLER = replace(checkpoint.SIZE, num_heads=2, num_kv_heads=1)
FAMILIES = {
    "llava_next": (1,),
    "llava_onevision": (1,),
    "qwen2_5_vl": (1, 2),
    "qwen3_vl": (1, 2),
    "glm4_1v": (1, 2),
    "idefics3": (1,),
    "internvl": (1, 2),
    "mistral3": (1, 2, 3, 4, 5),
    "pixtral": (1, 2),
    "llama4": (1, 2),
}
"""Pictures of a request, by their seeds: as many as make blocks come free."""
ON_BOTH = ("qwen3_vl",)
"""A family that meets each model runner: how a step's rows are named has no family."""
RUNS = [("v2", name) for name in FAMILIES] + [("v1", name) for name in ON_BOTH]
CHUNKED = "abc.ChunkedLocalAttention_96_TritonAttentionBackend, "
"""Of layers that stay vLLM's, beside ours."""
FIRST_TURN = "What is it?"
LLM = {
    "additional_config": {"avl": {"store_ratio": 0.5, "introspection": 8}},
    "enable_prefix_caching": True,
    "limit_mm_per_prompt": {"image": 5},
    "max_model_len": 512,
}
OPTIONS = ("--backend", "AVL", "--logprobs", "--kept")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Each family's model, and what the CPU build reports."""
    reports = {}

    def find(name, spec):
        if name not in reports:
            folder = tmp_path_factory.mktemp("families") / name
            model = build(name, folder)
            args = generate.parse([str(model), "-", "--cpu", *OPTIONS])
            reports[name] = model, generate.run(args, spec)
        return reports[name]

    return find


def build(name, folder):
    if name == "llama4":
        return checkpoint.build_llama4(folder)
    return models.build(name, folder, SMALLER)


def spec_of(name):
    images = FAMILIES[name]
    second_turn = f"{FIRST_TURN}\nASSISTANT:ab\nUSER:Why?"
    requests = [
        ask(*images, text=FIRST_TURN, max_tokens=4),
        # In the same step, over the prefix of the one in front.
        ask(*images, text=second_turn, max_tokens=3, avl=0),
        ask(*images, text=second_turn, max_tokens=3, avl_policy="snapkv"),
    ]
    return {"requests": [one | {"family": name} for one in requests], "llm": LLM}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("runner", "name"), RUNS)
def test_what_is_kept_and_said_is_what_the_cpu_build_says(
    answer, expected, runner, name
):
    spec = spec_of(name)
    model, of_cpu = expected(name, spec)
    report = answer(model, spec, "--runner", runner, *OPTIONS, **TORCH)
    check(report, of_cpu, (CHUNKED if name == "llama4" else "") + ON_TRITON)
    assert report["kept"] == of_cpu["kept"]
    assert report["hits"] == of_cpu["hits"]
    assert report["hits"][0] == 0 < min(report["hits"][1:])
    for one in report["kept"]:
        assert all(len(gone) >= 32 for layer in one["evicted"] for gone in layer)
    _, stock, adapted = report["logprobs"]
    assert adapted != pytest.approx(stock, abs=0.01), "nothing was evicted"
