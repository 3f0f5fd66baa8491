"""What a layer does for adaptive requests after its attention: score, keep, evict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_avl.layers import layer_number
from vllm_avl.metrics.definitions import Stage, key
from vllm_avl.policies import TokenView
from vllm_avl.worker.cache import Cache
from vllm_avl.worker.ranks import Ranks
from vllm_avl.worker.request import RequestState, Task
from vllm_avl.worker.rows import LayerRows
from vllm_avl.worker.selection import Candidates
from vllm_avl.worker.text import close_ranks, find_aged, move_mask


@dataclass(frozen=True)
class Layer:
    """One attention layer and its cache, on this rank."""

    name: str
    cache: Cache
    ranks: Ranks

    def perform(self, task: Task, query: torch.Tensor, output: torch.Tensor) -> None:
        """Do what `task` asks of this layer.

        Args:
            task: of one request.
            query: [num_tokens, num_heads, head_size] of the step.
            output: as query, the step's attention.
        """
        timed = task.state.timed
        if task.prompt is not None:
            with timed(Stage.SCORING):
                attention = self._score_prompt(task, query, output)
            with timed(Stage.COMPACTION):
                self._store(task, attention)
        elif task.refreshes:
            with timed(Stage.REFRESH):
                self._refresh(task, query)
        if task.num_aged:
            with timed(Stage.TEXT_EVICTION):
                self._evict_text(task)

    # The prompt's end.

    def _score_prompt(
        self, task: Task, query: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """[num_heads, num_prompt_tokens] attention from the scoring rows."""
        plan = task.state.plan
        rows = slice(task.query_end - plan.num_scoring_rows, task.query_end)
        assert task.prompt is not None
        return self.cache.score(
            query[rows], task.prompt, plan.num_prompt_tokens, output[rows]
        )

    def _store(self, task: Task, attention: torch.Tensor) -> None:
        """Copy what stays to the request's own blocks, and select core."""
        state, plan = task.state, task.state.plan
        order = self._rank_prompt(task, attention)
        if plan.moves_rows:
            self._copy(task, order)
        else:
            self._copy_shared(task)
        if not state.remembers_rows:
            return
        positions = order.to(torch.int64)
        if not plan.moves_rows:
            positions = torch.arange(plan.num_full_tokens, device=order.device)[None]
        start = plan.first_stored_block * plan.block_size
        rows = LayerRows(start, positions, of_drafter=task.is_drafter)
        if state.splits_heads:
            rows.split_heads(self.cache.num_kv_heads)
        if plan.text_window is not None:
            rows.extend(plan.num_prompt_tokens)
        if state.keeps_sums:
            by_kv_head = self._by_kv_head(attention)
            index = rows.positions.expand(len(by_kv_head), -1)
            rows.sums = by_kv_head.gather(1, index)
        state.layers[self.name] = rows
        if plan.shares:
            self._keep(task, rows, _mark(order, plan.num_full_tokens))
        if plan.has_core:
            self._select(task, rows, self._first_core(task, order))

    def _first_core(self, task: Task, order: torch.Tensor) -> torch.Tensor:
        """[num_rankings, num_slots] what is core of rows in an order, the best first.

        Args:
            task: of the request.
            order: see `_rank_prompt`.
        """
        plan = task.state.plan
        if plan.moves_rows:
            index = torch.arange(order.shape[1], device=order.device)
            return (index < plan.num_core_rows).unsqueeze(0)
        core = order[:, : order.shape[1] - plan.num_secondary_rows]
        return _mark(core, plan.num_full_tokens)

    def _rank_prompt(self, task: Task, attention: torch.Tensor) -> torch.Tensor:
        """[num_rankings, num_stored_rows] int32 positions of what stays.

        What no policy ranks comes first, then core.
        """
        state, plan = task.state, task.state.plan
        num_ranked = state.num_candidates
        num_kept = num_ranked - plan.num_evicted_rows
        if num_kept == num_ranked and not plan.has_core:
            order = torch.cat([state.fixed, state.candidates])
            return order.to(torch.int32).unsqueeze(0)
        num_core = num_kept - plan.num_secondary_rows if plan.has_core else num_kept
        scores = self._score_candidates(task, attention, num_kept, num_core)
        positions = state.candidates, state.fixed
        return self.cache.rank(*scores, num_kept, num_core, *positions)

    def _score_candidates(
        self, task: Task, attention: torch.Tensor, num_kept: int, num_core: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the ranked tokens, and as core; the same object if scores are alike.

        Args:
            task: of the request.
            attention: [num_heads, num_prompt_tokens].
            num_kept: of the ranked tokens, how many stay.
            num_core: how many of those are core.
        """
        state, candidates = task.state, task.state.candidates
        splits = state.policy.per_head or state.policy.reads_rows
        if not splits:
            ranked = self._reduce(state, attention, 0)[:, candidates]
            ranked = self._over_ranks(task, ranked)
            if state.policy.ranks_attention:
                return ranked, ranked
        by_kv_head = sums = None
        if splits or state.policy.keeps_sums:
            by_kv_head = self._by_kv_head(attention)[:, candidates]
            ranked = by_kv_head if splits else ranked
            sums = by_kv_head if state.policy.keeps_sums else None
        held = torch.ones_like(ranked, dtype=torch.bool)
        rows = None
        if state.policy.reads_rows:
            assert task.prompt is not None
            rows = self.cache.rows(task.prompt, candidates)
        scores = self._scores(task, ranked, sums, held, num_kept, rows)
        if num_core == num_kept:
            return scores, scores
        return scores, self._scores(task, ranked, sums, held, num_core, rows)

    def _copy(self, task: Task, order: torch.Tensor) -> None:
        """Copy the prompt's rows, in `order`, to the first stored slots."""
        assert task.prompt is not None
        in_place = task.state.compaction.in_place
        self.cache.copy(task.prompt, order, task.stored, in_place=in_place)

    def _copy_shared(self, task: Task) -> None:
        """Copy whole blocks that must not be shared: those with a copy to go to."""
        compaction = task.state.compaction
        if not compaction.num_copied:
            return
        assert task.prompt is not None
        num_blocks = task.num_private
        size = compaction.num_copied * num_blocks // len(compaction.block_ids)
        differs = task.prompt[:num_blocks] != task.stored[:num_blocks]
        copied = torch.nonzero_static(differs, size=size).flatten()
        num_slots, device = task.state.plan.num_full_tokens, task.prompt.device
        slots = torch.arange(num_slots, dtype=torch.int32, device=device)
        slots = slots.view(num_blocks, -1)[copied].view(1, -1)
        self.cache.copy(task.prompt, slots, task.stored, slots)

    # The answer.

    def _refresh(self, task: Task, query: torch.Tensor) -> None:
        """Score what is stored, and select core anew."""
        state, plan = task.state, task.state.plan
        rows = state.layers[self.name]
        if plan.text_window is not None:
            rows.extend(task.num_tokens)
            if rows.kept is not None:
                # Both masks are as wide as the rows that are known.
                self._keep(task, rows, rows.kept)
        num_slots = rows.num_slots
        if task.attended:
            attention = self.cache.seen(task, num_slots)
        else:
            row = query[task.last : task.query_end]
            num_keys = task.num_tokens - rows.start
            attention = self.cache.score(row, task.stored, num_keys)[:, :num_slots]
        if rows.sums is not None:
            rows.add(self._by_kv_head(attention))
        if state.refreshes_core:
            before = rows.mask()
            mask = self._choose_core(task, rows, attention)
            assert before is not None
            self._count_turnover(state, rows, (mask & ~before).sum())
            self._select(task, rows, mask)

    def _choose_core(
        self, task: Task, rows: LayerRows, attention: torch.Tensor
    ) -> torch.Tensor:
        """[num_rankings, num_slots] what is core by the step's attention."""
        state, num_secondary = task.state, task.state.plan.num_secondary_rows
        if state.policy.ranks_attention and len(rows.positions) == 1:
            # Nothing of it depends on the order of positions.
            scores = self._reduce(state, attention, 0)
            if state.plan.config.refresh_all_ranks:
                scores = self._over_ranks(task, scores)
        else:
            scores = self._score_by_position(task, rows, attention)
        competes = rows.competes(state.competes)
        return self.cache.best(scores, rows.positions, competes, num_secondary)

    def _score_by_position(
        self, task: Task, rows: LayerRows, attention: torch.Tensor
    ) -> torch.Tensor:
        """[num_rankings, num_slots] scores of a policy that looks at positions."""
        state, num_secondary = task.state, task.state.plan.num_secondary_rows
        candidates = Candidates(state.candidates, rows, state.candidates_end)
        held = candidates.held if state.policy.per_head else candidates.held[:1]
        sums = None
        if state.policy.keeps_sums:
            assert rows.sums is not None
            sums = candidates.by_position(rows.sums)
        num_kept = held.sum(1, keepdim=True) - num_secondary
        ranked = self._attention(task, candidates, attention)
        scores = self._scores(task, ranked, sums, held, num_kept)
        return candidates.by_slot(scores)

    def _attention(
        self, task: Task, candidates: Candidates, attention: torch.Tensor
    ) -> torch.Tensor:
        """[num_groups, num_candidates] attention, over heads or for each KV head."""
        state = task.state
        if state.policy.per_head:
            return candidates.by_position(self._by_kv_head(attention))
        if candidates.num_rankings == 1:
            ranked = candidates.by_position(self._reduce(state, attention, 0))
        else:
            by_head = attention.unflatten(0, (self.cache.num_kv_heads, -1))
            by_kv_head = self._reduce(state, by_head, 1).squeeze(1)
            ranked = self._reduce(state, candidates.by_position(by_kv_head), 0)
        if state.plan.config.refresh_all_ranks:
            return self._over_ranks(task, ranked)
        return ranked

    def _select(self, task: Task, rows: LayerRows, mask: torch.Tensor) -> None:
        """Let `mask` be core, and remember it if somebody asked for that."""
        state = task.state
        mask = mask.expand(len(rows.positions), -1).contiguous()
        stays = rows.stays()
        if stays is not None:
            mask = rows.over_slots(mask) & stays
        self.cache.set_core(task, self.name, rows, mask)
        state.masks(mask.shape[1])
        if state.plan.config.introspection:
            rows.note_core(task.num_tokens, state.plan.num_full_tokens)

    def _keep(self, task: Task, rows: LayerRows, mask: torch.Tensor) -> None:
        """Let `mask` be what stays of a shared prompt and what follows it."""
        state = task.state
        rows.kept = rows.over_slots(mask).contiguous()
        address = rows.kept.data_ptr()
        state.seats.set_mask(self.name, state.seat, address, of_kept=True)
        if not state.plan.has_core:
            state.seats.set_mask(self.name, state.seat, address)
        state.masks(rows.kept.shape[1])

    def _evict_text(self, task: Task) -> None:
        """Evict whole blocks' worth of aged text."""
        state, plan = task.state, task.state.plan
        assert plan.text_window is not None
        rows = state.layers[self.name]
        rows.extend(task.num_tokens)
        mask = rows.mask()
        ages = state.ages(rows.positions)
        leaving = find_aged(
            rows,
            ages if mask is None else ages & mask,
            plan.text_window,
            plan.num_text_tokens(task.num_tokens),
            task.num_aged,
        )
        stays = rows.stays()
        if stays is not None:
            self._keep(task, rows, stays & ~leaving)
            if plan.has_core:
                assert mask is not None
                self._select(task, rows, mask)
            return
        moves = close_ranks(rows, leaving, task.num_aged)
        self.cache.copy(task.stored, moves.source, task.stored, moves.target)
        if mask is not None:
            moved = move_mask(mask, moves, task.num_aged)
            self._select(task, rows, moved)

    # Scores.

    def _scores(
        self,
        task: Task,
        attention: torch.Tensor,
        sums: torch.Tensor | None,
        held: torch.Tensor,
        num_kept: int | torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[num_groups, num_candidates] scores of the request's policy.

        Those of a policy that reads `rows` are reduced over heads, as attention is.
        """
        state = task.state
        keys, values = rows or (None, None)
        if isinstance(num_kept, int):
            num_kept = torch.full((len(held), 1), num_kept, device=held.device)
        view = TokenView(
            positions=state.candidates,
            attention=attention,
            sums=sums,
            held=held,
            num_kept=num_kept,
            num_scoring_rows=state.plan.num_scoring_rows,
            layer=layer_number(self.name) or 0,
            num_computed=task.num_tokens,
            memo=state.memo,
            keys=keys,
            values=values,
        )
        scores = state.policy.score(view)
        if rows is None or state.policy.per_head:
            return scores
        return self._over_ranks(task, self._reduce(state, scores, 0))

    def _reduce(
        self, state: RequestState, attention: torch.Tensor, dim: int
    ) -> torch.Tensor:
        """Add heads up, or take the most of them, and keep the dimension."""
        most = state.plan.config.head_reduction == "max"
        return (torch.amax if most else torch.sum)(attention, dim, keepdim=True)

    def _over_ranks(self, task: Task, attention: torch.Tensor) -> torch.Tensor:
        return self.ranks.reduce(attention, task.state.plan.config.head_reduction)

    def _by_kv_head(self, attention: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads, num_slots]: query heads of a group added."""
        return attention.unflatten(0, (self.cache.num_kv_heads, -1)).sum(1)

    def _count_turnover(
        self, state: RequestState, rows: LayerRows, num_entered: torch.Tensor
    ) -> None:
        """Count what a refresh selected, and how much of it had not been core."""
        num_selected = int(state.seats.records["num_selected"][state.seat])
        state.counts.count(
            key("core_rows_selected"), num_selected * len(rows.positions)
        )
        state.counts.count(key("core_rows_entered"), num_entered)


def _mark(positions: torch.Tensor, num_slots: int) -> torch.Tensor:
    """[num_rankings, num_slots] bool, True at `positions`."""
    mask = torch.zeros(
        len(positions), num_slots, dtype=torch.bool, device=positions.device
    )
    return mask.scatter_(1, positions.to(torch.int64), True)
