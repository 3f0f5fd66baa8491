"""A real server that keeps content for the page, and ways to ask it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from preloaded import serve

from benchmarks.testing import models
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    json_option,
    picture_url,
    user_message,
)
from vllm_avl.front_end import schema

KEY = "none"  # what the test server's own client sends
SETTINGS = {"core_ratio": 0.3, "introspection": 4, "show_content": True}
OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "2048", "--max-num-seqs", "4", "--api-key", KEY),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    *json_option("--limit-mm-per-prompt", {"image": 4}),
)
HEADERS = {"Authorization": f"Bearer {KEY}"}


def options(**settings: Any) -> tuple[str, ...]:
    """Return `vllm serve`'s options, with other settings of ours."""
    config = {"avl": SETTINGS | settings}
    return (*OPTIONS, *json_option("--additional-config", config))


@contextmanager
def serving(
    model: Path, log: Path, *more: str, environment: Any = ONE_THREAD, **settings: Any
) -> Iterator[Server]:
    """Serve `model`; the page is at `/avl/`."""
    with serve(
        model,
        (*options(**settings), *more),
        log=log,
        environment=environment | {"VLLM_PLUGINS": "avl"},
    ) as running:
        yield running


def picture(seed: int) -> str:
    return picture_url(models.random_image(seed))


def part(url: str, **fields: Any) -> dict[str, Any]:
    """Return a message's part for a picture."""
    return {"type": "image_url", "image_url": {"url": url}} | fields


def ask(
    server: Server, *seeds: int, stream=False, max_tokens=24, headers=None, **xargs
) -> Any:
    """Ask about random pictures."""
    return server.client().chat.completions.create(
        model=server.model,
        messages=[user_message("What is it?", [picture(seed) for seed in seeds])],
        max_tokens=max_tokens,
        temperature=0,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
        extra_headers=headers,
        extra_body={"ignore_eos": True, "vllm_xargs": xargs or None},
    )


def post(
    server: Server,
    content: Sequence[Any],
    path: str = "chat/completions",
    more_headers: Mapping[str, str] | None = None,
    **changes: Any,
) -> httpx.Response:
    """Send message parts as they are."""
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": list(content)}],
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
    }
    url = f"{server.url}/v1/{path}"
    headers = HEADERS | dict(more_headers or {})
    return server.http.post(url, json=body | changes, headers=headers)


def get(server: Server, path: str, key: str | None = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return server.http.get(f"{server.url}/avl{path}", headers=headers)


def listed(server: Server) -> list[schema.Summary]:
    return schema.Requests(**get(server, "/requests").json()).requests


def detail(server: Server, request_id: str) -> schema.Detail:
    answer = get(server, f"/requests/{request_id}")
    assert answer.status_code == 200, answer.text
    return schema.Detail(**answer.json())
