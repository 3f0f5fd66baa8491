"""Requests that go by one name: each must get its own answer and its own usage."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from vllm_avl.demo.server import Server

from .ledger import Ledger
from .probes import PROBES, Expected, Probe

HEADERS = {"X-Request-Id": "the-same"}
PAUSE_SECONDS = 2
Usage = Mapping[Probe, Any]


class Names:
    """Asks all probes at once under one id, again and again until told to stop."""

    def __init__(self, server: Server, expected: Expected, usage: Usage) -> None:
        self._server, self._expected, self._usage = server, expected, usage

    def __call__(self, stop: threading.Event, ledger: Ledger) -> None:
        """Ask until `stop`, at least once."""
        while True:
            with ThreadPoolExecutor(len(PROBES)) as pool:
                list(pool.map(lambda probe: self._ask(probe, ledger), PROBES))
            if stop.wait(PAUSE_SECONDS):
                return

    def _ask(self, probe: Probe, ledger: Ledger) -> None:
        ledger.count("faults")
        what = f"probe {probe.name!r} under a name that others have"
        try:
            answer = probe.answer(self._server, HEADERS)
        except httpx.HTTPError as error:
            ledger.check(False, f"{what} is answered: {error!r}")
            return
        tokens, usage = answer["choices"][0]["token_ids"], answer["usage"]["avl"]
        expected = self._expected[probe]
        ledger.check(tokens == expected, f"{what}: {tokens}, not {expected}")
        (facts,) = answer["avl"]
        own = _usage(self._usage[probe], facts)
        ledger.check(usage == own, f"{what}: usage {usage}, not {own}: {facts}")


def _usage(alone: Mapping[str, int], facts: Mapping[str, Any]) -> Mapping[str, int]:
    """Return what a request uses that alone used `alone`.

    Where others hold its prompt, too, it gives nothing back.
    """
    if not facts.get("shares_prompt"):
        return alone
    held = alone["blocks_held"] + alone["blocks_freed"]
    return {**alone, "blocks_held": held, "blocks_freed": 0}


def learn(server: Server) -> Usage:
    """Ask each probe alone, under an id of its own, for its usage."""
    return {probe: probe.answer(server)["usage"]["avl"] for probe in PROBES}
