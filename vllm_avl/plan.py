"""Decides how much of a request's vision is stored: the integers both sides agree on.

The plan follows from prompt length, vision ranges, block size and ratio alone. The
scheduler makes it once and sends it to the workers, which decide only WHICH rows stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one request's prompt blocks.

    After the chunk that holds the last prompt token, the kept rows of the full prompt
    blocks lie in the last `num_stored_blocks` of them; the blocks before are free.
    """

    num_prompt_tokens: int
    block_size: int
    num_full_blocks: int
    num_stored_blocks: int
    vision_ranges: tuple[tuple[int, int], ...]
    """Half-open token ranges of the vision tokens inside the full blocks."""
    num_stored_vision: int
    """Vision rows kept inside the full blocks: exactly fills `num_stored_blocks`."""
    num_scoring_rows: int
    """Last prompt tokens whose attention ranks the vision tokens."""

    @property
    def num_freed_blocks(self) -> int:
        """Blocks at the head of the request that go back to the pool."""
        return self.num_full_blocks - self.num_stored_blocks

    @property
    def private_from(self) -> int:
        """First block that is written again: it and all behind it are never shared."""
        return self.num_freed_blocks

    @property
    def num_freed_tokens(self) -> int:
        """Token slots at the head that are never read again."""
        return self.num_freed_blocks * self.block_size

    @property
    def num_vision_tokens(self) -> int:
        """Vision tokens inside the full blocks, kept or not."""
        return sum(end - start for start, end in self.vision_ranges)

    @property
    def max_hit_tokens(self) -> int:
        """Longest prefix-cache hit the request may take, in tokens.

        It ends where the request's own writes begin, and leaves the scoring rows to
        the chunk that compacts.
        """
        blocks_before_scoring = (
            self.num_prompt_tokens - self.num_scoring_rows
        ) // self.block_size
        return min(self.private_from, blocks_before_scoring) * self.block_size


def make_plan(
    num_prompt_tokens: int,
    vision_ranges: Sequence[tuple[int, int]],
    block_size: int,
    store_ratio: float,
    observation_window: int = 1,
) -> Plan | None:
    """Plan one request, or return None where no block would come free.

    Args:
        num_prompt_tokens: length of the prompt, vision placeholders included.
        vision_ranges: half-open, ascending, disjoint ranges of embedded vision tokens.
        block_size: tokens a KV block holds.
        store_ratio: fraction of the vision tokens to store (the paper's S).
        observation_window: last prompt tokens that score.
    """
    num_full_blocks = num_prompt_tokens // block_size
    num_full_tokens = num_full_blocks * block_size
    ranges = tuple(
        (start, min(end, num_full_tokens))
        for start, end in vision_ranges
        if start < min(end, num_full_tokens)
    )
    num_vision = sum(end - start for start, end in ranges)
    num_text = num_full_tokens - num_vision
    num_kept = num_text + ceil_ratio(store_ratio, num_vision)
    num_stored_blocks = -(-num_kept // block_size)
    if num_stored_blocks == num_full_blocks:
        return None
    return Plan(
        num_prompt_tokens=num_prompt_tokens,
        block_size=block_size,
        num_full_blocks=num_full_blocks,
        num_stored_blocks=num_stored_blocks,
        vision_ranges=ranges,
        num_stored_vision=num_stored_blocks * block_size - num_text,
        # From the last image on at most: its encoder output is then the only one
        # that the last chunk can be waiting for.
        num_scoring_rows=min(
            observation_window, num_prompt_tokens - vision_ranges[-1][0]
        ),
    )


def ceil_ratio(ratio: float, count: int) -> int:
    """ceil(ratio · count) with the ratio read as the decimal a person wrote."""
    return int((Decimal(str(ratio)) * count).to_integral_value(ROUND_CEILING))


def limit_chunk(plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Shorten a prefill chunk so that compaction sees what it needs.

    A chunk never crosses the prompt's end, and the one that ends there holds all
    scoring rows (at least two tokens: a lone last token looks like a decode step).

    Returns:
        How many tokens to compute now; 0 means wait for a step with more room.
    """
    if num_computed_tokens >= plan.num_prompt_tokens:
        return num_new_tokens
    remaining = plan.num_prompt_tokens - num_computed_tokens
    if num_new_tokens >= remaining:
        return remaining
    last_chunk = min(max(plan.num_scoring_rows, 2), plan.num_prompt_tokens)
    return max(min(num_new_tokens, remaining - last_chunk), 0)
