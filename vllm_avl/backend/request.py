"""What a worker remembers of an adaptive request, and what a step asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import Any

import torch

from vllm_avl.backend.rows import KernelRows, LayerRows
from vllm_avl.metrics.counts import Counts
from vllm_avl.metrics.definitions import Stage, key
from vllm_avl.plan import Plan
from vllm_avl.policies import POLICIES, Policy


@dataclass
class RequestState:
    """One adaptive request on this worker."""

    plan: Plan
    device: str | torch.device = "cpu"
    """Of the cache."""
    counts: Counts = field(default_factory=Counts)
    """The worker's."""
    gather_below: int = 0
    """Refresh interval from which on the executor `auto` packs."""
    has_ranking_kernels: bool = False
    """Whether the worker's device ranks rows in kernels of ours."""
    layers: dict[int, LayerRows] = field(default_factory=dict)
    """Stored rows by layer index; empty where nobody asks for them again."""
    kernel_rows: dict[int, KernelRows] = field(default_factory=dict)
    """The same where kernels keep them."""
    num_tokens: int = 0
    """Length after the last step."""
    num_refreshes: int = 0
    running: bool = True
    memo: dict[str, Any] = field(default_factory=dict)
    """Shared by the layers, for the policy."""

    @property
    def policy(self) -> Policy:
        """The rule that ranks."""
        return POLICIES[self.plan.config.policy]

    @property
    def remembers_rows(self) -> bool:
        """Whether positions are kept after compaction."""
        plan = self.plan
        return (
            plan.has_core
            or plan.text_window is not None
            or plan.config.introspection > 0
        )

    @cached_property
    def lists_core(self) -> bool:
        """Whether core is a list, and no row changes places for it.

        Lists are for one ranking a layer that changes; others are packed.
        """
        plan = self.plan
        gathers = plan.config.executor == "gather"
        if plan.config.executor == "auto":
            gathers = plan.config.core_refresh_interval < self.gather_below
        return (
            gathers
            and plan.config.head_reduction == "mean"
            and plan.has_core
            and plan.text_window is None
            and self.policy.refreshes
            and not self.policy.per_head
        )

    @cached_property
    def ranks_in_kernels(self) -> bool:
        """Whether kernels choose its rows, without a policy's tensors."""
        plan = self.plan
        return (
            self.has_ranking_kernels
            and self.policy.ranks_attention
            and plan.text_window is None
            and plan.config.introspection == 0
            and (self.lists_core or not plan.has_core)
        )

    @property
    def keeps_sums(self) -> bool:
        """Whether attention is added up."""
        if self.plan.text_window is not None:
            return True
        return self.policy.keeps_sums and self.plan.has_core

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[num_candidates] positions that the policy ranks, ascending, int64."""
        plan = self.plan
        if self.policy.ranks_text:
            return torch.arange(plan.num_full_tokens, device=self.device)
        return _positions(plan.ranked_ranges).to(self.device)

    @cached_property
    def competes(self) -> torch.Tensor:
        """[num_full_tokens], True where the policy ranks a token."""
        competes = torch.zeros(self.plan.num_full_tokens, dtype=torch.bool)
        for start, end in self.plan.ranked_ranges:
            competes[start:end] = True
        return competes.to(self.device, non_blocking=True)

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

    def finish(self) -> None:
        """Keep what a report needs, and no more."""
        self.running = False
        self.memo.clear()
        for rows in self.layers.values():
            rows.sums = None
            rows.positions = rows.positions.to(torch.int32)
        self.__dict__.pop("_ages", None)

    def record(self, num_tokens: int, scores: bool) -> None:
        """Note what a step does."""
        self.num_tokens = num_tokens
        self.num_refreshes += scores
        if scores and self.plan.has_core:
            self.counts.count(key("refreshes"))

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Count the host's time for a layer's work."""
        start = perf_counter()
        yield
        self.counts.count(key("seconds", stage), perf_counter() - start)

    def ages(self, positions: torch.Tensor) -> torch.Tensor:
        """Where `positions` are of tokens that may leave the text window."""
        last = self.plan.num_prompt_tokens - 1
        return (positions > last) | self._ages[positions.clamp(max=last)]


@dataclass(frozen=True)
class Turn:
    """What one step computes of an adaptive request, and what that asks for."""

    state: RequestState
    num_computed: int
    """Tokens computed before the step."""
    num_tokens: int
    """Tokens computed after it."""

    @property
    def num_new(self) -> int:
        """Tokens of the step."""
        return self.num_tokens - self.num_computed

    @property
    def is_prefix(self) -> bool:
        """Whether the prompt goes on behind the step."""
        return self.num_tokens < self.state.plan.num_prompt_tokens

    @cached_property
    def compacts(self) -> bool:
        """Whether the prompt ends in this step."""
        return self.num_computed < self.state.plan.num_prompt_tokens <= self.num_tokens

    @cached_property
    def reads_all(self) -> bool:
        """Whether the step reads what is stored, not core and text alone."""
        plan = self.state.plan
        return not plan.has_core or plan.refreshes(self.num_computed, self.num_new)

    @cached_property
    def first_read_token(self) -> int:
        """First slot that attention reads, a multiple of the block size."""
        plan = self.state.plan
        if self.reads_all or self.state.lists_core:
            return plan.num_freed_blocks(self.num_computed) * plan.block_size
        return plan.first_core_block(self.num_computed) * plan.block_size

    @cached_property
    def scores(self) -> bool:
        """Whether a step of the answer scores what it reads."""
        state = self.state
        return (
            self.num_computed >= state.plan.num_prompt_tokens
            and (state.keeps_sums or (state.plan.has_core and state.policy.refreshes))
            and state.plan.refreshes(self.num_computed, self.num_new)
        )

    @property
    def gathers(self) -> bool:
        """Whether our kernel attends: a decode row whose core is a list."""
        answers = not self.is_prefix and not self.compacts
        return answers and self.num_new == 1 and self.state.lists_core

    @property
    def chooses_in_pass(self) -> bool:
        """Whether kernels of the pass itself choose core anew."""
        return (
            self.scores
            and self.gathers
            and self.state.ranks_in_kernels
            and not self.state.plan.config.refresh_all_ranks
        )

    @cached_property
    def num_aged(self) -> int:
        """Text rows that leave the window in this step, for each KV head."""
        plan = self.state.plan
        if self.is_prefix:
            return 0
        before = 0
        if not self.compacts:
            before = plan.num_evicted_text_blocks(self.num_computed)
        after = plan.num_evicted_text_blocks(self.num_tokens)
        return (after - before) * plan.block_size

    @cached_property
    def has_work(self) -> bool:
        """Whether Python has anything to do for it after the layers' attention."""
        scores = self.scores and not self.chooses_in_pass
        return self.compacts or scores or self.num_aged > 0


@dataclass(frozen=True)
class Task(Turn):
    """A turn that has work for every layer, and where the request lies in the step."""

    query_start: int
    """Index of the request's first token in the step."""
    block_ids: torch.Tensor
    """[cdiv(num_tokens, block_size)] int32, a row of the step's table. Those in front
    of the stored ones belong to others."""
    scores_while_attending: bool
    """Whether our kernel attends and scores in one pass, in place of vLLM's."""

    @property
    def query_end(self) -> int:
        """Index behind the request's last token in the step."""
        return self.query_start + self.num_new

    @cached_property
    def blocks(self) -> torch.Tensor:
        """`block_ids` as int64, which indexing takes."""
        return self.block_ids.to(torch.int64)


def _positions(ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.int64)
    return torch.cat([empty, *(torch.arange(start, end) for start, end in ranges)])
