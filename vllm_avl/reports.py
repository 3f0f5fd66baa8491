"""What a worker reports of a request, to callers of `avl_report` and to the endpoints.

What has a configuration for pydantic is part of the endpoints' answers as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict

ANSWER = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True)
class CoreSelection:
    """Core as it was selected at one step."""

    __pydantic_config__ = ANSWER

    num_tokens: int
    """Length of the request after that step."""
    core: list[list[int]]
    """As `LayerReport.core`."""


@dataclass(frozen=True)
class Held:
    """The blocks of a request at one length."""

    __pydantic_config__ = ANSWER

    num_tokens: int
    held: int
    stock: int
    """Blocks that it would hold without eviction."""


@dataclass(frozen=True)
class LayerReport:
    """Original positions in one layer of this rank, ascending.

    The outer lists have one entry where all KV heads hold the same tokens, and one for
    each KV head of the rank where they differ.
    """

    __pydantic_config__ = ANSWER

    layer: int
    core: list[list[int]]
    """Ranked tokens that an ordinary step reads: vision, for a policy that keeps text.
    Of tokens behind the full prompt blocks, all are read, and none is ranked."""
    secondary: list[list[int]]
    """Ranked tokens that are stored, and read on refresh steps only."""
    evicted: list[list[int]]
    """Ranked tokens that are gone."""
    text: list[list[int]]
    """Everything else that is stored; an ordinary step reads all of it."""
    history: list[CoreSelection]
    """Core at prefill and at each refresh, the oldest first; with the `introspection`
    setting, and where core is less than what is stored."""


@dataclass(frozen=True)
class RequestSummary:
    """One adaptive request on one rank, after its last step, in numbers."""

    request_id: str
    running: bool
    policy: str
    num_tokens: int
    """Length of the request, evicted or not."""
    num_prompt_tokens: int
    num_vision_tokens: int
    num_refreshes: int
    num_blocks_held: int
    num_blocks_freed: int
    """Blocks that stock vLLM would hold besides."""


@dataclass(frozen=True)
class RequestReport(RequestSummary):
    """The same request row by row."""

    settings: dict[str, Any]
    """The settings that hold for it."""
    vision_ranges: list[tuple[int, int]]
    """Half-open ranges of positions of its vision tokens."""
    ranked_ranges: list[tuple[int, int]]
    """Of those that can be evicted."""
    timeline: list[Held]
    """Each length at which a count of blocks changes."""
    layers: list[LayerReport]
    """Empty unless rows are remembered: core selection, text eviction, or the
    `introspection` setting."""
