"""The same requests to stock vLLM: is a 5xx ours, or vLLM's own?"""

from __future__ import annotations

from collections.abc import Sequence

import httpx

from vllm_avl.demo.server import Server

from .ledger import Ledger, Suspect


def compare(server: Server, suspects: Sequence[Suspect], ledger: Ledger) -> list[str]:
    """Send each to a stock server; return a line for each that it answers alike.

    One that stock answers otherwise is a violation.
    """
    same = []
    for suspect in suspects:
        ledger.count("faults")
        try:
            status = suspect.send(server.http, server.url).status_code
        except httpx.HTTPError as error:
            ledger.check(False, f"{suspect.name}: stock answers, not {error!r}")
            continue
        if ledger.check(
            status == suspect.status,
            f"{suspect.name}: {suspect.status} as stock's {status}: {suspect.message}",
        ):
            same.append(f"{suspect.name}: {status} {suspect.message[:160]}")
    return same
