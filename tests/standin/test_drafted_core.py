"""Drafts beside core and aged text: CUDA's code path keeps what the CPU build does."""

import functools

import pytest

from standin.asks import LONG, TEXT, TORCH, ask, check
from standin.drafts import FILLED, NGRAM, REPEATED
from standin.process import GRAPHS

CORE = {"avl_core_ratio": 0.25, "avl_refresh_interval": 3}
SAYS = [33, 58, 75]
"""Few, so that an answer repeats itself and drafts of what it has said are right."""
REQUESTS = [
    {**request, "says": SAYS}
    for request in (
        # The longest, so that graphs serve its last steps: kernels choose its core.
        ask(3, 4, 5, max_tokens=24, **CORE | {"avl_refresh_interval": 5}),
        ask(6, 7, 8, text=LONG, max_tokens=12, **CORE, **TEXT),
        ask(9, 10, 11, max_tokens=10, avl_policy="h2o", **CORE),
        # Reads all that is stored.
        ask(12, 13, max_tokens=10),
    )
]
LISTS = {
    "one": {"core_ratio": 0.25},
    "many": {"core_ratio": 0.25, "text_keep_ratio": 0.9},
}
"""Settings of servers whose graphs read one list of core a layer, one a KV head."""


@pytest.fixture(scope="module")
def start(model, answer):
    """Answer `REQUESTS` with drafts, see `generate`."""

    def start(drafts, *options, lists="one", **llm):
        llm = {
            "additional_config": {
                "avl": {"store_ratio": 0.5, "introspection": 8} | LISTS[lists]
            },
            "disable_log_stats": False,
            "async_scheduling": False,
            "limit_mm_per_prompt": {"image": 3},
            "speculative_config": drafts,
        } | llm
        spec = {"requests": REQUESTS, "llm": llm}
        options = ("--backend", "AVL", "--logprobs", "--kept", *options)
        return answer(model, spec, *options, **TORCH)

    return start


@pytest.fixture(scope="module")
def expected(start):
    """What the CPU build makes of a drafter: its own tests have an oracle."""

    @functools.cache
    def expected(name):
        report = start({"repeated": REPEATED, "filled": FILLED}[name], "--cpu")
        assert report["num_accepted"] > 10
        *listed, read_whole = [len(one["selected"][0]) for one in report["kept"]]
        # Prompts' ends, and refreshes of all that have core.
        assert min(listed) > 2
        assert read_whole == 0
        return report

    return expected


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("runner", "drafts", "as_on_cpu", "options"),
    [
        # Steps of rows with and without drafts.
        ("v1", REPEATED, "repeated", {}),
        ("v1", FILLED, "filled", GRAPHS),
        ("v2", NGRAM, "filled", GRAPHS | {"lists": "many"}),
    ],
    ids=["v1", "v1-graphs", "v2-graphs"],
)
def test_core_and_text_are_those_of_the_cpu(
    start, expected, runner, drafts, as_on_cpu, options
):
    report = start(drafts, "--runner", runner, **options)
    wanted = expected(as_on_cpu)
    check(report, wanted)
    assert report["num_accepted"] == wanted["num_accepted"]
    assert report["kept"] == wanted["kept"]
    if options:
        assert report["graphs"]["replayed"] >= 2
