"""What a worker remembers of an adaptive request, and what a step asks of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import torch

from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import Stage, key
from vllm_avl.plan import Compaction, Plan
from vllm_avl.policies import POLICIES, Policy
from vllm_avl.worker.rows import LayerRows
from vllm_avl.worker.seats import NEVER, SeatTable

LONGEST = 1 << 40
"""No request has as many tokens."""


@dataclass(frozen=True)
class Kernels:
    """What the kernels of a worker's device can do with core."""

    attend_scored: bool = False
    """Whether they attend every decode row that scores, not those with core alone."""
    choose_core: bool = False
    """Whether they choose core in the pass that scores."""
    num_lists: int = 0
    """Lists of core that full graphs read: none, 1, or one a KV head."""


@dataclass
class RequestState:
    """One adaptive request on this worker."""

    compaction: Compaction
    seats: SeatTable
    counts: Counts = field(default_factory=Counts)
    """The worker's."""
    kernels: Kernels = field(default_factory=Kernels)
    layers: dict[str, LayerRows] = field(default_factory=dict)
    """Stored rows by layer name; empty where nobody asks for them again."""
    memo: dict[str, Any] = field(default_factory=dict)
    """Shared by the layers, for the policy."""
    running: bool = True
    num_aged_blocks: int = 0
    """Blocks' worth of text that has left its window."""
    _ended: tuple[int, int] = 0, 0

    def __post_init__(self) -> None:
        self.seat = self.seats.take()
        plan, records = self.plan, self.seats.records
        self.seats.set_private(self.seat, self.compaction.block_ids)
        records["num_prompt"][self.seat] = plan.num_prompt_tokens
        records["first_block"][self.seat] = plan.first_stored_block
        if plan.has_core or plan.text_window is not None:
            interval = max(plan.config.refresh_interval, 1)
            records["interval"][self.seat] = interval
        records["is_scored"][self.seat] = self.keeps_sums or self.refreshes_core
        records["has_core"][self.seat] = plan.has_core
        records["shares"][self.seat] = plan.shares
        records["in_pass"][self.seat] = self.core_in_pass
        num_rankings = 2 if self.splits_heads else 1
        fits = self.kernels.num_lists >= num_rankings
        records["in_graph"][self.seat] = fits or not plan.has_core
        selected = (
            plan.num_core_rows if self.policy.ranks_text else plan.num_core_vision
        )
        records["num_selected"][self.seat] = selected
        self.plan_aging(0)

    @property
    def plan(self) -> Plan:
        """What becomes of it."""
        return self.compaction.plan

    @property
    def device(self) -> torch.device:
        """Of the cache."""
        return self.seats.private.device

    @property
    def num_tokens(self) -> int:
        """Length after the last step."""
        if self.running:
            return int(self.seats.records["num_tokens"][self.seat])
        return self._ended[0]

    @property
    def num_refreshes(self) -> int:
        """Steps that scored what is stored."""
        if self.running:
            return int(self.seats.records["num_refreshes"][self.seat])
        return self._ended[1]

    @property
    def policy(self) -> Policy:
        """The rule that ranks."""
        return POLICIES[self.plan.config.policy]

    @property
    def remembers_rows(self) -> bool:
        """Whether positions are kept after the prompt's end."""
        plan = self.plan
        return (
            plan.has_core
            or plan.text_window is not None
            or plan.shares
            or plan.config.introspection > 0
        )

    @property
    def splits_heads(self) -> bool:
        """Whether KV heads store different tokens."""
        return self.policy.per_head or self.plan.text_window is not None

    @property
    def keeps_sums(self) -> bool:
        """Whether attention is added up."""
        if self.plan.text_window is not None:
            return True
        return self.policy.keeps_sums and self.plan.has_core

    @property
    def refreshes_core(self) -> bool:
        """Whether core is selected anew during the answer."""
        return self.plan.has_core and self.policy.refreshes

    @cached_property
    def core_in_pass(self) -> bool:
        """Whether kernels choose core in the pass that scores, without Python."""
        config = self.plan.config
        return (
            self.kernels.choose_core
            and self.refreshes_core
            and self.policy.ranks_attention
            and not self.splits_heads
            and config.head_reduction == "mean"
            and not config.refresh_all_ranks
        )

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[num_candidates] positions that the policy ranks, ascending, int64."""
        plan = self.plan
        if self.policy.ranks_text:
            return torch.arange(plan.num_full_tokens, device=self.device)
        return _positions(plan.ranked_ranges).to(self.device, non_blocking=True)

    @cached_property
    def fixed(self) -> torch.Tensor:
        """[num_fixed] other positions of the full prompt blocks, ascending, int64."""
        plan = self.plan
        if self.policy.ranks_text:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        ends = [0, *(bound for pair in plan.ranked_ranges for bound in pair)]
        gaps = [*ends, plan.num_full_tokens]
        ranges = tuple(zip(gaps[::2], gaps[1::2], strict=True))
        return _positions(ranges).to(self.device, non_blocking=True)

    @cached_property
    def competes(self) -> torch.Tensor:
        """[num_full_tokens + 1], True where the policy ranks a token.

        The last one stands for all that lies behind the full blocks.
        """
        competes = torch.zeros(self.plan.num_full_tokens + 1, dtype=torch.bool)
        return competes.to(self.device).index_fill_(0, self.candidates, True)

    @property
    def num_candidates(self) -> int:
        """Positions that the policy ranks."""
        plan = self.plan
        full = plan.num_full_tokens
        return full if self.policy.ranks_text else plan.num_vision_tokens

    @property
    def candidates_end(self) -> int:
        """Position behind the last candidate."""
        if self.policy.ranks_text:
            return self.plan.num_full_tokens
        return self.plan.ranked_ranges[-1][1]

    @cached_property
    def _ages(self) -> torch.Tensor:
        """[num_prompt_tokens], True where a prompt token may leave the text window."""
        plan = self.plan
        ages = torch.ones(plan.num_prompt_tokens, dtype=torch.bool)
        if not self.policy.ranks_text:
            ages[_positions(plan.vision_ranges)] = False
        ages[: plan.vision_ranges[0][0]] = False
        return ages.to(self.device)

    def ages(self, positions: torch.Tensor) -> torch.Tensor:
        """Where `positions` are of tokens that may leave the text window."""
        last = self.plan.num_prompt_tokens - 1
        return (positions > last) | self._ages[positions.clamp(max=last)]

    def masks(self, num_slots: int) -> None:
        """Say how many of the first stored slots core is chosen of."""
        records, seat = self.seats.records, self.seat
        records["num_masked"][seat] = num_slots
        records["num_listed"][seat] = num_slots - self.plan.num_secondary_rows
        records["mask_stride"][seat] = num_slots if self.splits_heads else 0

    def plan_aging(self, num_tokens: int) -> None:
        """Note what has aged at a length, and at which length text leaves next."""
        plan, records, seat = self.plan, self.seats.records, self.seat
        if plan.text_window is None:
            records["next_aging"][seat] = NEVER
            return
        if num_tokens:
            self.num_aged_blocks = plan.num_evicted_text_blocks(num_tokens)
            if not plan.shares:
                kept_ids = self.compaction.block_ids[self.num_aged_blocks :]
                self.seats.set_private(seat, kept_ids)
            records["first_block"][seat] = plan.num_freed_blocks(num_tokens)
        lengths = range(LONGEST)
        least = max(num_tokens, plan.num_prompt_tokens)
        records["next_aging"][seat] = bisect_left(
            lengths,
            self.num_aged_blocks + 1,
            lo=least,
            key=plan.num_evicted_text_blocks,
        )

    def note_core(self, num_tokens: int) -> None:
        """Remember what ordinary steps read from now on, if somebody asked for it."""
        if self.plan.config.introspection:
            for rows in self.layers.values():
                rows.note_core(num_tokens, self.plan.num_full_tokens)

    def finish(self) -> None:
        """Give up the seat, and keep what a report needs."""
        self._ended = self.num_tokens, self.num_refreshes
        self.running = False
        self.memo.clear()
        self.__dict__.pop("_ages", None)
        for rows in self.layers.values():
            rows.settle()
        self.seats.free(self.seat)

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Count the host's time for a layer's work."""
        start = perf_counter()
        yield
        self.counts.count(key("seconds", stage), perf_counter() - start)


