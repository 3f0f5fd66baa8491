"""Frees what a request has evicted and keeps what is written from being shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_avl.cache.tally import Tally
from vllm_avl.plan import Plan


class AVLManager(FullAttentionManager):
    """Block manager of the adaptive attention group.

    Holds the plan of every admitted adaptive request, from its first prefix-cache
    look-up until its blocks are freed (finish, abort, preemption).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, Plan] = {}
        self.tally = Tally()
        self._evicting: dict[str, Request] = {}
        self._num_released: dict[str, int] = {}

    def admit(self, request: Request, plan: Plan) -> None:
        """Hold `request` to `plan` until its blocks are freed."""
        self.plans[request.request_id] = plan
        self._evicting[request.request_id] = request

    def leave_alone(self, request_id: str) -> None:
        """Forget a plan under which nothing has happened yet."""
        self.plans.pop(request_id, None)
        self._evicting.pop(request_id, None)

    def take_compactions(self, scheduled: dict[str, int]) -> dict[str, Plan]:
        """Return the plans of the requests whose prompt ends in the scheduled step.

        Call after the scheduler has advanced `num_computed_tokens`.

        Args:
            scheduled: number of tokens scheduled in the step, by request id.
        """
        compactions = {}
        for request_id, request in self._evicting.items():
            num_scheduled = scheduled.get(request_id, 0)
            computed = request.num_computed_tokens
            plan = self.plans[request_id]
            if computed - num_scheduled < plan.num_prompt_tokens <= computed:
                assert computed == plan.num_prompt_tokens, "a chunk crossed the prompt"
                self._assert_writable(request_id, plan)
                compactions[request_id] = plan
                if request.num_output_tokens == 0:
                    self.tally.compacted(plan)
        return compactions

    def new_step_starts(self) -> None:
        """Free what settled steps have evicted before anybody asks for blocks."""
        for request_id, request in list(self._evicting.items()):
            settled = request.num_computed_tokens - request.num_in_flight_tokens
            self._release(request_id, settled)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the head blocks once the step that evicted them is settled."""
        if request_id in self._evicting:
            self._release(request_id, processed_computed_tokens)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash blocks for reuse, up to the first one that is ever written again."""
        plan = self.plans.get(request.request_id)
        if plan is not None:
            num_tokens = min(num_tokens, plan.private_from * self.block_size)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval,
            replay_boundaries=replay_boundaries,
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return its blocks."""
        self.plans.pop(request_id, None)
        self._evicting.pop(request_id, None)
        self._num_released.pop(request_id, None)
        self.tally.forget(request_id)
        return super().pop_blocks_for_free(request_id)

    def _release(self, request_id: str, num_settled_tokens: int) -> None:
        plan = self.plans[request_id]
        freed = plan.num_freed_blocks(num_settled_tokens)
        before = self._num_released.get(request_id, 0)
        if freed > before:
            self._num_released[request_id] = freed
            blocks = self.req_to_blocks[request_id]
            self.tally.gave_back(request_id, blocks[before:freed])
            num_text_blocks = freed - max(before, plan.private_from)
            self.tally.text_aged(max(num_text_blocks, 0) * plan.block_size)
            self._remove_blocks_in_range(request_id, 0, freed)
        if num_settled_tokens >= plan.num_prompt_tokens and plan.text_window is None:
            del self._evicting[request_id]

    def _assert_writable(self, request_id: str, plan: Plan) -> None:
        blocks = self.req_to_blocks[request_id]
        for block in blocks[plan.private_from : plan.num_full_blocks]:
            shared = block.ref_cnt != 1 or block.block_hash is not None
            assert not shared, f"{request_id} would write the shared {block}"
