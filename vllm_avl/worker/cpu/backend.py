"""The attention back end `avl` on CPU: vLLM's own kernel over the stored tail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_avl.kernels.cpu.attention import DecodeRows
from vllm_avl.layers import check_layer, check_layer_names, check_spec
from vllm_avl.scheduler.spec import AVLSpec, adapt
from vllm_avl.support import FP8_CACHES
from vllm_avl.worker.cpu.cache import PACKED, READABLE, CPUCache
from vllm_avl.worker.cpu.prompts import leave_scoring_rows
from vllm_avl.worker.drafts import num_behind
from vllm_avl.worker.fp8 import as_numbers
from vllm_avl.worker.layer import Layer
from vllm_avl.worker.ranks import RANKS
from vllm_avl.worker.request import Task
from vllm_avl.worker.seats import Seats, SeatTable
from vllm_avl.worker.step import StepRows, current_step, drafting
from vllm_avl.worker.view import make_tasks, stored_table_on_cpu


@dataclass
class AttendedRows:
    """The rows of a step that our kernel attends."""

    rows: DecodeRows
    seats: Seats
    of_kept: npt.NDArray[np.intp]
    """[num_rows] which mask is read, see `SeatTable.masks`."""
    table: SeatTable
    is_whole_step: bool
    """Whether there is no other row, so that vLLM's kernel has nothing to do."""

    def masks(self, layer: str) -> npt.NDArray:
        """[num_rows] addresses of the rows' masks in a layer."""
        return self.table.masks(layer, self.seats, self.of_kept)


@dataclass
class AVLMetadata(CPUAttentionMetadata):
    """Metadata over what is read, and who has work after this step's attention."""

    tasks: list[Task] = field(default_factory=list)
    attended: AttendedRows | None = None


class AVLMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the metadata of a step over what each request has stored."""

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
        self._num_behind = num_behind(vllm_config)
        if self.isa not in READABLE:
            self.isa: str = "vec"
            self._set_isa_to_layers(layer_names)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Build the metadata; a step without adaptive requests is stock's."""
        common, step = common_attn_metadata, current_step()
        if step is None:
            return super().build(common_prefix_len, common, fast_build)
        rows = step.rows()
        # What lies behind the longest request is read by nobody.
        width = -(-common.max_seq_len // self.block_size)
        block_table = common.block_table_tensor
        stored = stored_table_on_cpu(rows, block_table, self.block_size, width)
        in_front = rows.first_block * self.block_size
        seq_lens = (common.seq_lens.numpy() - in_front).astype(np.int32)
        attended = _attended(rows, stored, seq_lens, common.query_start_loc_cpu)
        # vLLM's kernel must be given something for the rows that are ours.
        lengths = np.diff(common.query_start_loc_cpu.numpy())
        read = np.where(rows.is_attended, lengths, seq_lens)
        shifted = common.replace(
            seq_lens=torch.from_numpy(read),
            block_table_tensor=stored,
            max_seq_len=int(read.max()),
        )
        if step.ends_prompt.any():
            shifted = leave_scoring_rows(rows, shifted)
        metadata = super().build(common_prefix_len, shifted, fast_build)
        tasks = []
        if rows.with_python:
            query_starts = common.query_start_loc_cpu.tolist()
            sizes = query_starts, self.block_size
            tasks = make_tasks(rows, block_table, stored, *sizes)
        return AVLMetadata(**vars(metadata), tasks=tasks, attended=attended)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CPUAttentionMetadata:
        """Build what a drafter's own layers read, see `step.drafting`."""
        with drafting(draft_index, self._num_behind):
            return self.build(0, common_attn_metadata, fast_build=True)


def _attended(
    rows: StepRows,
    stored: torch.Tensor,
    seq_lens: npt.NDArray[np.int32],
    query_start_loc: torch.Tensor,
) -> AttendedRows | None:
    """Return the rows that our kernel attends, None for none of them.

    Args:
        rows: of the step.
        stored: [num_reqs, max_blocks] int32, see `view.stored_table`.
        seq_lens: [num_reqs] slots of what is stored.
        query_start_loc: [num_reqs + 1] index of each row's first token.
    """
    found = np.flatnonzero(rows.is_attended)
    if not len(found):
        return None
    is_whole_step = len(found) == len(rows.index)
    starts = query_start_loc.numpy().astype(np.int64)
    counts = np.diff(starts)[found]
    tokens, num_tokens = starts[found + 1] - 1, seq_lens[found].astype(np.int64)
    scored, is_whole_batch = rows.refreshes[found], is_whole_step
    if counts.max() > 1:
        # Each token of a row is one of the kernel's, and sees what is in front of it.
        is_whole_batch = False
        found, index = (
            np.repeat(found, counts),
            np.repeat(np.arange(len(counts)), counts),
        )
        behind = np.cumsum(counts)[index] - 1 - np.arange(len(index))
        tokens, num_tokens = tokens[index] - behind, num_tokens[index] - behind
        scored = scored[index] & (behind == rows.num_drafts[found])
    of = rows.of if is_whole_batch else rows.of[found]
    reads_all = rows.reads_all[found]
    decode_rows = DecodeRows(
        tokens,
        stored if is_whole_batch else stored[torch.from_numpy(found)],
        num_tokens,
        np.where(reads_all & ~of["shares"], 0, of["num_masked"]),
        of["mask_stride"],
        scored,
    )
    seats, table = rows.seats[found], rows.step.requests.seats
    of_kept = reads_all.astype(np.intp)
    return AttendedRows(decode_rows, seats, of_kept, table, is_whole_step)


class AVLImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, then selection and eviction where they are due."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_layer(
            alibi=self.alibi_slopes is not None,
            sinks=self.sinks is not None,
            sliding_window=self.sliding_window != -1,
            kv_sharing=self.kv_sharing_target_layer_name is not None,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend as stock does over the metadata's blocks, then perform the tasks."""
        ours = attn_metadata if isinstance(attn_metadata, AVLMetadata) else None
        attended = None if ours is None else ours.attended
        if attended is None or not attended.is_whole_step:
            output = super().forward(
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
        if ours is not None:
            name = layer.layer_name  # type: ignore[attr-defined]
            self._work(name, ours, self._cache(layer, kv_cache), query, output)
        return output

    def _cache(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> CPUCache:
        of_layer = self.head_size, self.scale, self.logits_soft_cap
        packed = layer.isa == PACKED  # type: ignore[attr-defined]
        if not self.is_fp8_kv_cache:
            return CPUCache(kv_cache, *of_layer, packed=packed)
        scales = layer._k_scale_float, layer._v_scale_float
        return CPUCache(as_numbers(kv_cache), *of_layer, *scales, packed)

    def _work(
        self,
        name: str,
        metadata: AVLMetadata,
        cache: CPUCache,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        attended = metadata.attended
        if attended is not None:
            cache.attend(query, attended.rows, attended.masks(name), output)
        layer = Layer(name, cache, RANKS)
        for task in metadata.tasks:
            layer.perform(task, query, output)


class AVLBackend(CPUAttentionBackend):
    """CPU_ATTN that stores and reads what matters."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", *FP8_CACHES]

    @staticmethod
    def get_name() -> str:
        """Return the name vLLM registered us under."""
        return "AVL"

    @staticmethod
    def get_impl_cls() -> type[AVLImpl]:
        """Return the layers' implementation."""
        return AVLImpl

    @staticmethod
    def get_builder_cls() -> type[AVLMetadataBuilder]:
        """Return the metadata builder."""
        return AVLMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Mark plain full attention as ours to manage."""
        return adapt(spec)
