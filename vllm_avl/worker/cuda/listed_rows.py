"""The rows of a step that our kernel attends: over lists of core, or over all.

A captured CUDA graph holds the launch, so everything that changes from step to step
lies in buffers that are filled before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_avl.kernels.cuda.select_core import select_core
from vllm_avl.kernels.cuda.selected_attention import Refresh, selected_attention
from vllm_avl.worker.cuda.cache import CUDACache
from vllm_avl.worker.cuda.core_lists import NUM_NUMBERS, CoreLists
from vllm_avl.worker.step import StepRows

PROGRAMS_PER_DEVICE = 264
"""Two for each of an H100's multiprocessors."""
MAX_SPLITS = 16


def select(rows: StepRows, found: npt.NDArray) -> npt.NDArray:
    """Say what rows of a step read, in slots of what is stored.

    Args:
        rows: of the step.
        found: [num_rows] bool, whose core is listed; others read all.

    Returns:
        [NUM_NUMBERS, num_rows]: the first slot behind those of the list, the list's
        length, which of the row's tokens is scored (see `Refresh`), the end of the
        slots that compete for core or are listed always, the length of the list that
        kernels make of the scores (0 where they make none).
    """
    masked = np.where(found, rows.of["num_masked"], 0)
    listed = np.where(found, rows.of["num_listed"], 0)
    ordinary = found & ~rows.reads_all
    return np.stack(
        [
            np.where(ordinary, masked, 0),
            np.where(ordinary, listed, 0),
            # The certain token, in front of all drafts.
            np.where(found & rows.refreshes, 1 + rows.num_drafts, 0),
            masked,
            np.where(rows.in_pass, listed, 0),
        ]
    )


@dataclass(frozen=True)
class ListedRows:
    """The rows of a step that our kernel attends."""

    lists: CoreLists
    block_table: torch.Tensor
    """[num_rows, max_blocks] int32, of what is stored."""
    seq_lens: torch.Tensor
    """[num_rows] int32, as block_table."""
    query_start_loc: torch.Tensor
    """[num_rows + 1] int32."""
    max_query_len: int
    """No row has more tokens."""
    selections: torch.Tensor
    """[NUM_NUMBERS, num_rows] int32."""
    chooses: bool
    """Whether any row may choose core anew in this pass."""
    tokens: torch.Tensor | None
    """[num_tokens] where their queries lie in the step; None where they are the
    step."""

    def attend(
        self, cache: CUDACache, query: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Write the attention of these rows into `output`.

        Args:
            cache: of the layer.
            query: [num_tokens, num_heads, head_size] of the step.
            output: as query.
        """
        lists = self.lists
        first_slot, num_core, scored, stop, num_chosen = self.selections
        core_list = lists.core_list[cache.layer_name]
        queries, rows = query, output
        if self.tokens is not None:
            queries = query[self.tokens]
            rows = torch.empty_like(queries, dtype=output.dtype)
        queries, k_scale = cache.unquantised(queries)
        selected_attention(
            queries,
            cache.keys,
            cache.values,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
            first_slot,
            core_list,
            num_core,
            cache.scale,
            cache.soft_cap,
            output=rows,
            k_scale=k_scale,
            v_scale=None if cache.scales is None else cache.scales.value,
            max_query_len=self.max_query_len,
            num_splits=num_splits(len(self.seq_lens) * lists.num_kv_heads),
            refresh=Refresh(scored, lists.scores, lists.logits),
        )
        if self.tokens is not None:
            output[self.tokens] = rows
        if self.chooses:
            select_core(
                lists.scores,
                lists.row_tokens[cache.layer_name],
                core_list,
                lists.num_entered,
                self.block_table,
                cache.block_size,
                stop,
                num_chosen,
            )


def num_splits(num_pairs: int) -> int:
    """Programs that share a row and KV head, so that a device has enough of them."""
    splits = 1
    while splits < MAX_SPLITS and splits * num_pairs < PROGRAMS_PER_DEVICE:
        splits *= 2
    return splits


def whole_step(
    lists: CoreLists,
    common: CommonAttentionMetadata,
    rows: StepRows | None,
    found: npt.NDArray,
    max_query_len: int,
) -> ListedRows:
    """Let our kernel attend every row of a step of decode rows alone.

    So one captured graph serves every such step.

    Args:
        lists: of core.
        common: of the step, over what is stored.
        rows: of the step; None where nothing is adaptive.
        found: [num_rows] bool, whose core is in these lists.
        max_query_len: tokens of a row at most, whatever the step's are: a kernel each.
    """
    num_reqs = common.num_reqs
    selections = np.zeros((NUM_NUMBERS, 0)) if rows is None else select(rows, found)
    return ListedRows(
        lists,
        common.block_table_tensor[:num_reqs],
        common.seq_lens[:num_reqs],
        common.query_start_loc[: num_reqs + 1],
        max_query_len,
        lists.fill(selections, num_reqs),
        chooses=True,
        tokens=None,
    )


def some_rows(
    lists: CoreLists,
    common: CommonAttentionMetadata,
    rows: StepRows,
    found: npt.NDArray,
    max_query_len: int,
) -> ListedRows:
    """Let our kernel attend some rows of a step, and vLLM's the others.

    Args:
        lists: of their core.
        common: of the step, over what is stored.
        rows: of the step.
        found: [num_rows] bool, which rows.
        max_query_len: as of `whole_step`.
    """
    selections = select(rows, found)[:, found]
    index = np.flatnonzero(found)
    starts = common.query_start_loc_cpu.numpy()
    counts = starts[index + 1] - starts[index]
    ends = np.cumsum(counts)
    tokens = np.arange(ends[-1]) + np.repeat(starts[index] - (ends - counts), counts)
    parts = index, np.concatenate([[0], ends]), tokens
    numbers = torch.from_numpy(np.concatenate(parts))
    at, query_start_loc, where = numbers.to(lists.device, non_blocking=True).split(
        [len(part) for part in parts]
    )
    return ListedRows(
        lists,
        common.block_table_tensor[at],
        common.seq_lens[at],
        query_start_loc.to(torch.int32),
        max_query_len,
        lists.fill(selections, len(index)),
        chooses=bool(rows.in_pass[found].any()),
        tokens=where,
    )
