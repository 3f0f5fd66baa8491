"""What happened in one phase: counts, violated conditions, answers to compare."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Suspect:
    """A request that was answered with a 5xx: does stock vLLM do so too?"""

    name: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    status: int
    message: str

    def send(self, http: httpx.Client, url: str) -> httpx.Response:
        """Send the same request to the server at `url`."""
        return http.request(
            self.method, url + self.path, headers=self.headers, content=self.body
        )


@dataclass
class Ledger:
    """Filled by the threads of a phase."""

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    """Each names the condition and what was seen instead."""
    suspects: list[Suspect] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, number: float = 1) -> None:
        """Add to a count."""
        with self._lock:
            self.counts[name] += number

    def check(self, holds: bool, condition: str) -> bool:
        """Note `condition` as violated unless it holds; say whether it does."""
        if not holds:
            with self._lock:
                self.violations.append(condition)
        return holds

    def suspect(self, one: Suspect) -> None:
        """Keep a 5xx for the comparison, the first of its name and status."""
        with self._lock:
            if (one.name, one.status) not in {
                (s.name, s.status) for s in self.suspects
            }:
                self.suspects.append(one)
