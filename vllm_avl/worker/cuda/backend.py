"""The attention back end `avl` on CUDA: attention of vLLM's over what is stored.

These are the parts that do not depend on whose attention it is; `triton.py` and
`flash.py` put them in front of vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_avl.config import parse_config
from vllm_avl.layers import check_layer, check_layer_names, check_spec
from vllm_avl.metrics.definitions import key
from vllm_avl.scheduler.spec import AVLSpec, adapt
from vllm_avl.support import FP8_CACHES, PLAIN_CACHES
from vllm_avl.worker.cuda.cache import CUDACache, Scales
from vllm_avl.worker.cuda.core_lists import CoreLists
from vllm_avl.worker.cuda.listed_rows import ListedRows, some_rows, whole_step
from vllm_avl.worker.drafts import num_behind
from vllm_avl.worker.fp8 import as_numbers
from vllm_avl.worker.layer import Layer
from vllm_avl.worker.ranks import RANKS
from vllm_avl.worker.request import RequestState, Task
from vllm_avl.worker.step import StepRows, current_step, drafting
from vllm_avl.worker.view import make_tasks, stored_table


@dataclass(kw_only=True)
class CUDAMetadata:
    """Beside vLLM's metadata over what is read: who has work after the attention."""

    num_actual_tokens: int
    tasks: list[Task] = field(default_factory=list)
    listed: list[ListedRows] = field(default_factory=list)
    """Rows that our kernel attends."""
    lists_of: Callable[[RequestState], CoreLists] | None = None
    """Which lists a request's core is in."""


class CUDAMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Builds the metadata of a step over what each request has stored.

    A full CUDA graph reads the tables it was captured with, so those of decode steps
    lie in buffers of ours that every such step fills, adaptive or not.
    """

    metadata_cls: ClassVar[type]
    """vLLM's metadata and `CUDAMetadata`."""
    block_size: int
    num_heads_q: int
    num_heads_kv: int

    # A mixed batch may end a prompt, which is work for Python.
    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        check_spec(kv_cache_spec, AVLSpec)
        check_layer_names(layer_names)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # In place it would go on over the runner's table.
        self.supports_draft_decode_metadata_update = False
        self._decode_len = 1 + vllm_config.num_speculative_tokens
        self._num_behind = num_behind(vllm_config)
        modes = vllm_config.compilation_config.cudagraph_mode
        self._has_full_graphs = modes.has_full_cudagraphs()
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        num_blocks = vllm_config.cache_config.num_gpu_blocks
        assert num_blocks is not None
        self._num_slots = num_blocks * kv_cache_spec.block_size
        self._num_entered = torch.zeros(1, dtype=torch.int32, device=device)
        num_lists = parse_config(vllm_config.additional_config).num_lists
        self._in_graph = self._new_lists(num_lists) if num_lists else None
        self._table: torch.Tensor | None = None
        self._seq_lens = torch.zeros(
            self._max_num_seqs, dtype=torch.int32, device=device
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        """Return which steps full graphs may be for: decode rows, and all drafts."""
        if vllm_config.speculative_config is not None:
            return AttentionCGSupport.UNIFORM_BATCH
        return cls._cudagraph_support

    def _new_lists(self, num_lists: int) -> CoreLists:
        """Return lists of core: for 1, all KV heads have the same."""
        return CoreLists(
            self._num_slots,
            self.num_heads_q,
            self.num_heads_kv,
            1 if num_lists == 1 else self.num_heads_kv,
            self._max_num_seqs,
            self._num_entered,
            self.layer_names,
        )

    @cached_property
    def _beside(self) -> CoreLists:
        """Lists of what single requests ask for and no graph reads."""
        return self._new_lists(2)

    def _lists_of(self, state: RequestState) -> CoreLists:
        """Return the lists that a request's core is in."""
        if state.seats.records["in_graph"][state.seat]:
            assert self._in_graph is not None
            return self._in_graph
        return self._beside

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Build the metadata; tables of decode steps go where graphs read them."""
        common, step = common_attn_metadata, current_step()
        rows = None if step is None else step.rows()
        # Any step that could be one: drafts may be fewer than asked for.
        is_decode = common.max_query_len <= self._decode_len
        in_graph = self._has_full_graphs and is_decode
        if rows is None and not in_graph:
            return super().build(common_prefix_len, common, fast_build)
        stored = self._stored(common, rows, keep=in_graph)
        listed = self._listed(stored, rows)
        metadata = super().build(common_prefix_len, stored, fast_build)
        tasks = []
        if rows is not None:
            self._count(rows)
            tasks = make_tasks(
                rows,
                common.block_table_tensor,
                stored.block_table_tensor,
                common.query_start_loc_cpu.tolist() if rows.with_python else (),
                self.block_size,
            )
        return self.metadata_cls(
            **vars(metadata), tasks=tasks, listed=listed, lists_of=self._lists_of
        )

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> Any:
        """Build what a drafter's own layers read, see `step.drafting`."""
        with drafting(draft_index, self._num_behind):
            return self.build(0, common_attn_metadata, fast_build=True)

    def _stored(
        self, common: CommonAttentionMetadata, rows: StepRows | None, keep: bool
    ) -> CommonAttentionMetadata:
        """Return `common` with every row over what its request has stored.

        Args:
            common: of the step; its tensors are the runner's, and are not written.
            rows: of the step; None where nothing is adaptive.
            keep: put the result into the buffers that graphs read.
        """
        num_reqs = common.num_reqs
        table = common.block_table_tensor[:num_reqs]
        first = np.zeros(num_reqs, np.int32)
        table_out = lens_out = None
        if keep:
            table_out, lens_out = self._buffers(table)
        if rows is None:
            assert table_out is not None
            stored = table_out.copy_(table)
        else:
            stored = stored_table(rows, table, self.block_size, table_out)
            num_tokens = rows.first_block * rows.step.requests.block_size
            first[: len(num_tokens)] = num_tokens
        in_front = torch.from_numpy(first)
        lens = common.seq_lens_cpu_upper_bound
        assert lens is not None
        # VLLM leaves out what a draft model takes in besides.
        lens = lens[:num_reqs] - in_front + self._num_behind
        seq_lens = torch.sub(
            common.seq_lens[:num_reqs],
            in_front.to(self.device, non_blocking=True),
            out=lens_out,
        )
        return common.replace(
            block_table_tensor=stored,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=lens,
            mm_req_doc_ranges=_ranges(common, rows),
            # Captured graphs are for any length.
            max_seq_len=max(int(lens.max()), 1) if not keep else common.max_seq_len,
        )

    def _listed(
        self, stored: CommonAttentionMetadata, rows: StepRows | None
    ) -> list[ListedRows]:
        """Return the rows that our kernel attends, with each kind of lists."""
        nothing = np.zeros(0, np.bool_)
        attended = nothing if rows is None else rows.is_attended
        in_graph = nothing if rows is None else attended & rows.of["in_graph"]
        # Two kernels at most are compiled, however many drafts a step has.
        longest = 1 if stored.max_query_len == 1 else self._decode_len
        is_decode = stored.max_query_len <= longest
        listed = []
        if self._in_graph is not None and is_decode:
            listed.append(whole_step(self._in_graph, stored, rows, in_graph, longest))
        elif self._in_graph is not None and in_graph.any():
            assert rows is not None
            listed.append(some_rows(self._in_graph, stored, rows, in_graph, longest))
        beside = attended & ~in_graph
        if beside.any():
            assert rows is not None
            listed.append(some_rows(self._beside, stored, rows, beside, longest))
        return listed

    def _count(self, rows: StepRows) -> None:
        """Count what kernels will choose, and say where they count what enters core."""
        if rows.in_pass.any():
            num_selected = int(rows.of["num_selected"][rows.in_pass].sum())
            num_selected *= len(self.layer_names)
            counts = rows.step.requests.counts
            counts.count(key("core_rows_selected"), num_selected)
            rows.step.num_entered = self._num_entered

    def _buffers(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_reqs, width = table.shape
        if self._table is None:
            self._table = table.new_zeros(self._max_num_seqs, width)
        assert self._table.shape[1] == width
        return self._table[:num_reqs], self._seq_lens[:num_reqs]


def _ranges(
    common: CommonAttentionMetadata, rows: StepRows | None
) -> dict[int, list[tuple[int, int]]] | None:
    """Where pictures are seen in both directions: positions in prompts.

    An answer's row stands behind them all, but not in the table of what is stored.
    """
    ranges = common.mm_req_doc_ranges
    if ranges is None or rows is None:
        return ranges
    answers = set(np.flatnonzero(rows.is_answer).tolist())
    return {row: pictures for row, pictures in ranges.items() if row not in answers}


class CUDAImpl(AttentionImpl[Any]):
    """vLLM's attention, then selection and eviction where they are due."""

    sliding_window: tuple[int, int]
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    kv_sharing_target_layer_name: str | None
    logits_soft_cap: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(
            alibi=self.alibi_slopes is not None,
            sinks=self.sinks is not None,
            sliding_window=self.sliding_window != (-1, -1),
            kv_sharing=self.kv_sharing_target_layer_name is not None,
        )

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Return False: our kernel writes its output as the query's dtype."""
        return False

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as stock does over the metadata's blocks, then perform the tasks."""
        ours = attn_metadata if isinstance(attn_metadata, CUDAMetadata) else None
        listed = [] if ours is None else ours.listed
        if not any(rows.tokens is None for rows in listed):
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if ours is None or not (ours.tasks or listed):
            return output
        cache = self._cache(layer, kv_cache, ours)
        count = ours.num_actual_tokens
        for rows in listed:
            rows.attend(cache, query[:count], output[:count])
        work = Layer(cache.layer_name, cache, RANKS)
        for task in ours.tasks:
            work.perform(task, query, output)
        return output

    def _cache(
        self, layer: Any, kv_cache: torch.Tensor, metadata: CUDAMetadata
    ) -> CUDACache:
        scales = None
        if self.kv_cache_dtype in FP8_CACHES:
            scales = Scales(layer._q_scale, layer._k_scale, layer._v_scale)
        return CUDACache(
            as_numbers(kv_cache),
            self.head_size,
            self.scale,
            self.logits_soft_cap,
            layer.layer_name,
            metadata.lists_of,
            scales,
        )


class CUDABackend(AttentionBackend):
    """A back end of vLLM's that stores and reads what matters."""

    supported_kv_cache_dtypes: ClassVar[list] = [*PLAIN_CACHES, *FP8_CACHES]

    @staticmethod
    def get_name() -> str:
        """Return the name vLLM registered us under."""
        return "AVL"

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Mark plain full attention as ours to manage."""
        return adapt(super().customize_spec(spec))

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Return True for decoders: nothing else has a cache that we can move."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        """Return False: a sink is no cached row."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Return False: its window counts positions that we move."""
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Return False: its window counts positions that we move."""
        return False
