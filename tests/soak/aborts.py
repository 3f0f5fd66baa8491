"""Clients that leave: before the first token, or in the middle of an answer."""

from __future__ import annotations

import json
import random
import socket
import threading
from urllib.parse import urlsplit

import httpx

from vllm_avl.demo.server import Server

from .ledger import Ledger
from .target import random_body

NUM_TOKENS = 200
LONGEST_WAIT = 1.5
LIMIT_SECONDS = 600


class Aborts:
    """One client that asks and leaves, again and again until told to stop."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server, self._rng = server, random.Random(seed)

    def __call__(self, stop: threading.Event, ledger: Ledger) -> None:
        """Leave by turns while the prompt is computed or waits, and while streaming."""
        while not stop.is_set():
            ledger.count("faults", 2)
            self._leave_early()
            self._leave_a_stream(ledger)

    def _leave_early(self) -> None:
        """Close the connection some time after the request is sent."""
        body = random_body(self._server, self._rng, max_tokens=NUM_TOKENS)
        content = json.dumps(body).encode()
        address = urlsplit(self._server.url)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + content)
            threading.Event().wait(self._rng.uniform(0, LONGEST_WAIT))

    def _leave_a_stream(self, ledger: Ledger) -> None:
        """Read some tokens of a stream, then close it."""
        body = random_body(self._server, self._rng, max_tokens=NUM_TOKENS, stream=True)
        url = f"{self._server.url}/v1/chat/completions"
        last = self._rng.randint(1, NUM_TOKENS // 2)
        try:
            with self._server.http.stream(
                "POST", url, json=body, timeout=LIMIT_SECONDS
            ) as answer:
                lines = (line for line in answer.iter_lines() if line)
                read = sum(1 for _ in zip(range(last), lines, strict=False))
        except httpx.HTTPError as error:
            ledger.check(False, f"an abort: the stream begins, not {error!r}")
            return
        ledger.check(read > 0, "an abort: the stream begins")
