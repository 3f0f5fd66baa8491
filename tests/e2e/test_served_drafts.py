"""A server that drafts, whatever a request wants stored and read."""

from collections.abc import Iterator

import pytest
from preloaded import serve

from vllm_avl.demo.server import ONE_THREAD, Server, json_option

DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("drafts") / "log"
    options = (
        *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *json_option("--speculative-config", DRAFTS),
    )
    with serve(
        checkpoints("llava"), options, log=log, environment=ONE_THREAD, report=print
    ) as running:
        yield running


@pytest.mark.parametrize(
    "xargs", [{}, {"avl_core_ratio": 0.2}, {"avl_text_keep_ratio": 0.7}], ids=str
)
def test_drafts_are_accepted_and_the_request_is_adapted(asker, pictures, xargs):
    accepted = "vllm:spec_decode_num_accepted_tokens_total"
    before = asker.server.metric(accepted)
    body = asker.body([pictures(1)], max_tokens=200, vllm_xargs=xargs)
    response = asker.post(body)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["avl"]["requests_adapted"] == 1
    assert asker.server.metric(accepted) > before
