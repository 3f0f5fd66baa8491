"""vLLM's offloading to the host beside requests that give their prompts back early.

vLLM's OffloadingConnector copies a block a step late, goes by a request's hashes and by
the table of its blocks, and minds a copy in flight where a block is allocated anew once
its request has finished. An adaptive request's prompt goes back to the pool while it
runs, its kept rows go to blocks that no table shows, and what it answers is nobody
else's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_avl.scheduler.manager import AVLManager


def let_blocks_go_early(
    offloading: OffloadingConnectorScheduler, manager: AVLManager, num_scoring: int
) -> None:
    """Have `offloading` store and find prompts alone, and mind blocks given back.

    Args:
        offloading: the connector's part in the scheduler.
        manager: of the adaptive group's blocks.
        num_scoring: tokens of a prompt that are computed in any case.
    """
    ended: set[str] = set()
    """Requests whose prompt has been handed over; its blocks may be others' by now."""
    _limit_loads(offloading, manager, ended)
    _limit_stores(offloading, ended)
    _mind_blocks(offloading, manager, ended)
    _store_in_front_of_scoring(offloading, num_scoring)


def _limit_loads(
    offloading: OffloadingConnectorScheduler, manager: AVLManager, ended: set[str]
) -> None:
    """Leave the rows that score to compute."""
    original = offloading.get_num_new_matched_tokens
    # It leaves a token more to compute beside groups that are not whole prefixes.
    more = int(bool(offloading._sliding_window_groups))

    @functools.wraps(original)
    def get_num_new_matched_tokens(
        request: Request,
        num_computed_tokens: int,
        max_num_new_tokens: int | None = None,
    ) -> tuple[int | None, bool]:
        ended.discard(request.request_id)
        plan = manager.plan_of(request.request_id)
        if plan is not None:
            most = max(plan.max_hit_tokens + more - num_computed_tokens, 0)
            if max_num_new_tokens is None or most < max_num_new_tokens:
                max_num_new_tokens = most
        return original(request, num_computed_tokens, max_num_new_tokens)

    offloading.get_num_new_matched_tokens = (  # type: ignore[method-assign]
        get_num_new_matched_tokens
    )


def _limit_stores(offloading: OffloadingConnectorScheduler, ended: set[str]) -> None:
    """Store no answer that has seen less than all, and nothing of a stale table."""
    original = offloading._calc_num_offloadable_tokens

    @functools.wraps(original)
    def calc_num_offloadable_tokens(
        req_status: RequestOffloadState, num_computed_tokens: int
    ) -> int:
        if req_status.req.request_id in ended:
            return 0
        return original(req_status, num_computed_tokens)

    offloading._calc_num_offloadable_tokens = (  # type: ignore[method-assign]
        calc_num_offloadable_tokens
    )


def _mind_blocks(
    offloading: OffloadingConnectorScheduler, manager: AVLManager, ended: set[str]
) -> None:
    """Wait for a copy before its block is written again, whoever gets it, and when."""
    original = offloading.build_connector_meta

    @functools.wraps(original)
    def build_connector_meta(scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        ending = manager.ending
        for request_id in ending:
            private = manager.adapted[request_id].private
            offloading._current_batch_allocated_block_ids.update(
                block.block_id for block in private
            )
        meta = original(scheduler_output)
        for job_id, job in meta.store_jobs.items():
            if manager.plan_of(job.req_id) is not None:
                _fence_now(offloading, job_id)
        ended.update(ending)
        ended.difference_update(scheduler_output.finished_req_ids)
        return meta

    offloading.build_connector_meta = build_connector_meta  # type: ignore[method-assign]


def _store_in_front_of_scoring(
    offloading: OffloadingConnectorScheduler, num_scoring: int
) -> None:
    """Store what a sliding window needs where an adaptive request's load ends, too."""
    original = offloading._reachable_store_block_mask

    @functools.wraps(original)
    def reachable_store_block_mask(
        *, reachable_boundaries: Sequence[int], **where: Any
    ) -> list[bool] | None:
        # The first is the last prompt token: where stock's load ends.
        scoring = [max(end + 1 - num_scoring, 0) for end in reachable_boundaries[:1]]
        boundaries = *reachable_boundaries, *scoring
        return original(reachable_boundaries=boundaries, **where)

    offloading._reachable_store_block_mask = (  # type: ignore[method-assign]
        reachable_store_block_mask
    )


def _fence_now(offloading: OffloadingConnectorScheduler, job_id: int) -> None:
    """Mind all blocks of a job from now on, as it does those of sliding windows."""
    job = offloading._jobs[job_id]
    deferred = job.deferred_fence_block_ids or []
    for block_id in deferred:
        offloading._block_id_to_pending_jobs.setdefault(block_id, set()).add(job_id)
    job.fenced_block_ids = [*(job.fenced_block_ids or ()), *deferred]
    job.deferred_fence_block_ids = []
