"""Gives requests blocks of their own for what they keep, and the prompt's back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from vllm_avl.plan import Compaction, Plan
from vllm_avl.scheduler.tally import Tally


@dataclass
class Adapted:
    """What the manager knows of one adaptive request."""

    request: Request
    plan: Plan
    loads: bool = False
    """Whether blocks are allocated for what a connector brings, and no step is."""
    ends: bool = False
    """Whether the step that ends the prompt has been allocated."""
    private: list[KVCacheBlock] = field(default_factory=list)
    """Blocks taken for kept rows, until they stand in the request's list of blocks."""
    targets: list[KVCacheBlock] | None = None
    """Where the kept rows go: private blocks, or the prompt's own."""
    num_released: int = 0
    """Blocks at the head of the request's list that are null."""

    @property
    def retired(self) -> bool:
        """Whether the prompt's blocks have been given back."""
        return self.ends and self.targets is None


class AVLManager(FullAttentionManager):
    """Block manager of the adaptive attention group.

    Holds the plan of every admitted adaptive request, from its first prefix-cache
    look-up until its blocks are freed (finish, abort, preemption). The prompt's blocks
    stay as the model computed them, hashed and shared; kept rows go to private blocks,
    which nobody else ever sees, or stay in the prompt's where copies would want more
    blocks than come free.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapted: dict[str, Adapted] = {}
        self.tally = Tally()
        self.num_spare = 0
        """Free blocks that private ones leave to steps in flight."""
        self.copies_shared = False
        """Whether a block may never be shared once a prompt has ended: the worker keeps
        what it knows of a row by the row's place in the pool."""
        self.writes_prompts = True
        """Whether kept rows may take the place of a prompt's; not where somebody reads
        its blocks behind our back."""
        self.num_drafts = 0
        """Tokens of a step that may be rejected, at most."""
        self._ending: list[str] = []
        """Requests whose prompt ends in the step that is being scheduled."""

    def plan_of(self, request_id: str) -> Plan | None:
        """Return the plan of an adaptive request, None for others."""
        known = self.adapted.get(request_id)
        return None if known is None else known.plan

    @property
    def ending(self) -> tuple[str, ...]:
        """Requests whose prompt ends in the step that is being scheduled."""
        return tuple(self._ending)

    def admit(self, request: Request, plan: Plan) -> None:
        """Hold `request` to `plan` until its blocks are freed."""
        self.adapted[request.request_id] = Adapted(request, plan)

    def leave_alone(self, request_id: str) -> None:
        """Forget a plan under which nothing has happened yet."""
        self.adapted.pop(request_id, None)

    def expect(self, request_id: str, loads: bool) -> None:
        """Note whether a KV connector loads blocks of `request_id` between steps."""
        known = self.adapted.get(request_id)
        if known is not None:
            known.loads = loads

    # A request's blocks, step by step.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Count blocks, and those that the prompt's end needs besides.

        Those are copies of blocks that may not be shared. Kept rows may take the place
        of blocks that nobody else holds; others have to be there. So a request that is
        alone never waits for itself. A hit of this request may share blocks of one
        whose prompt ends in the same step, which then needs more.
        """
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )
        if not self.copies_shared:
            return needed
        hits = {block.block_id for block in new_computed_blocks if block.ref_cnt}
        needed += sum(self._num_lacking(name, hits) for name in self._ending)
        if self._ends_at(request_id, num_tokens):
            held = self.req_to_blocks.get(request_id, ())
            # Nobody has counted this request's own reference to its hits yet.
            shared = [b.ref_cnt > 1 for b in held] + [
                b.ref_cnt > 0 for b in new_computed_blocks
            ]
            needed += self._num_needed(self.adapted[request_id].plan, shared)
        return needed

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate, and take the private blocks that were counted."""
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if self._ends_at(request_id, num_tokens) and not self.adapted[request_id].loads:
            self.adapted[request_id].ends = True
            self._ending.append(request_id)
        if self.copies_shared:
            for name in self._ending:
                self._take_private(name, self._num_lacking(name, ()))
        return new

    def choose_targets(self) -> None:
        """Say where kept rows go, of the prompts that end in the scheduled step.

        Call before others than requests hold blocks: a KV connector that copies a block
        shares it with nobody.
        """
        for request_id in self._ending:
            known = self.adapted[request_id]
            if known.targets is None:
                if self._shares(known):
                    known.plan = replace(known.plan, shares=True)
                known.targets = self._choose_targets(request_id)

    def take_compactions(self, scheduled: dict[str, int]) -> dict[str, Compaction]:
        """Return what workers are told of the prompts that end in the scheduled step.

        Call after the scheduler has advanced `num_computed_tokens`.

        Args:
            scheduled: number of tokens scheduled in the step, by request id.

        Raises:
            RuntimeError: a chunk crosses its prompt's end, or kept rows would overwrite
                what others read.
        """
        self.choose_targets()
        compactions = {}
        for request_id in self._ending:
            known = self.adapted[request_id]
            computed = known.request.num_computed_tokens
            if request_id not in scheduled or computed != known.plan.num_prompt_tokens:
                raise RuntimeError(f"{request_id}: a chunk crossed the prompt's end")
            plan, targets = known.plan, known.targets
            assert targets is not None
            num_private = len(known.private)
            compactions[request_id] = Compaction(
                plan,
                tuple(block.block_id for block in targets),
                in_place=plan.moves_rows and num_private < plan.num_stored_blocks,
                num_copied=0 if plan.moves_rows else num_private,
            )
            if known.request.num_output_tokens == 0:
                self.tally.compacted(plan)
        self._ending.clear()
        return compactions

    def new_step_starts(self) -> None:
        """Free what settled steps have let go before anybody asks for blocks."""
        for known in self.adapted.values():
            if known.ends and (not known.retired or known.plan.text_window is not None):
                request = known.request
                settled = request.num_computed_tokens - request.num_in_flight_tokens
                self._release(request.request_id, settled)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what nobody reads any more once the step that let it go is settled."""
        if request_id in self.adapted:
            self._release(request_id, processed_computed_tokens)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any
    ) -> None:
        """Add hits, and note which of them others gave back."""
        self.tally.holds(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Hash blocks for reuse; none of an answer that has seen less than all."""
        request_id = request.request_id
        plan = self.plan_of(request_id)
        if plan is not None:
            num_tokens = min(num_tokens, plan.num_full_tokens)
        before = self.num_cached_block.get(request_id, 0)
        super().cache_blocks(
            request,
            num_tokens,
            retention_interval,
            replay_boundaries=replay_boundaries,
        )
        after = self.num_cached_block.get(request_id, 0)
        self.tally.holds(self.req_to_blocks[request_id][before:after])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request and return its blocks."""
        known = self.adapted.pop(request_id, None)
        blocks = super().pop_blocks_for_free(request_id)
        if known is not None:
            if request_id in self._ending:
                self._ending.remove(request_id)
            blocks = known.private + blocks
        self.tally.lets_go(blocks)
        self.tally.forget(request_id)
        return blocks

    # The prompt's end.

    def _ends_at(self, request_id: str, num_tokens: int) -> bool:
        known = self.adapted.get(request_id)
        return (
            known is not None
            and not known.ends
            and num_tokens >= known.plan.num_prompt_tokens
        )

    def _num_needed(self, plan: Plan, shared: Sequence[bool]) -> int:
        """Private blocks that a prompt must have whose blocks may be `shared`."""
        if not self.copies_shared:
            return 0
        num_shared = sum(shared[: plan.num_full_blocks])
        if not plan.moves_rows:
            return num_shared
        num_own = plan.num_full_blocks - num_shared if self.writes_prompts else 0
        return max(plan.num_stored_blocks - num_own, 0)

    def num_at_once(self, plan: Plan) -> int:
        """Blocks that a request alone needs at its prompt's end."""
        own = [False] * plan.num_full_blocks
        prompt = -(-plan.num_prompt_tokens // plan.block_size)
        return prompt + self._num_needed(plan, own)

    def _num_lacking(self, request_id: str, hits: Collection[int]) -> int:
        """Private blocks that an ending request lacks once others hold `hits`, too."""
        known = self.adapted[request_id]
        blocks = self.req_to_blocks[request_id]
        shared = [b.ref_cnt > 1 or b.block_id in hits for b in blocks]
        return max(self._num_needed(known.plan, shared) - len(known.private), 0)

    def _shares(self, known: Adapted) -> bool:
        """Whether kept rows stay in the prompt's blocks.

        Copies would take more blocks than come free, where others hold most of these:
        a request never makes the pool hold more than stock would.
        """
        plan = known.plan
        if not plan.moves_rows or self.copies_shared:
            return False
        prompt = self.req_to_blocks[known.request.request_id][: plan.num_full_blocks]
        num_own = sum(block.ref_cnt == 1 for block in prompt)
        if num_own < plan.num_stored_blocks:
            return True
        return not self.writes_prompts and self._num_spare < plan.num_stored_blocks

    @property
    def _num_spare(self) -> int:
        return self.block_pool.get_num_free_blocks() - self.num_spare

    def _take_private(self, request_id: str, count: int) -> None:
        if count:
            new = self.block_pool.get_new_blocks(count)
            self.adapted[request_id].private += new
            self.tally.took_private(request_id, count)

    def _choose_targets(self, request_id: str) -> list[KVCacheBlock]:
        """Choose the blocks that kept rows go to.

        Where the prefix cache is on they are private as far as the pool goes; the rest
        are blocks of the prompt that nobody else holds, whose hashes go, the last
        first: what they are the end of stays in the cache.
        """
        known = self.adapted[request_id]
        plan = known.plan
        prompt = self.req_to_blocks[request_id][: plan.num_full_blocks]
        if not plan.moves_rows:
            return self._with_copies(request_id, prompt)
        if self.enable_caching or not self.writes_prompts:
            lacking = plan.num_stored_blocks - len(known.private)
            self._take_private(request_id, max(min(lacking, self._num_spare), 0))
        num_own = plan.num_stored_blocks - len(known.private)
        own = [block for block in prompt if block.ref_cnt == 1][::-1][:num_own]
        if len(own) < num_own:
            raise RuntimeError(f"{request_id} would write blocks that others read")
        self.block_pool.evict_blocks({block.block_id for block in own})
        return known.private + own[::-1]

    def _with_copies(
        self, request_id: str, prompt: Sequence[KVCacheBlock]
    ) -> list[KVCacheBlock]:
        """Return the prompt's blocks, private ones in place of those that are shared.

        Who shared some may be gone since these were taken: they stand for others then.
        """
        private = self.adapted[request_id].private
        num_shared = sum(block.ref_cnt > 1 for block in prompt)
        if self.copies_shared and num_shared > len(private):
            raise RuntimeError(f"{request_id} would share what it must not")
        shared_first = sorted(prompt, key=lambda block: block.ref_cnt == 1)
        copied = (block.block_id for block in shared_first)
        copies = dict(zip(copied, private, strict=False))
        return [copies.get(block.block_id, block) for block in prompt]

    def _release(self, request_id: str, num_settled_tokens: int) -> None:
        known = self.adapted[request_id]
        plan = known.plan
        if not known.ends or num_settled_tokens < plan.num_prompt_tokens:
            return
        if not known.retired:
            self._retire_prompt(request_id)
        # A worker lets text go by what a step had in front of its drafts.
        certain = max(num_settled_tokens - self.num_drafts, plan.num_prompt_tokens)
        freed = plan.num_freed_blocks(certain)
        if freed > known.num_released:
            blocks = self.req_to_blocks[request_id][known.num_released : freed]
            self.tally.evicted_text(request_id, blocks, plan)
            self._remove_blocks_in_range(request_id, known.num_released, freed)
            known.num_released = freed

    def _retire_prompt(self, request_id: str) -> None:
        """Let kept rows be the tail, and give the prompt's own blocks back, hashed."""
        known = self.adapted[request_id]
        plan, targets = known.plan, known.targets
        assert targets is not None
        blocks = self.req_to_blocks[request_id]
        prompt = blocks[: plan.num_full_blocks]
        kept = {block.block_id for block in targets}
        given_back = [block for block in prompt if block.block_id not in kept]
        self.tally.retired(request_id, prompt, targets, rewritten=plan.moves_rows)
        known.num_released = plan.first_stored_block
        nulls = [self._null_block] * known.num_released
        blocks[: plan.num_full_blocks] = nulls + targets
        known.private, known.targets = [], None
        # The prompt's end is the first to be evicted.
        self.block_pool.free_blocks(reversed(given_back))
