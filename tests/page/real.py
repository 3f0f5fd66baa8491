"""A real server of the small LLaVA, with its page on and everything remembered."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preloaded import serve

from benchmarks.testing import models
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    json_option,
    picture_url,
    user_message,
)

SETTINGS = {"core_ratio": 0.3, "introspection": 8, "show_content": True}
OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "2048", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    *json_option("--additional-config", {"avl": SETTINGS}),
    *json_option("--limit-mm-per-prompt", {"image": 2}),
)


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """Serve `model`; the page is at `/avl/`."""
    environment = ONE_THREAD | {"VLLM_PLUGINS": "avl"}
    with serve(
        model, (*OPTIONS, *options), log=log, environment=environment
    ) as running:
        yield running


def ask(server: Server, *seeds: int, max_tokens: int = 48) -> tuple[str, str]:
    """Ask about random pictures; return the request's id and the answer."""
    urls = [picture_url(models.random_image(seed, 448, 336)) for seed in seeds]
    answer = server.client().chat.completions.create(
        model=server.model,
        messages=[user_message("What is in the picture?", urls)],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    return answer.id, answer.choices[0].message.content or ""
