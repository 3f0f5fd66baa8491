"""Subclasses of vLLM's schedulers, chosen through its `scheduler_cls` setting.

The overridden hooks are private to vLLM: `check_seams` compares their parameters with
the ones written here before the engine starts.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_avl.cache.admission import plan_request
from vllm_avl.cache.manager import AVLManager
from vllm_avl.config import parse_config
from vllm_avl.plan import Plan, limit_chunk


class _Adaptive(Scheduler):
    """Plans requests, shapes their chunks and tells the workers what to compact."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._avl_config = parse_config(self.vllm_config.additional_config)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, AVLManager)
        self._avl_manager = manager

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        manager = self._avl_manager
        plan = manager.plans.get(request.request_id) or plan_request(
            request, self._avl_config, manager.block_size
        )
        if plan is None:
            return super()._get_local_prefix_cache_hit(request)
        manager.admit(request, plan)
        return super()._get_local_prefix_cache_hit(self._limit_hits(request, plan))

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        plan = self._avl_manager.plans.get(request.request_id)
        if plan is None:
            return num_new_tokens
        return limit_chunk(plan, num_computed_tokens, num_new_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        plans = self._avl_manager.take_compactions(output.num_scheduled_tokens)
        if plans:
            send_plans(output, plans)
        return output

    def _limit_hits(self, request: Request, plan: Plan) -> Request:
        """Return a view of `request` that knows only the hashes it may hit.

        The limit must hold before the search: cutting its result is not valid for
        every cache group.
        """
        hash_block_size = self.kv_cache_manager.block_pool.hash_block_size
        view = copy.copy(request)
        view.block_hashes = request.block_hashes[
            : plan.max_hit_tokens // hash_block_size
        ]
        return view


class AVLScheduler(_Adaptive):
    """vLLM's scheduler with adaptive requests."""


class AVLAsyncScheduler(_Adaptive, AsyncScheduler):
    """vLLM's asynchronous scheduler with adaptive requests."""


def send_plans(output: SchedulerOutput, plans: dict[str, Plan]) -> None:
    """Let `plans` travel to every worker with the step that compacts them."""
    output.avl_plans = plans  # type: ignore[attr-defined]


def received_plans(output: SchedulerOutput) -> dict[str, Plan]:
    """Plans that came with a step, by request id."""
    return getattr(output, "avl_plans", {})
