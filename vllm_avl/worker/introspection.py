"""What a request stores and reads, layer by layer, for people and tests to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch

from vllm_avl.plan import Plan, count
from vllm_avl.worker.request import RequestState
from vllm_avl.worker.rows import LayerRows


@dataclass(frozen=True)
class CoreSelection:
    """Core as it was selected at one step."""

    num_tokens: int
    """Length of the request after that step."""
    core: list[list[int]]
    """As `LayerReport.core`."""


@dataclass(frozen=True)
class Held:
    """The blocks of a request at one length."""

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


def summarize(request_id: str, state: RequestState) -> RequestSummary:
    """Count what a request stores; may be called between any two steps."""
    plan = state.plan
    freed = plan.num_freed_blocks(state.num_tokens)
    return RequestSummary(
        request_id=request_id,
        running=state.running,
        policy=plan.config.policy,
        num_tokens=state.num_tokens,
        num_prompt_tokens=plan.num_prompt_tokens,
        num_vision_tokens=count(plan.vision_ranges),
        num_refreshes=state.num_refreshes,
        num_blocks_held=-(-state.num_tokens // plan.block_size) - freed,
        num_blocks_freed=freed,
    )


def report(request_id: str, state: RequestState) -> RequestReport:
    """Describe `state`; may be called between any two steps."""
    plan = state.plan
    return RequestReport(
        **vars(summarize(request_id, state)),
        settings=plan.config.model_dump(),
        vision_ranges=list(plan.vision_ranges),
        ranked_ranges=list(plan.ranked_ranges),
        timeline=list(timeline(plan, state.num_tokens)),
        layers=[
            _report_layer(index, rows, state)
            for index, rows in sorted(state.layers.items())
        ],
    )


def timeline(plan: Plan, num_tokens: int) -> Iterator[Held]:
    """Yield how many blocks were held as a request grew to `num_tokens`."""
    last = None
    for length in range(plan.num_prompt_tokens, num_tokens + 1):
        stock = -(-length // plan.block_size)
        if last is None:
            yield Held(length, stock, stock)
        now = stock - plan.num_freed_blocks(length), stock
        if now != last or length == num_tokens:
            yield Held(length, *now)
        last = now


def _report_layer(index: int, rows: LayerRows, state: RequestState) -> LayerReport:
    ranked = set(state.candidates.tolist())
    appended = range(rows.start + rows.num_slots, state.num_tokens)
    mask = rows.mask()
    stays = rows.stays()
    every = torch.ones_like(rows.positions, dtype=torch.bool)
    masks = [(every if given is None else given).tolist() for given in (stays, mask)]
    core, secondary, evicted, text = [], [], [], []
    for head, kept, listed in zip(rows.positions.tolist(), *masks, strict=True):
        stored = set(compress(head, kept))
        behind = stored - set(compress(head, listed))
        read = (stored - behind) | set(appended)
        core.append(sorted(read & ranked))
        secondary.append(sorted(behind))
        evicted.append(sorted(ranked - behind - read))
        text.append(sorted(read - ranked))
    history = [
        CoreSelection(num_tokens, core)
        for num_tokens, core in rows.history.among(state.candidates)
    ]
    return LayerReport(index, core, secondary, evicted, text, history)
