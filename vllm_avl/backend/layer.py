"""What a layer does for adaptive requests after its attention: score, evict, move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch

from vllm_avl.backend.ranks import Ranks
from vllm_avl.backend.request import RequestState, Task
from vllm_avl.backend.rows import CORE, SECONDARY, LayerRows, Moves, rearrange
from vllm_avl.backend.selection import Candidates, label_aged_text
from vllm_avl.metrics.definitions import Stage, key
from vllm_avl.policies import TokenView


class Cache(Protocol):
    """One layer's cache on this rank, in whatever layout, and operations on it."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads of this rank."""

    @property
    def block_size(self) -> int:
        """Rows a block holds."""

    @property
    def pads_moves(self) -> bool:
        """Whether counting moves would wait for the device, so that they are padded."""

    def scores(
        self, query: torch.Tensor, blocks: torch.Tensor, num_tokens: int
    ) -> torch.Tensor:
        """As `kernels.attention_scores`."""

    def move(self, blocks: torch.Tensor, moves: Moves) -> None:
        """Move rows of a request whose block ids are `blocks`."""


class ListingCache(Cache, Protocol):
    """A cache whose core is a list, and whose kernel has left its scores."""

    def probabilities(
        self, token: int, blocks: torch.Tensor, num_slots: int
    ) -> torch.Tensor:
        """[num_heads or num_kv_heads, num_slots] attention that a row of the step paid.

        Args:
            token: index of the row's token in the step.
            blocks: ids of the request's blocks from the first stored on, int64.
            num_slots: of these blocks.
        """

    def list_core(
        self, blocks: torch.Tensor, in_core: torch.Tensor, size: int, start: int
    ) -> None:
        """Let the kernel read a request's core from the next step on.

        Args:
            blocks: as above.
            in_core: [num_slots], True where a slot is core; a contiguous tensor that
                stays as it is until the next list.
            size: slots that are core.
            start: position in the request, in tokens, of the first slot.
        """


