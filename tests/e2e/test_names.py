"""Clients choose the ids of their answers; nothing is told apart by them."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from kept_content import ask, detail, get, listed, picture

NAME = "chatcmpl-mine"
HEADERS = {"X-Request-Id": "mine"}


@pytest.fixture
def server(content_server):
    return content_server


def expected(alone, answer):
    """What `answer` has to say, given what the same question said when alone."""
    (facts,), counts = alone.avl, alone.usage.avl
    if answer.avl[0].get("shares_prompt"):
        facts = facts | {"shares_prompt": True}
        held = counts["blocks_held"] + counts["blocks_freed"]
        counts = counts | {"blocks_held": held, "blocks_freed": 0}
    return facts, counts


def test_answers_of_one_name_at_once_have_each_their_own_usage(server):
    seeds = [(1,), (2, 3), (), (4,), (5, 6), (), (7, 8), (1,)]
    alone = [ask(server, *one) for one in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda one: ask(server, *one, headers=HEADERS), seeds))
    assert {answer.id for answer in together} == {NAME}
    ids = [answer.avl[0].pop("id") for answer in together]
    assert len(set(ids)) == len(seeds)
    for answer in alone:
        del answer.avl[0]["id"]
    for one, answer in zip(alone, together, strict=True):
        assert (answer.avl[0], answer.usage.avl) == expected(one, answer)


def test_streams_of_one_name_have_each_their_own_usage(server):
    seeds = [(1,), (2, 3), (), (4,)]

    def last(one):
        return list(ask(server, *one, stream=True, headers=HEADERS))[-1].usage.avl

    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(last, seeds))
    assert together == [ask(server, *one).usage.avl for one in seeds]


@pytest.mark.parametrize("workers", [1, 4], ids=["one_by_one", "at_once"])
def test_a_request_is_shown_with_its_own_picture_and_answer(server, workers):
    def asked(seed):
        tokens = 20 + seed
        return seed, tokens, ask(server, seed, max_tokens=tokens, headers=HEADERS)

    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(asked, range(10, 14)))
    assert {request.name for request in listed(server)} == {NAME}
    for seed, tokens, answer in answers:
        found = detail(server, answer.avl[0]["id"])
        assert found.name == NAME
        assert [shown.url for shown in found.pictures] == [picture(seed)]
        assert found.answer == answer.choices[0].message.content
        assert len(found.answer_tokens) == tokens
        assert found.num_tokens == found.num_prompt_tokens + tokens - 1


def test_a_look_up_that_finds_several_says_so(server):
    ids = [ask(server, seed, headers=HEADERS).avl[0]["id"] for seed in (1, 2)]
    answer = get(server, f"/requests/{NAME}")
    assert answer.status_code == 409
    said = answer.json()["detail"]
    assert f"requests carry the id '{NAME}'" in said
    assert all(one in said for one in ids)


def test_an_answers_id_finds_its_request(server):
    answer = ask(server, 1, headers={"X-Request-Id": "only/one"})
    found = detail(server, answer.id)
    assert (found.name, found.id) == ("chatcmpl-only/one", answer.avl[0]["id"])


def test_a_name_like_the_engines_id_of_another_hides_nothing_wrong(server):
    first = ask(server, 21, headers={"X-Request-Id": "first"})
    own = first.avl[0]["id"]
    ask(server, 22, headers={"X-Request-Id": own.removeprefix("chatcmpl-")})
    answer = get(server, f"/requests/{own}")
    assert answer.status_code == 200
    assert [one["url"] for one in answer.json()["pictures"]] == [picture(21)]
    assert answer.json()["id"] == own
