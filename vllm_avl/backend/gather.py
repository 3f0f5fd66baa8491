"""Attention of decode rows whose core is an index list, and the buffers it needs.

A captured CUDA graph holds the launch, so everything that changes from step to step
lies in buffers that are filled before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_avl.backend.request import Turn
from vllm_avl.backend.view import Selection, select
from vllm_avl.kernels.gpu.select_core import select_core
from vllm_avl.kernels.gpu.selected_attention import Refresh, selected_attention

PROGRAMS_PER_DEVICE = 264
"""Two for each of an H100's multiprocessors."""
MAX_SPLITS = 16


@dataclass
class GatherBuffers:
    """What all layers of a group share; lists of core are each layer's own."""

    num_slots: int
    """Rows of the cache."""
    num_heads: int
    num_kv_heads: int
    max_num_seqs: int
    device: torch.device
    layer_names: Sequence[str]
    layers: dict[str, LayerLists] = field(init=False)
    """By layer name."""

    def __post_init__(self) -> None:
        def new(rows: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=self.device)

        self.selections = new(6, torch.int32, self.max_num_seqs)
        self.num_entered = new(1, torch.int32, 1)[0]
        # Before any graph is captured, which would own what is allocated in it.
        self.layers = {
            name: LayerLists(
                self,
                new(1, torch.int32, self.num_slots),
                new(1, torch.int32, self.num_slots)[0],
            )
            for name in self.layer_names
        }
        self.scores = new(self.num_kv_heads, torch.float32, self.num_slots)
        self.logits = new(self.num_heads, torch.float32, self.num_slots)

    def fill(self, selections: Sequence[Selection], num_rows: int) -> torch.Tensor:
        """Put a step's selections where its launch reads them.

        Returns:
            [6, num_rows] view: first slots, list starts, list lengths, flags, list
            ends, lengths of new lists.
        """
        padded = [*selections, *[Selection()] * (num_rows - len(selections))]
        host = torch.tensor(padded, dtype=torch.int32).T.contiguous()
        view = self.selections[:, :num_rows]
        view.copy_(host, non_blocking=True)
        return view


@dataclass(frozen=True)
class LayerLists:
    """What kernels remember of the requests' rows in one layer."""

    buffers: GatherBuffers
    core_list: torch.Tensor
    """[1, num_slots] int32, see `kernels.gpu.selected_attention`."""
    row_tokens: torch.Tensor
    """[num_slots] int32, see `kernels.gpu.select_prompt`."""


@dataclass(frozen=True)
class GatheredRows:
    """The rows of a step that our kernel attends."""

    buffers: GatherBuffers
    block_table: torch.Tensor
    """[num_rows, max_blocks] int32, from the request's first block on."""
    seq_lens: torch.Tensor
    """[num_rows] int32."""
    query_start_loc: torch.Tensor
    """[num_rows + 1] int32."""
    selections: torch.Tensor
    """[6, num_rows] int32."""
    chooses: bool
    """Whether any row may choose core anew in this pass."""
    tokens: torch.Tensor | None
    """[num_rows] where their queries lie in the step; None where they are the step."""

    def attend(
        self,
        layer_name: str,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        soft_cap: float,
        output: torch.Tensor,
    ) -> None:
        """Write the attention of these rows into `output`.

        Args:
            layer_name: of the attention layer.
            query: [num_tokens, num_heads, head_size] of the step.
            keys: [num_blocks, num_kv_heads, block_size, head_size].
            values: as keys.
            scale: softmax scale.
            soft_cap: tanh cap on the logits, 0 for none.
            output: as query.
        """
        buffers = self.buffers
        first_slot, list_start, num_core, scored, list_stop, num_chosen = (
            self.selections
        )
        lists = buffers.layers[layer_name]
        queries = query if self.tokens is None else query[self.tokens]
        rows = output if self.tokens is None else torch.empty_like(queries)
        selected_attention(
            queries,
            keys,
            values,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            first_slot,
            lists.core_list,
            list_start,
            num_core,
            scale,
            soft_cap,
            output=rows,
            num_splits=num_splits(len(self.seq_lens) * buffers.num_kv_heads),
            refresh=Refresh(scored, buffers.scores, buffers.logits),
        )
        if self.tokens is not None:
            output[self.tokens] = rows
        if self.chooses:
            select_core(
                buffers.scores,
                lists.row_tokens,
                lists.core_list[0],
                buffers.num_entered,
                self.block_table,
                keys.shape[2],
                list_start,
                list_stop,
                num_chosen,
            )


def num_splits(num_pairs: int) -> int:
    """Programs that share a row and KV head, so that a device has enough of them."""
    splits = 1
    while splits < MAX_SPLITS and splits * num_pairs < PROGRAMS_PER_DEVICE:
        splits *= 2
    return splits


def gathered_rows(
    buffers: GatherBuffers,
    common: CommonAttentionMetadata,
    turns: Sequence[Turn | None],
) -> GatheredRows | None:
    """Return the rows of a step that our kernel attends, None for none of them.

    In a step of decode rows alone it attends them all, so that one captured graph
    serves every such step.
    """
    num_reqs = common.num_reqs
    table = common.block_table_tensor[:num_reqs]
    selections = [select(turn) for turn in turns]
    if common.max_query_len == 1:
        return GatheredRows(
            buffers,
            table,
            common.seq_lens[:num_reqs],
            common.query_start_loc[: num_reqs + 1],
            buffers.fill(selections, num_reqs),
            chooses=True,
            tokens=None,
        )
    found = [row for row, selection in enumerate(selections) if selection.gathers]
    if not found:
        return None
    device = buffers.device
    rows = torch.tensor(found, device=device)
    return GatheredRows(
        buffers,
        table[rows],
        common.seq_lens[rows],
        torch.arange(len(found) + 1, dtype=torch.int32, device=device),
        buffers.fill([selections[row] for row in found], len(found)),
        chooses=any(selection.num_chosen for selection in selections),
        tokens=common.query_start_loc[rows].to(torch.int64),
    )
