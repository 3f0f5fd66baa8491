"""What a request stores and reads, layer by layer, for people and tests to look at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress

import torch

from vllm_avl.layers import layer_number
from vllm_avl.plan import Plan, count
from vllm_avl.reports import (
    CoreSelection,
    Held,
    LayerReport,
    RequestReport,
    RequestSummary,
)
from vllm_avl.worker.request import RequestState
from vllm_avl.worker.rows import LayerRows


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
        layers=sorted(
            (
                _report_layer(layer_number(name) or 0, rows, state)
                for name, rows in state.layers.items()
                if not rows.of_drafter
            ),
            key=lambda layer: layer.layer,
        ),
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


def _report_layer(number: int, rows: LayerRows, state: RequestState) -> LayerReport:
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
    return LayerReport(number, core, secondary, evicted, text, history)
