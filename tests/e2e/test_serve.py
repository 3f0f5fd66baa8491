"""A real `vllm serve --attention-backend avl`, asked over HTTP."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from preloaded import serve

from benchmarks.testing import models
from vllm_avl.demo.server import (
    ONE_THREAD,
    data_url,
    free_port,
    png,
    user_message,
)

RATIO = "must be a number in (0, 1]"
SWITCH = "must be 0 or 1"
COUNT = "must be an integer from 0"

BAD_XARGS = [
    ({"avl_store_ratio": 0}, "avl_store_ratio = 0", RATIO),
    ({"avl_store_ratio": -1}, "avl_store_ratio = -1", RATIO),
    ({"avl_store_ratio": 1.5}, "avl_store_ratio = 1.5", RATIO),
    ({"avl_store_ratio": "0.5"}, "avl_store_ratio = '0.5'", RATIO),
    ({"avl_store_ratio": float("nan")}, "avl_store_ratio = nan", RATIO),
    ({"avl_store_ratio": float("inf")}, "avl_store_ratio = inf", RATIO),
    ({"avl_store_ratio": "nan"}, "avl_store_ratio = 'nan'", RATIO),
    ({"avl_store_ratio": [0.5]}, "avl_store_ratio = [0.5]", RATIO),
    ({"avl": 2}, "avl = 2", SWITCH),
    ({"avl": "yes"}, "avl = 'yes'", SWITCH),
    ({"avl_policy": "best"}, "avl_policy = 'best'", "must be one of avl, fastv, full"),
    ({"avl_core_ratio": 0.9}, "avl_core_ratio = 0.9", "at most the store ratio"),
    ({"avl_refresh_interval": -1}, "avl_refresh_interval = -1", COUNT),
    ({"avl_refresh_interval": 1.5}, "avl_refresh_interval = 1.5", COUNT),
    ({"avl_refresh_interval": 10**12}, "avl_refresh_interval = 1000000", COUNT),
    ({"avl_text_keep_ratio": 1.01}, "avl_text_keep_ratio = 1.01", RATIO),
    ({"avl_unknown": 1}, "avl_unknown", "known are avl, avl_preset, avl_policy"),
]


@pytest.fixture(scope="module")
def question(asker, pictures):
    """A picture, and the answer to a question about it before anything went wrong."""
    url = pictures(0)
    return url, asker.answer(url)


def streamed(server, body) -> str:
    body = {key: value for key, value in body.items() if key != "ignore_eos"}
    stream = server.client().chat.completions.create(
        **body, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join(c.delta.content or "" for chunk in stream for c in chunk.choices)


def eventually(condition, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(asker, question):
    """After every test, whatever it did: alive, nothing held, the same answer."""
    yield
    url, before = question
    server = asker.server
    assert server.is_healthy(), server.log_tail()
    assert asker.answer(url) == before
    eventually(lambda: server.metrics().held_blocks == 0, "all blocks are free")


def test_streaming_gives_the_same_text(asker, question):
    url, text = question
    assert streamed(asker.server, asker.body([url])) == text


def test_requests_side_by_side_answer_as_alone(asker, pictures):
    urls = [pictures(seed) for seed in (1, 2)]
    alone = [asker.answer(url) for url in urls]
    with ThreadPoolExecutor(len(urls)) as pool:
        assert list(pool.map(asker.answer, urls)) == alone


def test_nothing_evicted_is_stock(asker, question):
    url, text = question
    stock = asker.answer(url, vllm_xargs={"avl": 0})
    assert asker.answer(url, vllm_xargs={"avl_store_ratio": 1.0}) == stock
    assert text != stock, "the default store ratio evicts nothing that is looked at"


def test_a_repeated_picture_is_answered_from_the_prefix_cache(asker, pictures):
    url, hits = pictures(3), "vllm:prefix_cache_hits_total"
    text, hits_before = asker.answer(url), asker.server.metric(hits)
    assert asker.answer(url) == text
    assert asker.server.metric(hits) > hits_before


def test_several_pictures(asker, pictures):
    urls = [pictures(seed) for seed in range(4)]
    assert asker.answer(*urls) == asker.answer(*urls)


def test_a_second_turn(asker, question):
    url, text = question
    turns = [
        user_message("What is it?", [url]),
        {"role": "assistant", "content": text},
        user_message("Are you sure?"),
    ]
    assert asker.answer(messages=turns) == asker.answer(messages=turns)


def test_text_only_chat_is_stock(asker):
    stock = asker.answer(text="Hello", vllm_xargs={"avl": 0})
    assert asker.answer(text="Hello") == stock


def test_two_choices(asker, question):
    sampled = {"n": 2, "temperature": 1.0, "seed": 1}
    first, second = asker.answers(question[0], **sampled)
    assert first != second


def test_completions_endpoint(asker):
    body = {"model": asker.server.model, "prompt": "Hello", "max_tokens": 5}
    response = asker.post(body, "completions")
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(("xargs", "fault", "allowed"), BAD_XARGS)
def test_a_bad_override_is_a_400(asker, question, xargs, fault, allowed):
    status, message = asker.refusal(asker.body([question[0]], vllm_xargs=xargs))
    assert status == 400
    assert f"vllm_xargs.{fault}" in message
    assert allowed in message


def test_a_bad_override_reaches_a_streaming_client(asker, question):
    # vLLM has sent its 200 by then: the line comes as an event of the stream.
    body = asker.body([question[0]], stream=True)
    del body["ignore_eos"]
    ask = asker.server.client().chat.completions.create
    with pytest.raises(openai.APIError, match="vllm_xargs.avl = 2: must be 0 or 1"):
        list(ask(**body, extra_body={"vllm_xargs": {"avl": 2}}))


def test_a_corrected_request_is_answered(asker, pictures):
    url = pictures(4)
    status, _ = asker.refusal(asker.body([url], vllm_xargs={"avl": 2}))
    assert status == 400
    asker.answer(url)


def test_a_bad_picture_is_a_400(asker):
    whole = png(models.random_image(5))
    for content in (whole[: len(whole) // 2], b"not a picture", b""):
        status, message = asker.refusal(asker.body([data_url(content)]))
        assert status == 400, message


def test_an_unreachable_picture_is_an_error(asker):
    # A 500 in vLLM itself (0.32), with and without us.
    url = f"http://127.0.0.1:{free_port()}/picture.png"
    status, message = asker.refusal(asker.body([url]))
    assert 400 <= status <= 500
    assert "Cannot connect to host 127.0.0.1" in message


def test_too_many_pictures_are_a_400(asker, question):
    status, message = asker.refusal(asker.body([question[0]] * 5))
    assert (status, "At most 4 image(s)" in message) == (400, True), message


@pytest.mark.parametrize("num_pictures", [0, 4])
def test_an_overlong_prompt_is_a_400(asker, question, num_pictures):
    text = "x" * (4096 - num_pictures * 500)
    status, message = asker.refusal(asker.body([question[0]] * num_pictures, text=text))
    assert (status, "maximum context length" in message) == (400, True), message


def test_a_client_that_leaves_midway_frees_its_blocks(asker, pictures):
    server = asker.server
    body = asker.body([pictures(6)], max_tokens=2000, stream=True)
    url = f"{server.url}/v1/chat/completions"
    with server.http.stream("POST", url, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        chunks = [json.loads(next(lines).removeprefix("data: ")) for _ in range(20)]
        assert all(chunk["choices"] for chunk in chunks)
        assert server.metrics().held_blocks > 0
    running = "vllm:num_requests_running"
    eventually(lambda: server.metric(running) == 0, "the aborted request is gone")
    eventually(lambda: server.metrics().held_blocks == 0, "all blocks are free")


def test_a_refused_request_leaves_the_cache_of_pictures_as_it_was(
    checkpoints, tmp_path, asker, pictures
):
    num_cached = 7
    gigabytes = 1.05 * num_cached * 336 * 336 * 3 * 4 / 2**30
    options = (
        *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(16 << 20)),
        *("--mm-processor-cache-gb", f"{gigabytes:.4f}"),
    )
    with serve(
        checkpoints("llava"), options, log=tmp_path / "log", environment=ONE_THREAD
    ) as server:
        small = type(asker)(server)
        for seed in range(num_cached):
            small.answer(pictures(seed))
        last = pictures(num_cached - 1)
        status, _ = small.refusal(small.body([last], vllm_xargs={"avl": 2}))
        assert status == 400
        # It takes the first one's place, in the front end and in the engine.
        small.answer(pictures(100))
        small.answer(pictures(0))
