"""Counts what adaptive requests gave back, on the scheduler's side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_avl.messages import Statistics
from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import Stock, key
from vllm_avl.plan import Plan, count
from vllm_avl.policies import POLICIES


@dataclass
class Tally:
    """What the steps since the last message added, and what live requests gave back."""

    counts: Counts = field(default_factory=Counts)
    _private: Counter[str] = field(default_factory=Counter)
    """Blocks that each live request holds and stock would not."""
    _returned: dict[str, list[Hashable]] = field(default_factory=dict)
    """What each live request gave back: a block's hash, or something of its own."""
    _holders: Counter[Hashable] = field(default_factory=Counter)
    """Of each such block: stock would hold it once for all who share it."""
    _held: dict[int, Hashable] = field(default_factory=dict)
    """Blocks of `_holders` that somebody holds nevertheless, by block id."""

    def compacted(self, plan: Plan) -> None:
        """Count what a prompt's compaction stores and evicts."""
        self.counts.count(key("requests_adapted"))
        num_evicted = plan.num_evicted_rows
        if POLICIES[plan.config.policy].ranks_text:
            self.counts.count(key("mixed_tokens_evicted"), num_evicted)
            return
        num_vision = count(plan.vision_ranges)
        self.counts.count(key("vision_tokens_evicted"), num_evicted)
        self.counts.count(key("vision_tokens_stored"), num_vision - num_evicted)
        num_text = plan.num_prompt_tokens - num_vision
        self.counts.count(key("text_tokens_stored"), num_text)

    def left_alone(self, reason: Stock) -> None:
        """Count a request that is served as stock."""
        self.counts.count(key("requests_left_alone", reason))

    def took_private(self, request_id: str, num_blocks: int) -> None:
        """Count blocks that a request takes for what it keeps."""
        self._private[request_id] += num_blocks

    def retired(
        self,
        request_id: str,
        prompt: Sequence[KVCacheBlock],
        targets: Sequence[KVCacheBlock],
        *,
        rewritten: bool,
    ) -> None:
        """Count a prompt whose blocks `targets` are about to take the place of.

        Args:
            request_id: of the request.
            prompt: its full blocks.
            targets: what it holds from now on, some of `prompt` perhaps.
            rewritten: whether these, too, hold other rows than the prompt's.
        """
        own = {block.block_id for block in prompt}
        kept = {block.block_id for block in targets}
        num_new = len(kept - own)
        given_back = [block for block in prompt if block.block_id not in kept]
        freed = [block for block in given_back if block.ref_cnt == 1]
        self._private[request_id] = len(kept) if rewritten else num_new
        self._returned[request_id] = []
        self._gave_back(request_id, prompt if rewritten else given_back)
        self.lets_go(freed)
        self.counts.count(key("blocks_freed_early"), max(len(freed) - num_new, 0))

    def evicted_text(
        self, request_id: str, blocks: Sequence[KVCacheBlock], plan: Plan
    ) -> None:
        """Count blocks whose worth of text has left its window."""
        num_private = min(self._private[request_id], len(blocks))
        self._private[request_id] -= num_private
        # Behind the prompt's full blocks they are what stock would hold.
        self._gave_back(request_id, blocks[num_private:])
        self.counts.count(key("blocks_freed_early"), len(blocks))
        self.counts.count(key("text_tokens_evicted"), len(blocks) * plan.block_size)

    def holds(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Note that blocks are held which a live request may have given back."""
        if self._holders:
            for block in blocks:
                if block.block_hash in self._holders:
                    self._held[block.block_id] = block.block_hash

    def lets_go(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Note that a holder of blocks is about to free them."""
        if self._held:
            for block in blocks:
                if block.ref_cnt == 1:
                    self._held.pop(block.block_id, None)

    def forget(self, request_id: str) -> None:
        """Take a request that holds nothing any more out of the live ones."""
        self._private.pop(request_id, None)
        returned = self._returned.pop(request_id, ())
        for block in returned:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
        if returned:
            self._held = {b: k for b, k in self._held.items() if k in self._holders}

    def _gave_back(self, request_id: str, blocks: Sequence[KVCacheBlock]) -> None:
        keys: list[Hashable] = [block.block_hash or object() for block in blocks]
        self._returned[request_id].extend(keys)
        self._holders.update(keys)
        self.holds(blocks)

    def take(self, pool: BlockPool, block_bytes: int, *, engaged: bool) -> Statistics:
        """Return what to report after a step, and start anew.

        Args:
            pool: the engine's blocks.
            block_bytes: bytes of a block, over all layers of a rank.
            engaged: whether new requests are adapted.
        """
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        private = self._private.total()
        stock = held - private + len(self._holders) - len(self._held)
        levels = {
            key("requests_running"): len(self._returned),
            key("kv_blocks_held"): held,
            key("kv_blocks_private"): private,
            key("kv_blocks_stock"): stock,
            key("kv_bytes_held"): held * block_bytes,
            key("kv_bytes_stock"): stock * block_bytes,
            key("engaged"): int(engaged),
        }
        return Statistics(self.counts.take(), levels)
