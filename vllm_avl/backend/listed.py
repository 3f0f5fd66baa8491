"""Decode rows on a CPU whose core is a list: our kernel attends them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_avl.backend.cpu_cache import CPUCache
from vllm_avl.backend.request import RequestState, Turn
from vllm_avl.kernels.host import Row

GATHER_BELOW = 10
"""Refresh interval from which on packing core is faster: a list reads the keys of all
that is stored on every step, packing exchanges rows on every refresh
(`benchmarks/decode.py`)."""


@dataclass(frozen=True)
class ListedRow:
    """A row of the step, and what is stored of its request."""

    state: RequestState
    token: int
    """Index of its token in the step."""
    blocks: torch.Tensor
    """[num_stored_blocks] block ids from the first stored on, int64."""
    num_slots: int
    """Of these blocks, up to the row's own."""
    reads_all: bool
    scores: bool

    def of_layer(self, index: int) -> Row:
        """Return what it reads in a layer."""
        mask = None if self.reads_all else self.state.layers[index].listed
        return Row(self.blocks, self.num_slots, mask)


@dataclass(frozen=True)
class ListedRows:
    """All such rows of a step."""

    rows: list[ListedRow]
    tokens: torch.Tensor
    """[num_rows] their tokens in the step, int64."""
    is_whole_step: bool
    """Whether there is no other row, so that vLLM's kernel has nothing to do."""

    def attend(
        self, index: int, cache: CPUCache, query: torch.Tensor, output: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Write the attention of these rows into `output`.

        Args:
            index: of the layer.
            cache: of the layer.
            query: [num_tokens, num_heads, head_size] of the step.
            output: as query.

        Returns:
            by token, [num_heads, num_slots] attention that rows which score have paid.
        """
        rows = [row.of_layer(index) for row in self.rows]
        read = cache.select(query[self.tokens], rows)
        output[self.tokens] = read.output.to(output.dtype)
        return {
            listed.token: read.probabilities(place, row)
            for place, (listed, row) in enumerate(zip(self.rows, rows, strict=True))
            if listed.scores
        }


def listed_rows(
    turns: Sequence[Turn | None],
    block_table: torch.Tensor,
    query_starts: Sequence[int],
    block_size: int,
) -> ListedRows | None:
    """Return the rows of a step that our kernel attends, None for none of them.

    Args:
        turns: of the batch's rows; None where a row is not adaptive.
        block_table: [num_reqs, max_blocks] int32.
        query_starts: index of each row's first token.
        block_size: of the cache.
    """
    rows = []
    for index, turn in enumerate(turns):
        if turn is None or not turn.gathers:
            continue
        first = turn.first_read_token
        end = -(-turn.num_tokens // block_size)
        rows.append(
            ListedRow(
                turn.state,
                query_starts[index],
                block_table[index, first // block_size : end].to(torch.int64),
                turn.num_tokens - first,
                turn.reads_all,
                turn.scores,
            )
        )
    if not rows:
        return None
    tokens = torch.tensor([row.token for row in rows])
    return ListedRows(rows, tokens, is_whole_step=len(rows) == len(turns))
