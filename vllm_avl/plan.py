"""Decides how much of a request is stored and read: the integers both sides agree on.

The plan follows from prompt length, vision ranges, block size and settings alone. The
scheduler makes it once and sends it to the workers, which decide only WHICH rows stay.
After that every count is a function of the request's number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal

from vllm_avl.config import AVLConfig
from vllm_avl.policies import POLICIES

TEXT_HEAVY_RATIO, TEXT_MIN_TOKENS = 0.7, 20


@dataclass(frozen=True, slots=True)
class TextWindow:
    """How much text stays (the paper's T), for the text behind the first image."""

    keep_ratio: float
    heavy_ratio: float
    """Part of what stays that the most attended tokens have; the rest is recent."""
    min_tokens: int

    def size(self, num_text: int) -> int:
        """Tokens that stay of `num_text`, before rounding to whole blocks."""
        return max(round_ratio(self.keep_ratio, num_text), self.min_tokens)

    def num_recent(self, num_text: int) -> int:
        """Most recent tokens, which are in the window whatever their score."""
        size = self.size(num_text)
        return size - round_ratio(self.heavy_ratio, size)


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one request's blocks.

    After the chunk that holds the last prompt token, the kept rows of the full prompt
    blocks lie in `num_stored_blocks` blocks of the request's own, and the prompt's are
    given back, unless it `shares` them. An ordinary decode step reads `num_core_blocks`
    blocks' worth of these rows: core and text. Each evicted block of text makes one
    stored block less.
    """

    config: AVLConfig
    """The request's settings."""
    num_prompt_tokens: int
    block_size: int
    num_full_blocks: int
    num_stored_blocks: int
    num_core_blocks: int
    """Blocks' worth of rows; `num_stored_blocks` where every step reads all of them."""
    vision_ranges: tuple[tuple[int, int], ...]
    """Half-open token ranges of all vision tokens of the prompt."""
    num_scoring_rows: int
    """Last prompt tokens whose attention ranks the rows."""
    text_window: TextWindow | None
    """None where text is never evicted."""
    shares: bool = False
    """Whether kept rows stay in the prompt's blocks, most of which others hold, too: a
    mask says which rows are kept. Known when the prompt ends; nothing is freed then."""

    @property
    def num_full_tokens(self) -> int:
        """Tokens of the full prompt blocks: those that can be ranked."""
        return self.num_full_blocks * self.block_size

    @property
    def ranked_ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open token ranges of the vision tokens inside the full blocks."""
        return clip(self.vision_ranges, self.num_full_tokens)

    @property
    def num_vision_tokens(self) -> int:
        """Vision tokens inside the full blocks, kept or not."""
        return count(self.ranked_ranges)

    @property
    def num_stored_vision(self) -> int:
        """Vision tokens stored by a policy that keeps text: fills the stored blocks."""
        return self.num_vision_tokens - self.num_evicted_rows

    @property
    def num_stored_rows(self) -> int:
        """Rows of the full prompt blocks that stay, text included."""
        return self.num_stored_blocks * self.block_size

    @property
    def num_evicted_rows(self) -> int:
        """Rows of the full prompt blocks that do not stay."""
        return self.num_full_tokens - self.num_stored_rows

    @property
    def num_core_rows(self) -> int:
        """Of these, how many an ordinary step reads."""
        return self.num_core_blocks * self.block_size

    @property
    def num_secondary_rows(self) -> int:
        """Rows that are stored, and read on refresh steps only."""
        return self.num_stored_rows - self.num_core_rows

    @property
    def num_core_vision(self) -> int:
        """Vision tokens in core, for a policy that keeps text."""
        return self.num_stored_vision - self.num_secondary_rows

    @property
    def has_core(self) -> bool:
        """Whether ordinary steps read less than what is stored."""
        return self.num_core_blocks < self.num_stored_blocks

    @property
    def first_stored_block(self) -> int:
        """Index of the first stored block; what was in front is given back."""
        return 0 if self.shares else self.num_full_blocks - self.num_stored_blocks

    @property
    def moves_rows(self) -> bool:
        """Whether kept rows are copied or moved, so that they need blocks of their own.

        Where all is stored and no text ages, the prompt's own blocks serve.
        """
        if self.shares:
            return False
        return self.first_stored_block > 0 or self.text_window is not None

    @property
    def max_hit_tokens(self) -> int:
        """Longest prefix-cache hit the request may take, in tokens.

        It leaves the scoring rows to the chunk that ends the prompt.
        """
        left = self.num_prompt_tokens - self.last_chunk
        return left // self.block_size * self.block_size

    @property
    def last_chunk(self) -> int:
        """Tokens that the chunk which ends the prompt holds at least.

        All scoring rows, and two: a lone last token looks like a decode step.
        """
        return min(max(self.num_scoring_rows, 2), self.num_prompt_tokens)

    def num_freed_blocks(self, num_tokens: int) -> int:
        """Blocks at the head that it gives back once `num_tokens` are computed."""
        if num_tokens < self.num_prompt_tokens or self.shares:
            return 0
        return self.first_stored_block + self.num_evicted_text_blocks(num_tokens)

    def num_text_tokens(self, num_tokens: int) -> int:
        """Text tokens that the window counts: all behind the first vision token."""
        first = self.vision_ranges[0][0]
        return num_tokens - first - count(self.vision_ranges)

    def num_evicted_text_blocks(self, num_tokens: int) -> int:
        """Blocks' worth of text rows evicted once `num_tokens` are computed.

        A path-independent form of "when a block's worth of rows is outside of the
        window, it goes": text outside of the window never shrinks.
        """
        if self.text_window is None:
            return 0
        num_text = self.num_text_tokens(num_tokens)
        outside = num_text - self.text_window.size(num_text)
        return max(outside // self.block_size, 0)

    def refreshes(self, num_computed: int, num_new: int) -> bool:
        """Whether a step of the answer scores what it reads, and reads all.

        Args:
            num_computed: tokens computed before the step, at least the prompt's.
            num_new: tokens of the step; several are the replay of a preempted request.
        """
        if not self.has_core and self.text_window is None:
            return False
        interval = self.config.refresh_interval
        step = num_computed - self.num_prompt_tokens + 1
        return num_new > 1 or interval <= 1 or step % interval == 0


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a worker is told of a request in the step that ends its prompt."""

    plan: Plan
    block_ids: tuple[int, ...]
    """[num_stored_blocks] where kept rows go, as the block manager counts blocks; the
    prompt's full blocks where these stay in them."""
    in_place: bool
    """Whether some of these are among the prompt's blocks, and rows move in them."""
    num_copied: int
    """Where no row moves: how many of these are copies of the prompt's blocks."""


def make_plan(
    num_prompt_tokens: int,
    vision_ranges: Sequence[tuple[int, int]],
    block_size: int,
    config: AVLConfig,
    last_encoded: int | None = None,
    max_num_tokens: int | None = None,
) -> Plan | None:
    """Plan one request, or return None where nothing would be saved.

    Args:
        num_prompt_tokens: length of the prompt, vision placeholders included.
        vision_ranges: half-open, ascending, disjoint ranges of embedded vision tokens,
            at least one.
        block_size: tokens a KV block holds.
        config: the request's settings.
        last_encoded: where the last placeholders of an encoder begin; by default
            where the last range does.
        max_num_tokens: the longest that prompt and answer can become; None where
            not known.
    """
    num_full_blocks = num_prompt_tokens // block_size
    num_vision = count(clip(vision_ranges, num_full_blocks * block_size))
    num_text = num_full_blocks * block_size - num_vision

    def blocks(ratio: float) -> int:
        return -(-(num_text + ceil_ratio(ratio, num_vision)) // block_size)

    num_stored_blocks = num_core_blocks = blocks(config.store_ratio)
    if config.refresh_interval > 1:
        num_core_blocks = blocks(config.read_ratio)
    window = None
    if config.text_keep_ratio < 1:
        window = TextWindow(config.text_keep_ratio, TEXT_HEAVY_RATIO, TEXT_MIN_TOKENS)
        if max_num_tokens is not None:
            most = max_num_tokens - vision_ranges[0][0] - count(vision_ranges)
            if most - window.size(most) < block_size:
                window = None
    assert num_core_blocks <= num_stored_blocks, "core is a part of what is stored"
    if window is None and num_core_blocks == num_full_blocks:
        return None
    policy = POLICIES[config.policy]
    # From the last picture on at most: its encoder output is then the only one that
    # the last chunk can be waiting for.
    first_scoring = vision_ranges[-1][0] if last_encoded is None else last_encoded
    if not policy.observes_vision:
        last_vision = min(vision_ranges[-1][1], num_prompt_tokens - 1)
        first_scoring = max(first_scoring, last_vision)
    return Plan(
        config=config,
        num_prompt_tokens=num_prompt_tokens,
        block_size=block_size,
        num_full_blocks=num_full_blocks,
        num_stored_blocks=num_stored_blocks,
        num_core_blocks=num_core_blocks,
        vision_ranges=tuple(vision_ranges),
        num_scoring_rows=min(
            config.observation_window or policy.window,
            num_prompt_tokens - first_scoring,
        ),
        text_window=window,
    )


PICTURE_TOKENS, TEXT_TOKENS = 1000, 32
"""What `pictures_free` takes pictures to be, and the text on either side of them."""


def pictures_free(
    num_pictures: int, block_size: int, config: AVLConfig
) -> tuple[int, int]:
    """Say what a prompt of pictures would give back.

    Returns:
        blocks that come free once it is computed, and its blocks.
    """
    vision = (TEXT_TOKENS, TEXT_TOKENS + num_pictures * PICTURE_TOKENS)
    num_tokens = vision[1] + TEXT_TOKENS
    plan = make_plan(num_tokens, [vision], block_size, config)
    freed = 0 if plan is None else plan.first_stored_block
    return freed, -(-num_tokens // block_size)


def clip(ranges: Sequence[tuple[int, int]], end: int) -> tuple[tuple[int, int], ...]:
    """Cut half-open ranges at `end`; what lies behind it goes."""
    return tuple((a, min(b, end)) for a, b in ranges if a < min(b, end))


def count(ranges: Sequence[tuple[int, int]]) -> int:
    """Tokens in half-open, disjoint ranges."""
    return sum(end - start for start, end in ranges)


def ceil_ratio(ratio: float, count: int) -> int:
    """ceil(ratio · count) with the ratio read as the decimal a person wrote."""
    return int((Decimal(str(ratio)) * count).to_integral_value(ROUND_CEILING))


def round_ratio(ratio: float, count: int) -> int:
    """Round ratio · count half to even, with the ratio read as `ceil_ratio` does."""
    return int((Decimal(str(ratio)) * count).to_integral_value(ROUND_HALF_EVEN))


def limit_chunk(plan: Plan, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Shorten a prefill chunk so that compaction sees what it needs.

    A chunk never crosses the prompt's end, and the one that ends there holds
    `plan.last_chunk` tokens at least.

    Returns:
        How many tokens to compute now; 0 means wait for a step with more room.
    """
    if num_computed_tokens >= plan.num_prompt_tokens:
        return num_new_tokens
    remaining = plan.num_prompt_tokens - num_computed_tokens
    if num_new_tokens >= remaining:
        return remaining
    return max(min(num_new_tokens, remaining - plan.last_chunk), 0)
