"""A refused request leaves both halves of the cache of processed pictures alike.

What it entered in the front end's half the engine has not got: the next request with
such a picture would send its hash alone.
"""

import itertools

import pytest
from kept_content import part, picture, post

SEEDS = itertools.count(300)
TEXT = {"type": "text", "text": "What is it?"}
REFUSED = {
    "min_tokens": {"min_tokens": 100},
    "min_tokens_without_a_maximum": {"min_tokens": 100_000, "max_tokens": None},
    "logit_bias": {"logit_bias": {"99999999": 1}},
    "grammar": {"structured_outputs": {"grammar": "root ::= undefined"}},
    "schema": {"structured_outputs": {"json": {"type": "nothing"}}},
    "stop_token": {"allowed_token_ids": [99999999]},
    "cut": {"truncate_prompt_tokens": 20},
    "cut_within_the_picture": {"truncate_prompt_tokens": 100},
    "too_long": {"max_tokens": 100_000},
    "ours": {"vllm_xargs": {"avl": 2}},
    "rank": {},
}
HEADERS = {"rank": {"X-data-parallel-rank": "7"}}


@pytest.fixture
def server(content_server):
    return content_server


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("name", REFUSED)
def test_the_picture_of_a_refused_request_can_be_asked_about(server, name, stream):
    parts = [part(picture(next(SEEDS))), TEXT]
    for _ in range(2):
        refused = post(
            server,
            parts,
            stream=stream,
            more_headers=HEADERS.get(name, {}),
            **REFUSED[name],
        )
        if stream:
            assert '"error"' in refused.text, refused.text
        else:
            # vLLM's own 500 where a picture's place in the prompt is cut off.
            expected = 500 if name == "cut" else 400
            assert refused.status_code == expected, refused.text
    right = post(server, parts)
    assert right.status_code == 200, right.text
    assert right.json()["usage"]["avl"]["requests_adapted"] == 1


def test_a_text_with_the_pictures_own_mark(server):
    """Whether it is refused or not, the picture can be asked about afterwards."""
    parts = [part(picture(next(SEEDS))), {"type": "text", "text": "<image> what?"}]
    first = post(server, parts)
    assert first.status_code < 500, first.text
    assert post(server, [parts[0], TEXT]).status_code == 200


def test_other_endpoints(server):
    url = picture(next(SEEDS))
    content = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What?"},
    ]
    refused = post(
        server,
        (),
        "responses",
        input=[{"role": "user", "content": content}],
        logit_bias={"99999999": 1},
        max_output_tokens=24,
    )
    assert refused.status_code == 400, refused.text
    assert post(server, [part(url), TEXT]).status_code == 200


def test_a_picture_that_the_engine_has_stays_known(server):
    parts = [part(picture(next(SEEDS))), TEXT]
    assert post(server, parts).status_code == 200
    hits = "vllm:mm_cache_hits_total"
    before = server.metric(hits)
    assert post(server, parts, logit_bias={"99999999": 1}).status_code == 400
    assert post(server, parts).status_code == 200
    assert server.metric(hits) == before + 2