class FusingCache(Cache, Protocol):
    """A cache that attends and scores in one read."""

    def attend(
        self, query: torch.Tensor, blocks: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `kernels.scored_attention`."""


@dataclass(frozen=True)
class Layer:
    """One attention layer and its cache, on this rank."""

    index: int
    cache: Cache
    ranks: Ranks

    def perform(self, task: Task, query: torch.Tensor, output: torch.Tensor) -> None:
        """Do what `task` asks of this layer.

        Args:
            task: of one request.
            query: [num_tokens, num_heads, head_size] of the step.
            output: [num_tokens, num_heads, head_size] of the step; the row of a
                request that scores while attending is written here.
        """
        timed = task.state.timed
        if task.compacts:
            with timed(Stage.SCORING):
                probabilities = self._score_prompt(task, query)
            with timed(Stage.COMPACTION):
                self._compact(task, probabilities)
        elif task.scores:
            with timed(Stage.REFRESH):
                self._refresh(task, query, output)
        if task.num_aged:
            with timed(Stage.TEXT_EVICTION):
                self._evict_text(task)

    def _score_prompt(self, task: Task, query: torch.Tensor) -> torch.Tensor:
        """[num_heads, num_prompt_tokens] attention from the scoring rows."""
        plan = task.state.plan
        rows = query[task.query_end - plan.num_scoring_rows : task.query_end]
        return self.cache.scores(rows, task.blocks, plan.num_prompt_tokens)

    def _compact(self, task: Task, probabilities: torch.Tensor) -> None:
        """Evict minor rows of the prompt, and put core behind secondary."""
        state, plan = task.state, task.state.plan
        device = probabilities.device
        positions = torch.arange(plan.num_prompt_tokens, device=device)
        rows = LayerRows(0, positions.unsqueeze(0))
        if state.policy.per_head:
            rows.split_heads(self.cache.num_kv_heads)
        if state.keeps_sums or state.policy.keeps_sums:
            rows.sums = self._by_kv_head(probabilities)
        start = plan.private_from * plan.block_size
        if start or plan.has_core:
            num_secondary = self._num_secondary(state)
            labels = self._label(task, rows, probabilities, start, num_secondary)
            self._place(task, rows, labels, start)
            self._note_core(task, rows)
        if not state.keeps_sums:
            rows.sums = None
        elif plan.text_window is not None:
            rows.split_heads(self.cache.num_kv_heads)
        if state.remembers_rows:
            state.layers[self.index] = rows

    def _refresh(self, task: Task, query: torch.Tensor, output: torch.Tensor) -> None:
        """Score all that is stored, and select core anew."""
        state, plan = task.state, task.state.plan
        rows = state.layers[self.index]
        rows.extend(task.num_tokens)
        probabilities = self._score_stored(task, rows, query, output)
        if rows.sums is not None:
            rows.add(self._by_kv_head(probabilities), plan.config.text_decay)
        if plan.has_core and state.policy.refreshes:
            num_secondary = self._num_secondary(state)
            labels = self._label(task, rows, probabilities, 0, num_secondary)
            num_entered = self._place(task, rows, labels, rows.start)
            self._count_turnover(state, rows, num_entered)
            self._note_core(task, rows)

    def _score_stored(
        self,
        task: Task,
        rows: LayerRows,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """[num_heads, num_slots] attention of the step's last row to what is stored."""
        blocks = task.blocks[rows.start // self.cache.block_size :]
        num_slots = rows.end - rows.start
        last = task.query_end - 1
        if not task.scores_while_attending:
            return self.cache.scores(query[last : last + 1], blocks, num_slots)
        if task.gathers:
            return self._listing.probabilities(last, blocks, num_slots)
        attend = cast(FusingCache, self.cache).attend
        output[last], probabilities = attend(query[last], blocks, num_slots)
        return probabilities

    def _evict_text(self, task: Task) -> None:
        """Evict whole blocks' worth of aged text; both regions move up."""
        state, plan = task.state, task.state.plan
        assert plan.text_window is not None
        rows = state.layers[self.index]
        rows.extend(task.num_tokens)
        num_secondary = self._num_secondary(state)
        labels = torch.full_like(rows.positions, CORE)
        labels[:, :num_secondary] = SECONDARY
        labels = label_aged_text(
            rows,
            labels,
            state.ages(rows.positions) & (labels == CORE),
            plan.text_window,
            plan.num_text_tokens(task.num_tokens),
            task.num_aged,
        )
        self._place(task, rows, labels, rows.start + task.num_aged)

    def _label(
        self,
        task: Task,
        rows: LayerRows,
        probabilities: torch.Tensor,
        num_evicted: int,
        num_secondary: int,
    ) -> torch.Tensor:
        """Rank the candidates as the request's policy does.

        Args:
            task: of the request.
            rows: what is stored, the sums up to date.
            probabilities: [num_heads, num_slots] attention from the scoring rows.
            num_evicted: candidates that go for good.
            num_secondary: candidates that stay, outside of core.
        """
        state = task.state
        candidates = Candidates(state.candidates, rows, state.candidates_end)
        held = candidates.held if state.policy.per_head else candidates.held[:1]
        num_held = held.sum(1, keepdim=True)
        sums = None
        if state.policy.keeps_sums:
            assert rows.sums is not None
            sums = candidates.by_position(rows.sums)
        view = TokenView(
            positions=candidates.positions,
            attention=self._attention(task, candidates, probabilities),
            sums=sums,
            held=held,
            num_kept=num_held - num_evicted,
            num_scoring_rows=state.plan.num_scoring_rows,
            layer=self.index,
            num_computed=task.num_tokens,
            memo=state.memo,
        )
        scores = core_scores = None
        if num_evicted:
            scores = state.policy.score(view)
        if num_secondary:
            of_core = replace(view, num_kept=view.num_kept - num_secondary)
            core_scores = state.policy.score(of_core)
        return candidates.label(scores, num_evicted, core_scores, num_secondary)

    def _attention(
        self, task: Task, candidates: Candidates, probabilities: torch.Tensor
    ) -> torch.Tensor:
        """[num_groups, num_candidates] attention, over heads or for each KV head."""
        config = task.state.plan.config
        if task.state.policy.per_head:
            return candidates.by_position(self._by_kv_head(probabilities))
        reduce = torch.amax if config.head_reduction == "max" else torch.sum
        if candidates.num_rankings == 1:
            attention = candidates.by_position(reduce(probabilities, 0, keepdim=True))
        else:
            by_kv_head = reduce(
                probabilities.unflatten(0, (self.cache.num_kv_heads, -1)), 1
            )
            attention = reduce(candidates.by_position(by_kv_head), 0, keepdim=True)
        if task.compacts or config.refresh_all_ranks:
            return self.ranks.reduce(attention, config.head_reduction)
        return attention

    def _by_kv_head(self, probabilities: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, num_slots]: query heads of a group added."""
        return probabilities.unflatten(0, (self.cache.num_kv_heads, -1)).sum(1)

    @property
    def _listing(self) -> ListingCache:
        return cast(ListingCache, self.cache)

    def _list_core(self, task: Task, rows: LayerRows, in_core: torch.Tensor) -> None:
        """Let core be the rows of full prompt blocks where `in_core` is True."""
        plan = task.state.plan
        rows.listed = in_core[: plan.num_full_tokens - rows.start].contiguous()
        size = plan.num_core_blocks * plan.block_size
        blocks = task.blocks[rows.start // self.cache.block_size :]
        self._listing.list_core(blocks, rows.listed, size, rows.start)

    def _count_turnover(
        self, state: RequestState, rows: LayerRows, num_entered: int | torch.Tensor
    ) -> None:
        """Count what a refresh selected, and how much of it had not been core."""
        plan = state.plan
        num_selected = plan.num_core_blocks * plan.block_size
        if not state.policy.ranks_text:
            num_selected = plan.num_core_vision
        state.counts.count(
            key("core_rows_selected"), num_selected * len(rows.positions)
        )
        state.counts.count(key("core_rows_entered"), num_entered)

    def _note_core(self, task: Task, rows: LayerRows) -> None:
        """Remember what ordinary steps read from now on, if somebody asked for it."""
        state, plan = task.state, task.state.plan
        if not (plan.config.introspection and plan.has_core):
            return
        read = rows.positions[:, self._num_secondary(state) :]
        if rows.listed is not None:
            read = rows.positions[:, : len(rows.listed)][:, rows.listed]
        rows.history.note(task.num_tokens, read, plan.num_full_tokens)

    def _num_secondary(self, state: RequestState) -> int:
        plan = state.plan
        return (plan.num_stored_blocks - plan.num_core_blocks) * plan.block_size

    def _place(
        self, task: Task, rows: LayerRows, labels: torch.Tensor, start: int
    ) -> int | torch.Tensor:
        """Let rows be evicted, stored and read as they are labelled.

        Args:
            task: of the request.
            rows: what is stored; updated.
            labels: [num_rankings, num_slots].
            start: first slot, in tokens of the request, that stays stored.

        Returns:
            how many rows entered core in exchange for others; on a device a scalar that
            stays there, as nobody waits for it here.
        """
        state = task.state
        if not state.lists_core:
            core_start = start + self._num_secondary(state)
            return self._move(task, rows, labels, start, core_start)
        by_position = torch.zeros(rows.end, dtype=torch.bool, device=labels.device)
        by_position[rows.positions[0]] = labels[0] == CORE
        if start > rows.start:
            stored = labels.masked_fill(labels == SECONDARY, CORE)
            self._move(task, rows, stored, start, start)
        before = rows.listed
        self._list_core(task, rows, by_position[rows.positions[0]])
        return 0 if before is None else (rows.listed & ~before).sum()

    def _move(
        self,
        task: Task,
        rows: LayerRows,
        labels: torch.Tensor,
        start: int,
        core_start: int,
    ) -> int | torch.Tensor:
        """Move rows to where they belong; return how many were exchanged."""
        padded = self.cache.pads_moves
        num_exchanged: int | torch.Tensor = 0
        for moves in rearrange(rows, labels, start, core_start, padded=padded):
            self.cache.move(task.blocks, moves)
            if moves.exchange:
                num_exchanged += (
                    (moves.source >= 0).sum() if padded else len(moves.source)
                )
        return num_exchanged
