"""What a request stores and reads, layer by layer, for people and tests to look at."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_avl.backend.request import RequestState
from vllm_avl.backend.rows import LayerRows


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


@dataclass(frozen=True)
class RequestReport:
    """One adaptive request on one rank, after its last step."""

    request_id: str
    policy: str
    num_tokens: int
    """Length of the request, evicted or not."""
    num_prompt_tokens: int
    num_refreshes: int
    num_blocks_held: int
    num_blocks_freed: int
    """Blocks that stock vLLM would hold besides."""
    layers: list[LayerReport]
    """Empty unless rows are remembered: core selection, text eviction, or the
    `introspection` setting."""


def report(request_id: str, state: RequestState) -> RequestReport:
    """Describe `state`; may be called between any two steps."""
    plan = state.plan
    freed = plan.num_freed_blocks(state.num_tokens)
    return RequestReport(
        request_id=request_id,
        policy=plan.config.policy,
        num_tokens=state.num_tokens,
        num_prompt_tokens=plan.num_prompt_tokens,
        num_refreshes=state.num_refreshes,
        num_blocks_held=-(-state.num_tokens // plan.block_size) - freed,
        num_blocks_freed=freed,
        layers=[
            _report_layer(index, rows, state)
            for index, rows in sorted(state.layers.items())
        ],
    )


def _report_layer(index: int, rows: LayerRows, state: RequestState) -> LayerReport:
    plan = state.plan
    num_secondary = plan.num_stored_blocks - plan.num_core_blocks
    border = num_secondary * plan.block_size
    ranked = set(state.candidates.tolist())
    appended = range(rows.end, state.num_tokens)
    core, secondary, evicted, text = [], [], [], []
    for head in rows.positions.tolist():
        behind = set(head[:border])
        if rows.listed is not None:
            listed = zip(head, rows.listed.tolist(), strict=False)
            behind = {position for position, in_core in listed if not in_core}
        read = {*head, *appended} - behind
        core.append(sorted(read & ranked))
        secondary.append(sorted(behind))
        evicted.append(sorted(ranked - behind - read))
        text.append(sorted(read - ranked))
    return LayerReport(index, core, secondary, evicted, text)
