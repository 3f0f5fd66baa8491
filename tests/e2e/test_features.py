"""What people combine in production, on one server: each once, with adaptive requests.

Two tensor-parallel ranks, the picture encoder split over them by pictures, priority
scheduling, tools, and LoRA adapters that are loaded while it runs.
"""

import json
from collections.abc import Iterator

import pytest
from adapters import make_adapter
from preloaded import serve

from vllm_avl.demo.server import Server, json_option

TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["photo", "drawing"]},
        "sure": {"type": "boolean"},
    },
    "required": ["kind", "sure"],
    "additionalProperties": False,
}
SHORT = {"max_tokens": 400, "ignore_eos": False}
"""An answer may end where its grammar does."""
TOOL = {
    "type": "function",
    "function": {"name": "sort", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("features") / "log"
    options = (
        *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *("--tensor-parallel-size", "2", "--mm-encoder-tp-mode", "data"),
        *("--scheduling-policy", "priority"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--enable-lora", "--max-lora-rank", "8"),
        *json_option("--limit-mm-per-prompt", {"image": 4}),
    )
    environment = TWO_RANKS | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with serve(
        checkpoints("qwen2_5_vl"),
        options,
        log=log,
        environment=environment,
        report=print,
    ) as running:
        yield running


@pytest.fixture
def ask(asker, pictures):
    """Ask about two pictures; return the answer, which has to be adaptive."""

    def ask(adapted=1, **changes):
        body = asker.body([pictures(1), pictures(2)], **changes)
        response = asker.post(body)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["usage"]["avl"]["requests_adapted"] == adapted
        return answer

    return ask


def text(answer):
    return answer["choices"][0]["message"]["content"]


def test_everything_kept_is_stock(ask):
    everything = {"avl_store_ratio": 1, "avl_core_ratio": 1}
    kept = ask(adapted=0, vllm_xargs=everything)
    assert text(kept) == text(ask(adapted=0, vllm_xargs={"avl": 0}))
    assert text(ask()) == text(ask())


def test_structured_output(ask):
    schema = {"name": "sorted", "schema": SCHEMA}
    asked = {"type": "json_schema", "json_schema": schema}
    found = json.loads(text(ask(response_format=asked, **SHORT)))
    assert found["kind"] in ("photo", "drawing")
    assert isinstance(found["sure"], bool)


def test_a_tool_that_has_to_be_called(ask):
    choice = {"type": "function", "function": {"name": "sort"}}
    answer = ask(tools=[TOOL], tool_choice=choice, **SHORT)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "sort"
    assert set(json.loads(call["function"]["arguments"])) == {"kind", "sure"}


def test_prompt_logprobs_are_stocks(ask):
    ours = ask(prompt_logprobs=1, max_tokens=4)["prompt_logprobs"]
    stock = ask(adapted=0, prompt_logprobs=1, max_tokens=4, vllm_xargs={"avl": 0})
    assert len(ours) > 100
    for one, other in zip(ours, stock["prompt_logprobs"], strict=True):
        assert (one is None) == (other is None)
        for token, found in (one or {}).items():
            assert found["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-3)


def test_priority(ask):
    assert text(ask(priority=-1)) == text(ask(priority=1)) == text(ask())


def test_several_answers_are_stock(ask):
    answer = ask(adapted=0, n=2, temperature=1)
    assert len(answer["choices"]) == 2


def test_an_adapter_that_is_loaded_at_run_time(ask, server, checkpoints, tmp_path):
    make_adapter(checkpoints("qwen2_5_vl"), tmp_path, seed=1)
    adapter = {"lora_name": "other", "lora_path": str(tmp_path)}
    plain = text(ask())
    loaded = server.http.post(f"{server.url}/v1/load_lora_adapter", json=adapter)
    assert loaded.status_code == 200, loaded.text
    through = text(ask(model="other"))
    assert through != plain
    assert text(ask(model="other")) == through
    assert text(ask()) == plain
    gone = server.http.post(f"{server.url}/v1/unload_lora_adapter", json=adapter)
    assert gone.status_code == 200, gone.text
