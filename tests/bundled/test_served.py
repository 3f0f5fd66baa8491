"""The bundled checkpoint through `vllm serve` with the default settings."""

import pytest
from fixed_questions import fixed_questions
from preloaded import serve

from benchmarks.training.evaluate import MAX_IMAGES, max_tokens
from vllm_avl.bundled import WEIGHTS
from vllm_avl.demo.server import (
    ONE_THREAD,
    json_option,
    picture_url,
)

OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)),
    *json_option("--limit-mm-per-prompt", {"image": MAX_IMAGES}),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("served") / "server.log"
    with serve(WEIGHTS, OPTIONS, log=log, environment=ONE_THREAD) as running:
        yield running


def messages(question):
    urls = map(picture_url, question.images)
    return question.chat([{"type": "image_url", "image_url": {"url": u}} for u in urls])


def test_ten_fixed_questions_are_answered_right(server):
    client = server.client()
    given, freed = [], []
    for question in fixed_questions():
        completion = client.chat.completions.create(
            model=server.model,
            messages=messages(question),
            max_tokens=max_tokens("caption"),
            temperature=0,
        )
        given.append(completion.choices[0].message.content.strip())
        freed.append(completion.usage.model_dump()["avl"]["blocks_freed"])
    assert given == [question.truths[0] for question in fixed_questions()]
    assert min(freed) > 0
