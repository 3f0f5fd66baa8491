"""An EAGLE drafter on vLLM's CUDA code path drafts what it drafts on the CPU build."""

import pytest

from benchmarks.testing.models import drafters
from standin.asks import check
from standin.process import GRAPHS, generate

REQUESTS = [
    {"images": [1, 2], "text": "What is it?", "max_tokens": 12, "xargs": {}},
    {
        "images": [3, 4],
        "text": "What is it?",
        "max_tokens": 12,
        "xargs": {"avl_store_ratio": 0.3},
    },
    {"images": [5], "text": "And this?", "max_tokens": 12, "xargs": {"avl": 0}},
]


@pytest.fixture(scope="module")
def drafts(model):
    drafter = drafters.build("eagle", model, model.parent / "eagle")
    return {
        "method": "eagle",
        "model": str(drafter),
        "num_speculative_tokens": 3,
    }


def run(model, *options, **llm):
    llm = {
        "additional_config": {"avl": {"store_ratio": 0.5}},
        "max_num_seqs": 8,
        "disable_log_stats": False,
        "async_scheduling": False,
    } | llm
    spec = {"requests": REQUESTS, "llm": llm}
    return generate(model, spec, "--backend", "AVL", "--logprobs", *options)


@pytest.fixture(scope="module")
def expected(model, drafts):
    """Without drafts, and with them."""
    plain = run(model, "--cpu")
    drafted = run(model, "--cpu", speculative_config=drafts)
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["num_accepted"] > 0
    assert sum(map(len, drafted["drafts"].values())) > 20
    return drafted


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("runner", "settings"),
    [("v1", {}), ("v2", {}), ("v2", GRAPHS)],
    ids=["v1", "v2", "v2-graphs"],
)
def test_drafts(model, drafts, expected, runner, settings):
    report = run(model, "--runner", runner, speculative_config=drafts, **settings)
    check(report, expected)
    for name, drafts_of_request in expected["drafts"].items():
        # Nobody asks for the last ones.
        pairs = list(zip(report["drafts"][name], drafts_of_request, strict=False))
        assert len(pairs) >= len(drafts_of_request) - 1
        assert all(ours == theirs for ours, theirs in pairs)
    assert report["num_accepted"] == expected["num_accepted"]
    if settings:
        assert report["graphs"]["replayed"] >= 5
