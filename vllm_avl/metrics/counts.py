"""Sums of what steps did, by metric."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Counts(dict[str, Any]):
    """What was added to each metric since it was last taken, by `definitions.key`.

    A number may be a tensor on a device, until somebody needs it.
    """

    def count(self, name: str, number: Any = 1.0) -> None:
        """Add to one metric."""
        self[name] = self.get(name, 0.0) + number

    def add(self, others: Mapping[str, float]) -> None:
        """Add what somebody else counted."""
        for name, number in others.items():
            self.count(name, number)

    def take(self) -> dict[str, Any]:
        """Return what was counted, and start anew."""
        taken = dict(self)
        self.clear()
        return taken
