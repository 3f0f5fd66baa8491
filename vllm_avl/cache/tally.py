"""Counts what adaptive requests gave back, on the scheduler's side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_avl.metrics.collectors import Message
from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import Stock, key
from vllm_avl.plan import Plan, count
from vllm_avl.policies import POLICIES


@dataclass
class Tally:
    """What the steps since the last message added, and what live requests gave back."""

    counts: Counts = field(default_factory=Counts)
    _returned: dict[str, list[Hashable]] = field(default_factory=dict)
    """What each live request gave back: a block's hash, or something of its own."""
    _holders: Counter[Hashable] = field(default_factory=Counter)
    """Of each such block: stock would hold it once for all who share it."""

    def compacted(self, plan: Plan) -> None:
        """Count what a prompt's compaction stores and evicts."""
        self.counts.count(key("requests_adapted"))
        num_evicted = plan.private_from * plan.block_size
        if POLICIES[plan.config.policy].ranks_text:
            self.counts.count(key("mixed_tokens_evicted"), num_evicted)
            return
        num_vision = count(plan.vision_ranges)
        self.counts.count(key("vision_tokens_evicted"), num_evicted)
        self.counts.count(key("vision_tokens_stored"), num_vision - num_evicted)
        num_text = plan.num_prompt_tokens - num_vision
        self.counts.count(key("text_tokens_stored"), num_text)

    def text_aged(self, num_tokens: int) -> None:
        """Count text that has left its window."""
        self.counts.count(key("text_tokens_evicted"), num_tokens)

    def left_alone(self, reason: Stock) -> None:
        """Count a request that is served as stock."""
        self.counts.count(key("requests_left_alone", reason))

    def gave_back(self, request_id: str, blocks: Sequence[KVCacheBlock]) -> None:
        """Count blocks that a live request is about to give back."""
        # A block that somebody else still holds does not go to the pool.
        freed = [block for block in blocks if block.ref_cnt == 1]
        keys: list[Hashable] = [block.block_hash or object() for block in freed]
        self._returned.setdefault(request_id, []).extend(keys)
        self._holders.update(keys)
        self.counts.count(key("blocks_freed_early"), len(freed))

    def forget(self, request_id: str) -> None:
        """Take a request that holds nothing any more out of the live ones."""
        for block in self._returned.pop(request_id, ()):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]

    def take(self, pool: BlockPool, block_bytes: int, *, engaged: bool) -> Message:
        """Return what to report after a step, and start anew.

        Args:
            pool: the engine's blocks.
            block_bytes: bytes of a block, over all layers of a rank.
            engaged: whether new requests are adapted.
        """
        held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        stock = held + len(self._holders)
        levels = {
            key("requests_running"): len(self._returned),
            key("kv_blocks_held"): held,
            key("kv_blocks_stock"): stock,
            key("kv_bytes_held"): held * block_bytes,
            key("kv_bytes_stock"): stock * block_bytes,
            key("engaged"): int(engaged),
        }
        return Message(self.counts.take(), levels)
