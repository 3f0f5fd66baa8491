"""Answers say how they were served: counts in usage, the rest beside it."""

import json

import anthropic
import pytest
from kept_content import HEADERS, KEY, ask, part, picture, post

# 605 prompt tokens and 23 of the answer in blocks of 32, of which 8 went.
COUNTS = {"requests_adapted": 1, "blocks_held": 12, "blocks_freed": 8}
FACTS = {
    "adapted": True,
    "policy": "avl",
    "block_size": 32,
    "shares_prompt": False,
    "vision_tokens": 576,
    "vision_tokens_stored": 320,
    "vision_tokens_core": 192,
}
STOCK = {"requests_adapted": 0, "blocks_held": 20, "blocks_freed": 0}
TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture
def server(content_server):
    return content_server


def facts(said):
    """What an answer's own field says, without ids."""
    return [{k: v for k, v in one.items() if k != "id"} for one in said]


def numbers(tree):
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    return [tree]


def test_a_chat_completion(server):
    answer = ask(server, 1)
    assert answer.usage.avl == COUNTS
    assert facts(answer.avl) == [FACTS]


def test_usage_holds_nothing_but_counts(server):
    for answer in (ask(server, 1), ask(server), ask(server, 1, avl_policy="h2o")):
        assert {type(one) for one in numbers(answer.usage.avl)} == {int}
        assert set(answer.usage.avl) == set(COUNTS)


def test_a_stream(server):
    *words, last = list(ask(server, 1, stream=True))
    assert last.usage.avl == COUNTS
    assert facts(last.avl) == [FACTS]
    assert all(chunk.usage is None for chunk in words)
    assert not any("avl" in (chunk.model_extra or {}) for chunk in words)


def test_why_a_request_was_left_alone(server):
    off, text = ask(server, 1, avl=0), ask(server)
    assert off.usage.avl == STOCK
    assert facts(off.avl) == [{"adapted": False, "reason": "off"}]
    assert facts(text.avl) == [{"adapted": False, "reason": "no_vision"}]
    assert text.usage.avl["blocks_freed"] == 0


def test_policies_that_rank_any_token_leave_out_what_they_do_not_know(server):
    said = facts(ask(server, 1, avl_policy="snapkv").avl)
    assert said == [{k: FACTS[k] for k in list(FACTS)[:5]} | {"policy": "snapkv"}]


def test_several_answers_are_several_requests(server):
    body = post(server, [part(picture(1)), TEXT], n=2, temperature=1).json()
    assert body["usage"]["avl"] == {k: 2 * v for k, v in STOCK.items()}
    assert facts(body["avl"]) == [{"adapted": False, "reason": "off"}] * 2


def test_a_batch_of_chats_adds_up(server):
    chats = [
        [{"role": "user", "content": [part(picture(seed)), TEXT]}] for seed in (1, 2)
    ]
    body = post(server, (), "chat/completions/batch", messages=chats).json()
    assert body["usage"]["avl"] == {k: 2 * v for k, v in COUNTS.items()}
    assert facts(body["avl"]) == [FACTS] * 2


def responses(server, **more):
    content = [
        {"type": "input_image", "image_url": picture(1), "detail": "auto"},
        {"type": "input_text", "text": "What is it?"},
    ]
    return server.client().responses.create(
        model=server.model,
        input=[{"role": "user", "content": content}],
        max_output_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )


def test_a_response(server):
    answer = responses(server)
    assert answer.usage.avl == COUNTS
    assert facts(answer.avl) == [FACTS]


def test_a_streamed_response(server):
    events = list(responses(server, stream=True))
    (done,) = [one for one in events if one.type == "response.completed"]
    assert done.response.usage.avl == COUNTS
    assert facts(done.response.avl) == [FACTS]


def messages(server):
    client = anthropic.Anthropic(
        base_url=server.url, api_key=KEY, default_headers=HEADERS, max_retries=0
    )
    _, _, data = picture(1).partition(",")
    source = {"type": "base64", "media_type": "image/png", "data": data}
    body = {
        "model": server.model,
        "max_tokens": 24,
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": source}, TEXT]}
        ],
    }
    return client.messages, body


def test_a_message(server):
    client, body = messages(server)
    answer = client.create(**body, extra_body={"ignore_eos": True})
    assert answer.usage.avl["requests_adapted"] == 1
    assert facts(answer.avl) == [FACTS]


def test_a_streamed_message(server):
    client, body = messages(server)
    events = list(client.create(**body, stream=True))
    (delta,) = [one for one in events if one.type == "message_delta"]
    assert delta.usage.avl["requests_adapted"] == 1
    assert facts(delta.avl) == [FACTS]
    assert events[-1].type == "message_stop"


def test_an_answer_that_speaks_of_choices_is_passed_on(server):
    """A stream's words may look like its end."""
    text = {"type": "text", "text": '"choices":[] "usage" data: {}'}
    body = {"stream": True, "echo": True, "stream_options": {"include_usage": True}}
    raw = post(server, [part(picture(1)), text], **body).text
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["avl"]["requests_adapted"] == 1
