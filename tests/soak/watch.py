"""What the server holds while it is asked: looked at every two seconds."""

from __future__ import annotations

import threading
from collections import Counter

import httpx

from vllm_avl.demo.server import Server

from .target import resident_mb

EVERY_SECONDS = 2.0
PEAKS = {
    "peak running": "vllm:num_requests_running",
    "peak waiting": "vllm:num_requests_waiting",
}
TOTALS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix cache hits": "vllm:prefix_cache_hits_total",
}


class Watch:
    """Peaks and totals of the time it is entered for."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Watch:
        metrics = self._server.metrics()
        self._before = {name: metrics.total(of) for name, of in TOTALS.items()}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._look()
        self.seen["resident MB"] = resident_mb(self._server)

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        try:
            metrics = self._server.metrics()
        except httpx.HTTPError:
            # Others say when the server is gone.
            return
        peaks = {name: metrics.total(of) for name, of in PEAKS.items()}
        peaks["peak blocks"] = metrics.held_blocks
        peaks["peak resident MB"] = resident_mb(self._server)
        for name, value in peaks.items():
            self.seen[name] = max(self.seen[name], value)
        for name, of in TOTALS.items():
            self.seen[name] = metrics.total(of) - self._before[name]
