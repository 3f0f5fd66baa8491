"""Fixed greedy questions, sent every ten seconds: the answers may never change."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_avl.demo.server import Server

from .ledger import Ledger
from .target import body

EVERY_SECONDS = 10.0
LIMIT_SECONDS = 300.0
LONG = "Tell me everything that can be seen in it, from the left to the right. " * 4
# A replayed request whose core or text was selected may answer otherwise
# (tests/engine/test_replay.py): these go first, so that others are preempted.
FIRST = -1


@dataclass(frozen=True, eq=False)
class Probe:
    """A question with one right answer."""

    name: str
    pictures: Sequence[int] = ()
    text: str = "What is it?"
    xargs: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    num_tokens: int = 24

    def ask(self, server: Server) -> list[int]:
        """Return the tokens of the answer.

        Raises:
            httpx.HTTPError: there was none.
        """
        return self.answer(server)["choices"][0]["token_ids"]

    def answer(
        self, server: Server, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the whole answer.

        Raises:
            httpx.HTTPError: there was none.
        """
        request = body(
            server,
            self.pictures,
            self.text,
            max_tokens=self.num_tokens,
            vllm_xargs=dict(self.xargs),
            priority=self.priority,
            return_token_ids=True,
        )
        url = f"{server.url}/v1/chat/completions"
        response = server.http.post(
            url, json=request, headers=headers, timeout=LIMIT_SECONDS
        )
        return response.raise_for_status().json()


CORE = {"avl_core_ratio": 0.2}
PROBES = (
    Probe("text", text=LONG),
    Probe("picture", (0,)),
    Probe("pictures", (1, 2), xargs={"avl_store_ratio": 0.3}),
    Probe("stock", (0,), xargs={"avl": 0}),
    Probe("snapkv", (3,), xargs={"avl_policy": "snapkv"}),
    Probe("core", (4,), xargs=CORE, priority=FIRST),
    Probe(
        "core and text",
        (5,),
        LONG,
        xargs={**CORE, "avl_text_keep_ratio": 0.3},
        priority=FIRST,
    ),
)
BURST = tuple(
    Probe(f"burst {seed}", (seed, seed + 1, seed + 2), xargs=xargs, num_tokens=40)
    for seed, xargs in zip(
        range(100, 136, 3),
        ({}, {"avl": 0}, {"avl_store_ratio": 0.2}, {"avl_store_ratio": 0.8}) * 3,
        strict=True,
    )
)
"""Of three pictures each, many times what the pool holds; exact when preempted."""
Expected = Mapping[Probe, list[int]]


def learn(server: Server, ledger: Ledger) -> Expected:
    """Ask an idle server each question, twice: the second hits the prefix cache."""
    expected = {probe: probe.ask(server) for probe in (*PROBES, *BURST)}
    for probe in PROBES:
        compare(server, probe, expected, ledger)
    by_name = {probe.name: tokens for probe, tokens in expected.items()}
    ledger.check(
        by_name["picture"] != by_name["stock"],
        "the probes can see eviction: stock's answer differs",
    )
    return expected


def compare(server: Server, probe: Probe, expected: Expected, ledger: Ledger) -> None:
    """Ask once more; no answer and another answer are violations."""
    start = time.monotonic()
    try:
        tokens = probe.ask(server)
    except httpx.HTTPError as error:
        ledger.count("probes unanswered")
        ledger.check(False, f"probe {probe.name!r} is answered: {error!r}")
        return
    ledger.count("probes")
    seconds = time.monotonic() - start
    ledger.counts["slowest probe"] = max(ledger.counts["slowest probe"], seconds)
    if tokens != expected[probe]:
        ledger.count("probes differing")
        ledger.check(False, f"probe {probe.name!r}: {tokens}, not {expected[probe]}")


def burst(server: Server, expected: Expected, ledger: Ledger) -> None:
    """Ask all questions of `BURST` at once, twice each: all must be answered right."""
    with ThreadPoolExecutor(2 * len(BURST)) as pool:
        list(pool.map(lambda p: compare(server, p, expected, ledger), BURST * 2))
    ledger.count("faults", 2 * len(BURST))


class Prober:
    """Sends a round of `PROBES` every ten seconds; none waits for the one before."""

    def __init__(self, server: Server, expected: Expected, ledger: Ledger) -> None:
        self._arguments = (server, expected, ledger)
        self._stopping = threading.Event()
        self._senders = ThreadPoolExecutor(8 * len(PROBES))
        self._clock = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Prober:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._clock.join()
        self._senders.shutdown()

    def _run(self) -> None:
        server, expected, ledger = self._arguments
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += EVERY_SECONDS
            ledger.count("probe rounds")
            for probe in PROBES:
                self._senders.submit(compare, server, probe, expected, ledger)
