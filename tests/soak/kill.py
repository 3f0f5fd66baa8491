"""A process of the server is killed: clients must hear of it, and soon."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress

import httpx
import psutil

from vllm_avl.demo.server import Server

from .ledger import Ledger
from .target import body, named, processes

NUM_CLIENTS = 6
NUM_TOKENS = 1500
LIMIT_SECONDS = 120.0
ORPHAN_SECONDS = 30.0
WHOLE = "whole"
"""An answer that was at its end before the process was killed."""
CUT = "cut: "


def kill(server: Server, title: str, ledger: Ledger) -> None:
    """Kill a process while clients wait; check what they and /health get, and when.

    Counts the seconds until the last client heard and until /health did not answer 200.
    """
    ledger.count("faults")
    all_processes = processes(server)
    victim = named(server, title)
    pool, begun = ThreadPoolExecutor(NUM_CLIENTS), threading.Event()
    clients = [
        pool.submit(_ask, server, picture, begun, stream=picture % 2 == 0)
        for picture in range(NUM_CLIENTS)
    ]
    # A fast server has answered everybody before /metrics says that it is at it.
    ledger.check(begun.wait(LIMIT_SECONDS), f"{title}: an answer begins")
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


def _ask(server: Server, picture: int, begun: threading.Event, *, stream: bool) -> str:
    """Ask for a long answer; return how it ended.

    Sets `begun` when the first tokens of a streamed answer have come.

    Returns:
        The error that came, `WHOLE`, or the end of what came without either.
    """
    question = body(server, [picture], max_tokens=NUM_TOKENS, stream=stream)
    url = f"{server.url}/v1/chat/completions"
    try:
        with server.http.stream("POST", url, json=question, timeout=600) as answer:
            text = ""
            for piece in answer.iter_text():
                text += piece
                if '"content"' in piece:
                    begun.set()
    except httpx.HTTPError as error:
        return repr(error)
    if '"finish_reason":"length"' in text:
        return WHOLE
    is_told = answer.status_code != 200 or '"error"' in text
    return text[-300:] if is_told else CUT + text[-300:]


def _check_clients(
    clients: Sequence[Future[str]], start: float, ledger: Ledger
) -> None:
    answers = []
    for client in clients:
        left = LIMIT_SECONDS - (time.monotonic() - start)
        try:
            answers.append(client.result(max(left, 0)))
        except FutureTimeoutError:
            ledger.check(False, f"killed: a client hears in {LIMIT_SECONDS:.0f} s")
    for answer in answers:
        is_told = not answer.startswith(CUT)
        ledger.check(is_told, f"killed: a cut answer is no success: {answer!r}")
        ledger.count("refused with the reason", is_told and answer != WHOLE)
    ledger.check(set(answers) != {WHOLE}, "killed: some answer was under way")
    ledger.count("seconds to the last client", time.monotonic() - start)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if condition():
                return True
        time.sleep(0.1)
    return False
