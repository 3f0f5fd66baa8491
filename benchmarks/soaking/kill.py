"""A process of the server is killed: clients must hear of it, and soon."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress

import httpx
import psutil

from soaking.ledger import Ledger
from soaking.target import body, named, processes
from vllm_avl.testing.server import Server

NUM_CLIENTS = 6
NUM_TOKENS = 1500
LIMIT_SECONDS = 120.0
ORPHAN_SECONDS = 30.0


def kill(server: Server, title: str, ledger: Ledger) -> None:
    """Kill a process while clients wait; check what they and /health get, and when.

    Counts the seconds until the last client heard and until /health did not answer 200.
    """
    ledger.count("faults")
    all_processes = processes(server)
    victim = named(server, title)
    pool = ThreadPoolExecutor(NUM_CLIENTS)
    clients = [
        pool.submit(_ask, server, picture, stream=picture % 2 == 0)
        for picture in range(NUM_CLIENTS)
    ]
    _until(lambda: server.metric("vllm:num_requests_running") >= 2, LIMIT_SECONDS)
    start = time.monotonic()
    victim.send_signal(signal.SIGKILL)
    _check_clients(clients, start, ledger)
    pool.shutdown(wait=False)
    # vLLM 0.32 ends with status 0 here, so that only /health tells.
    unhealthy = _until(lambda: not server.is_healthy(), LIMIT_SECONDS)
    ledger.check(unhealthy, f"{title} killed: /health says so in {LIMIT_SECONDS:.0f} s")
    ended = _until(lambda: server.process.poll() is not None, LIMIT_SECONDS)
    ledger.check(ended, f"{title} killed: the server ends in {LIMIT_SECONDS:.0f} s")
    ledger.count("seconds to the end", time.monotonic() - start)
    _, orphans = psutil.wait_procs(all_processes, ORPHAN_SECONDS)
    ledger.check(not orphans, f"{title} killed: no process is left, not {orphans}")


def _ask(server: Server, picture: int, *, stream: bool) -> str:
    """Ask for an answer too long to finish; return the error that came instead."""
    question = body(server, [picture], max_tokens=NUM_TOKENS, stream=stream)
    url = f"{server.url}/v1/chat/completions"
    try:
        with server.http.stream("POST", url, json=question, timeout=600) as answer:
            text = "".join(answer.iter_text())
    except httpx.HTTPError as error:
        return repr(error)
    if answer.status_code == 200 and '"error"' not in text:
        return ""
    return text[-300:]


def _check_clients(
    clients: Sequence[Future[str]], start: float, ledger: Ledger
) -> None:
    for client in clients:
        left = LIMIT_SECONDS - (time.monotonic() - start)
        try:
            error = client.result(max(left, 0))
        except FutureTimeoutError:
            ledger.check(False, f"killed: a client hears in {LIMIT_SECONDS:.0f} s")
            continue
        if ledger.check(error != "", "killed: a cut answer is no success"):
            ledger.count("refused with the reason")
    ledger.count("seconds to the last client", time.monotonic() - start)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if condition():
                return True
        time.sleep(0.1)
    return False