@dataclass
class Task:
    """What Python has to do for one request in a step, layer by layer."""

    state: RequestState
    query_end: int
    """Index behind the request's last token in the step."""
    num_tokens: int
    """Length after the step."""
    stored_in: tuple[torch.Tensor, int, int]
    """A table that `stored` is in, its row of it, and how many blocks it has."""
    start: int
    """Tokens in front of the first stored slot."""
    refreshes: bool
    """Whether this step of the answer scores what is stored."""
    attended: bool
    """Whether our kernel attends the row, and leaves what it has seen."""
    num_aged: int
    """Text rows that leave the window behind this step, for each KV head."""
    prompt: torch.Tensor | None = None
    """[num_blocks] int32, where the prompt lies, in the step that ends it."""
    num_private: int = 0
    """Blocks at the head of `stored` that kept rows go to at the prompt's end."""
    is_drafter: bool = False
    """Whether the layers are a drafter's."""

    @cached_property
    def stored(self) -> torch.Tensor:
        """[num_blocks] int32, as the kernel counts blocks.

        [private | partial block | answer] as it lies behind the step.
        """
        table, row, num_blocks = self.stored_in
        return table[row, :num_blocks].contiguous()

    @property
    def last(self) -> int:
        """Index of the request's last token in the step."""
        return self.query_end - 1


def _positions(ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *(torch.arange(start, end) for start, end in ranges)])
