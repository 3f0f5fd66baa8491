"""Subclasses of vLLM's schedulers, chosen through its `scheduler_cls` setting.

The overridden hooks are private to vLLM: `patches.SEAMS` holds them to the parameters
that are written here before the engine starts.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_avl.config import parse_config
from vllm_avl.messages import (
    received_counts,
    send_compactions,
    send_decision,
    send_statistics,
)
from vllm_avl.metrics.definitions import Stock
from vllm_avl.metrics.summary import describe_blocks, describe_settings
from vllm_avl.plan import Plan, limit_chunk
from vllm_avl.scheduler.admission import plan_request
from vllm_avl.scheduler.manager import AVLManager
from vllm_avl.scheduler.offloading import let_blocks_go_early
from vllm_avl.scheduler.pressure import Pressure
from vllm_avl.scheduler.spec import our_group
from vllm_avl.support import last_chunk

logger = logging.getLogger("vllm.avl")


class _Adaptive(Scheduler):
    """Plans requests, shapes their chunks and tells the workers what to compact."""

    _avl_steps_in_flight = False
    """Whether a step is scheduled before the last one has run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._avl_config = parse_config(self.vllm_config.additional_config)
        self._avl_groups = self.kv_cache_manager.coordinator.single_type_managers
        manager = self._avl_groups[our_group(self.kv_cache_config)]
        assert isinstance(manager, AVLManager)
        self._avl_manager = manager
        share_prompts_only(self.kv_cache_manager.coordinator, manager)
        num_scoring = last_chunk(self._avl_config)
        retain_in_front_of_scoring(self._avl_groups, num_scoring)
        # Kernels find what they know of a row by its place in the pool.
        manager.copies_shared = current_platform.is_cuda()
        # It saves what lies there when the layers have run.
        manager.writes_prompts = self.connector is None
        if self.connector is not None:
            limit_external_hits(self.connector, self._limited, manager)
            choose_targets_before(self.connector, manager)
        if isinstance(self.connector, OffloadingConnector):
            let_blocks_go_early(self.connector.scheduler, manager, num_scoring)
        # Rows of a picture that attend to all of it do not score.
        self._avl_whole_pictures = (
            self.scheduler_config.disable_chunked_mm_input
            or self.vllm_config.model_config.is_mm_prefix_lm
        )
        manager.num_drafts = self.num_spec_tokens
        self._avl_pressure = Pressure(self._avl_config)
        self._avl_decisions: dict[str, Plan | Stock] = {}
        settings = describe_settings(self._avl_config)
        blocks = describe_blocks(self._avl_config, manager.block_size)
        logger.info("%s; %s", settings, blocks)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> Any:
        manager = self._avl_manager
        plan = self._decide(request)
        if isinstance(plan, Stock):
            manager.leave_alone(request.request_id)
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        manager.admit(request, plan)
        view = self._limited(request)
        return super()._get_local_prefix_cache_hit(view, *args, **kwargs)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        # Before vLLM notes which pictures the chunk needs: what it notes for tokens
        # that are not computed after all would never be taken back.
        plan = self._avl_manager.plan_of(request.request_id)
        if plan is not None:
            num_new_tokens = limit_chunk(plan, num_computed_tokens, num_new_tokens)
        return super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )

    def _mark_prefix_replay(
        self, request: Request, num_hit_tokens: int, window_loaded: bool
    ) -> int:
        # A connector may bring the rows that score: they are computed again.
        self._avl_manager.expect(request.request_id, loads=False)
        replayed = super()._mark_prefix_replay(request, num_hit_tokens, window_loaded)
        plan = self._avl_manager.plan_of(request.request_id)
        if plan is None:
            return replayed
        most = plan.num_prompt_tokens - plan.last_chunk
        return max(replayed, num_hit_tokens - most)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        self._send_pictures(output)
        for new in output.scheduled_new_reqs:
            decision = self._avl_decisions.get(new.req_id)
            # A resumed request is among the new ones of model runner V2.
            if isinstance(decision, Stock) and self._is_first_run(new.req_id):
                self._avl_manager.tally.left_alone(decision)
        for request_id in output.finished_req_ids:
            self._avl_decisions.pop(request_id, None)
        if self._avl_steps_in_flight:
            # The next step may want blocks of each group for each request before
            # this one has settled: one, or as many as drafts fill.
            step = 1 + self.num_spec_tokens
            spare = sum(-(-step // group.block_size) for group in self._avl_groups)
            self._avl_manager.num_spare = len(self.running) * spare
        compactions = self._avl_manager.take_compactions(output.num_scheduled_tokens)
        if compactions:
            self._avl_decisions |= {name: c.plan for name, c in compactions.items()}
            send_compactions(output, compactions)
        return output

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
    ) -> dict[int, EngineCoreOutputs]:
        counts = received_counts(model_runner_output)
        self._avl_manager.tally.counts.add(counts)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                # They come with a request's first token.
                if output.prefill_stats is None:
                    continue
                decision = self._avl_decisions.get(output.request_id)
                if decision is not None:
                    send_decision(output, decision)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        made = super().make_stats(*args, **kwargs)
        if made is not None:
            config = self.kv_cache_config
            num_bytes = sum(tensor.size for tensor in config.kv_cache_tensors)
            message = self._avl_manager.tally.take(
                self.kv_cache_manager.block_pool,
                num_bytes // config.num_blocks,
                engaged=self._avl_pressure.engaged,
            )
            send_statistics(made, message)
        return made

    def _decide(self, request: Request) -> Plan | Stock:
        """Plan a request that wants blocks, until it has run for the first time."""
        known = self._avl_decisions.get(request.request_id)
        settled = request.num_preemptions or self._avl_config.engage == "always"
        if known is not None and settled:
            return replace(known, shares=False) if isinstance(known, Plan) else known
        manager = self._avl_manager
        decision = plan_request(
            request,
            self._avl_config,
            manager.block_size,
            self._chunk_unit,
            whole_pictures=self._avl_whole_pictures,
        )
        if isinstance(decision, Plan):
            pool = self.kv_cache_manager.block_pool
            num_blocks = pool.num_gpu_blocks - 1
            held = num_blocks - pool.get_num_free_blocks()
            wanted = self._blocks_wanted(request)
            if not self._avl_pressure.update(held, wanted, num_blocks):
                decision = Stock.NO_PRESSURE
            elif manager.num_at_once(decision) > num_blocks:
                decision = Stock.NO_ROOM
        self._avl_decisions[request.request_id] = decision
        return decision

    @property
    def _chunk_unit(self) -> int | None:
        """Tokens at multiples of which recurrent states are stored, chunk by chunk."""
        if not self.need_mamba_block_aligned_split:
            return None
        if self.mamba_partial_cache_hit:
            return self.hash_block_size
        return self.block_size

    def _blocks_wanted(self, request: Request) -> Iterator[int]:
        """Blocks that prompts lack: of `request`, running ones, and of who may come."""
        running = (
            r for r in self.running if r.num_computed_tokens < r.num_prompt_tokens
        )
        seats = self.max_num_running_reqs - len(self.running) - 1
        waiting = (other for other in self.waiting if other is not request)
        may_come = islice(waiting, max(seats, 0))
        for prompt in chain([request], running, may_come):
            lacking = prompt.num_tokens - prompt.num_computed_tokens
            # At most: sliding windows let blocks go again.
            yield sum(-(-lacking // group.block_size) for group in self._avl_groups)

    def _is_first_run(self, request_id: str) -> bool:
        return self.requests[request_id].num_preemptions == 0

    def _send_pictures(self, output: SchedulerOutput) -> None:
        """Let workers have the pictures that prefix-cache hits cover, too.

        vLLM leaves them out and does not send them when a preempted request resumes
        without those hits: the worker then fails, and with it the engine. To runner V2
        a request that resumes is a new one, and gets what it then needs; what it need
        not keep vLLM 0.33 tells it (`encoder_input_updates`), of what vLLM sent.
        """
        if self.use_v2_model_runner:
            return
        for new in output.scheduled_new_reqs:
            new.mm_features = self.requests[new.req_id].mm_features

    def _limited(self, request: Request) -> Request:
        """Return a view of `request` that knows only the hashes it may hit.

        The limit must hold before the search: cutting its result is not valid for
        every cache group. It leaves the rows that score to compute.
        """
        plan = self._avl_manager.plan_of(request.request_id)
        if plan is None:
            return request
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

    _avl_steps_in_flight = True


def limit_external_hits(
    connector: KVConnectorBase_V1,
    limited: Callable[[Request], Request],
    manager: AVLManager,
) -> None:
    """Let a connector find what the prefix cache may find, where it goes by hashes.

    One that goes by what a request says may load all of its prompt, between steps. That
    ends no prompt: the rows that score are computed behind it.
    """
    original = connector.get_num_new_matched_tokens

    @functools.wraps(original)
    def get_num_new_matched_tokens(
        request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        view = limited(request)
        num_tokens, between_steps = original(view, num_computed_tokens)
        manager.expect(request.request_id, loads=between_steps)
        return num_tokens, between_steps

    connector.get_num_new_matched_tokens = (  # type: ignore[method-assign]
        get_num_new_matched_tokens
    )


def choose_targets_before(connector: KVConnectorBase_V1, manager: AVLManager) -> None:
    """Let kept rows have their blocks before a connector holds some that it copies."""
    original = connector.build_connector_meta

    @functools.wraps(original)
    def build_connector_meta(output: SchedulerOutput) -> KVConnectorMetadata:
        manager.choose_targets()
        return original(output)

    connector.build_connector_meta = (  # type: ignore[method-assign]
        build_connector_meta
    )


def share_prompts_only(coordinator: KVCacheCoordinator, manager: AVLManager) -> None:
    """Let no cache group hash more of an adaptive request than its prompt.

    What follows has seen less than all, in the layers that are not adapted, too.
    """
    original = coordinator.cache_blocks

    @functools.wraps(original)
    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        plan = manager.plan_of(request.request_id)
        if plan is not None:
            num_computed_tokens = min(num_computed_tokens, plan.num_prompt_tokens)
        original(request, num_computed_tokens)

    coordinator.cache_blocks = cache_blocks  # type: ignore[method-assign]


def retain_in_front_of_scoring(
    groups: Sequence[SingleTypeKVCacheManager], num_scoring: int
) -> None:
    """Let sliding windows keep what a hit of an adaptive request ends at.

    vLLM may keep a window's blocks at the prompt's end alone, and a hit ends where all
    groups have one.

    Args:
        groups: of the cache.
        num_scoring: tokens of a prompt that are computed in any case.
    """
    for group in groups:
        if isinstance(group, SlidingWindowManager):
            original = group.cache_blocks

            @functools.wraps(original)
            def cache_blocks(
                request: Request,
                *args: Any,
                replay_boundaries: Sequence[int],
                original: Callable[..., None] = original,
                **kwargs: Any,
            ) -> None:
                scoring = max(request.num_prompt_tokens - num_scoring, 0)
                kept = *replay_boundaries, scoring
                original(request, *args, replay_boundaries=kept, **kwargs)

            group.cache_blocks = cache_blocks  # type: ignore[method-assign]
