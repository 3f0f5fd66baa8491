"""Fixtures of the end-to-end tests: one real server, and a way to ask it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import kept_content
import pytest
from preloaded import serve

from benchmarks.testing import models
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    json_option,
    picture_url,
    user_message,
)

OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "4096", "--max-num-seqs", "4"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    *json_option("--limit-mm-per-prompt", {"image": 4}),
)
NUM_TOKENS = 32


@dataclass(frozen=True)
class Asker:
    """Sends requests to the server; greedy and `NUM_TOKENS` long unless told."""

    server: Server

    def body(
        self, urls: Sequence[str] = (), text: str = "What is it?", **changes: Any
    ) -> dict[str, Any]:
        settings = {
            "model": self.server.model,
            "messages": [user_message(text, urls)],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        return settings | changes

    def post(
        self, body: dict[str, Any], path: str = "chat/completions"
    ) -> httpx.Response:
        # json.dumps, unlike httpx's own, writes NaN.
        return self.server.http.post(
            f"{self.server.url}/v1/{path}",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )

    def answers(self, *urls: str, **changes: Any) -> list[str]:
        """Return the texts of a request that has to succeed."""
        response = self.post(self.body(urls, **changes))
        assert response.status_code == 200, (
            f"{response.status_code}: {response.text}\n{self.server.log_tail()}"
        )
        choices = response.json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    def answer(self, *urls: str, **changes: Any) -> str:
        (text,) = self.answers(*urls, **changes)
        return text

    def refusal(self, body: dict[str, Any]) -> tuple[int, str]:
        """Return status and message of a request that has to fail."""
        response = self.post(body)
        assert response.status_code >= 400, f"was answered: {response.text}"
        return response.status_code, response.json()["error"]["message"]


def picture(seed: int) -> str:
    """Return the data URL of the random picture `seed`."""
    return picture_url(models.random_image(seed))


@pytest.fixture(scope="session")
def pictures():
    """Data URLs of random pictures, by seed."""
    return picture


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory) -> Iterator[Server]:
    """A server of the small LLaVA that lives as long as the module."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(
        checkpoints("llava"), OPTIONS, log=log, environment=ONE_THREAD, report=print
    ) as running:
        yield running


@pytest.fixture(scope="module")
def asker(server) -> Asker:
    return Asker(server)


@pytest.fixture(scope="session")
def content_server(checkpoints, tmp_path_factory) -> Iterator[Server]:
    """A server of the small LLaVA with the page, a key and kept content."""
    log = tmp_path_factory.mktemp("content") / "log"
    with kept_content.serving(checkpoints("llava"), log) as running:
        yield running
