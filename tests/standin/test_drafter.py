"""Drafters with layers on vLLM's CUDA code path draft what they do on the CPU build."""

import functools
import json

import pytest
import vllm

from benchmarks.testing import models
from benchmarks.testing.models import drafters
from standin.asks import TORCH, check
from standin.checkpoint import SIZE
from standin.process import GRAPHS

REQUESTS = [
    {"images": [1, 2], "text": "What is it?", "xargs": {}},
    {
        "images": [3, 4],
        "text": "What is it?",
        "xargs": {"avl_store_ratio": 0.3},
    },
    {"images": [5], "text": "And this?", "xargs": {"avl": 0}},
]
NOT_ASKED = [-1, -1, -1]
"""What 0.33's runner V2 has where an answer's end leaves nothing to draft."""
MTP_SEED = 3
"""Of a checkpoint one of whose drafts is right."""


@pytest.fixture(scope="module")
def start(model, answer):
    """Start engines of a drafter of three tokens, see `generate`."""

    def start(method, *options, **llm):
        family, target, drafts = "llava", model, {"method": method}
        if method == "mtp":
            family, target = "glm_ocr", model.parent / "glm_ocr"
            if not target.exists():
                models.build(family, target, SIZE, MTP_SEED)
        elif method == "draft_model":
            # Its layers have the model's numbers, and other heads.
            folder = drafters.build_model(model, model.parent / method, 2)
            drafts["model"] = str(folder)
        elif method == "medusa":
            drafts["model"] = str(
                drafters.build_medusa(model, model.parent / method, 3)
            )
            # VLLM 0.32 looks for it beside the settings of the language model.
            text = json.loads((model / "config.json").read_text())["text_config"]
            llm["hf_overrides"] = {"vocab_size": text["vocab_size"]}
        else:
            folder = drafters.build(method, model, model.parent / method)
            drafts["model"] = str(folder)
        llm = {
            "additional_config": {"avl": {"store_ratio": 0.5}},
            "max_num_seqs": 8,
            "disable_log_stats": False,
            "async_scheduling": False,
            "speculative_config": drafts | {"num_speculative_tokens": 3},
        } | llm
        requests = [one | {"max_tokens": 12, "family": family} for one in REQUESTS]
        spec = {"requests": requests, "llm": llm}
        options = ("--backend", "AVL", "--logprobs", *options)
        return answer(target, spec, *options, **TORCH)

    return start


@pytest.fixture(scope="module")
def expected(start):
    """What the CPU build says and drafts: with drafts it says what it says without."""

    @functools.cache
    def expected(method):
        plain = start(method, "--cpu", speculative_config=None)
        drafted = start(method, "--cpu")
        assert drafted["tokens"] == plain["tokens"]
        # Of Medusa's heads none is right: they are compared, and dropped.
        assert drafted["num_accepted"] > 0 or method == "medusa"
        assert sum(map(len, drafted["drafts"].values())) > 20
        return drafted

    return expected


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "runner", "settings"),
    [
        ("eagle", "v1", {}),
        ("eagle", "v2", {}),
        ("eagle", "v2", GRAPHS),
        ("draft_model", "v1", {}),
        # Its own passes are in no graph.
        ("draft_model", "v2", GRAPHS),
        ("mtp", "v1", {}),
        ("mtp", "v2", GRAPHS),
        *([("medusa", "v1", {})] if vllm.__version__.startswith("0.32") else []),
    ],
    ids=lambda value: value if isinstance(value, str) else "graphs" * bool(value),
)
def test_drafts(start, expected, method, runner, settings):
    report = start(method, "--runner", runner, **settings)
    wanted = expected(method)
    check(report, wanted)
    if settings:
        # No graph is as large as all requests' rows: the model's last steps are in one.
        least = 1 if method == "draft_model" else 5
        assert report["graphs"]["replayed"] >= least
    if (method, runner) == ("mtp", "v2"):
        # Runner V2 lets the place of a token be its rotary position in that layer, on
        # stock too: it drafts something else.
        return
    for name, drafts_of_request in wanted["drafts"].items():
        given = [one for one in report["drafts"][name] if one != NOT_ASKED]
        # Nobody asks for the last ones.
        pairs = list(zip(given, drafts_of_request, strict=False))
        assert len(pairs) >= len(drafts_of_request) - 1
        assert all(ours == theirs for ours, theirs in pairs)
    assert report["num_accepted"] == wanted["num_accepted"]


@pytest.mark.timeout(1800)
def test_steps_in_flight_say_the_same(start, expected):
    """Nobody knows on the host how many drafts of the step before were accepted."""
    report = start("eagle", "--runner", "v2", async_scheduling=True)
    check(report, expected("eagle"))
