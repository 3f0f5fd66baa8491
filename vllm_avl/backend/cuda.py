"""The attention back end `avl` on CUDA: attention of vLLM's over what is stored.

These are the parts that do not depend on whose attention it is; `cuda_triton` and
`cuda_flash` put them in front of vLLM's classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_avl.backend.gather import GatherBuffers, GatheredRows, gathered_rows
from vllm_avl.backend.kernel_layer import KernelLayer
from vllm_avl.backend.layer import Layer
from vllm_avl.backend.ranks import RANKS
from vllm_avl.backend.request import Task
from vllm_avl.backend.step import Step, current_step
from vllm_avl.backend.triton_cache import TritonCache
from vllm_avl.backend.view import StepView, shift
from vllm_avl.cache.spec import AVLSpec, adapt
from vllm_avl.config import parse_config
from vllm_avl.metrics.definitions import key
from vllm_avl.support import check_layer, check_layer_names, check_spec


@dataclass(kw_only=True)
class CUDAMetadata:
    """Beside vLLM's metadata over what is read: who has work after the attention."""

    num_actual_tokens: int
    tasks: list[Task] = field(default_factory=list)
    gathered: GatheredRows | None = None
    """Rows that our kernel attends."""
    buffers: GatherBuffers | None = None
    """Of lists of core; None where core is packed."""


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
        check_layer_names(layer_names, extract_layer_index)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        modes = vllm_config.compilation_config.cudagraph_mode
        self._has_full_graphs = modes.has_full_cudagraphs()
        self._max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self._gather: GatherBuffers | None = None
        if parse_config(vllm_config.additional_config).lists_core:
            num_blocks = vllm_config.cache_config.num_gpu_blocks
            assert num_blocks is not None
            self._gather = GatherBuffers(
                num_blocks * kv_cache_spec.block_size,
                self.num_heads_q,
                self.num_heads_kv,
                self._max_num_seqs,
                device,
                layer_names,
            )
        self._table: torch.Tensor | None = None
        self._seq_lens = torch.zeros(
            self._max_num_seqs, dtype=torch.int32, device=device
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Build the metadata; tables of decode steps go where graphs read them."""
        common = common_attn_metadata
        step = current_step()
        view = None
        if step is not None and step.turns:
            view = step.view(common, self.block_size, fuses_scores=False)
        in_graph = self._has_full_graphs and common.max_query_len == 1
        if view is None and not in_graph:
            return super().build(common_prefix_len, common, fast_build)
        if view is None:
            view = StepView([], [], [])
        gathered = None
        if self._gather is not None:
            gathered = gathered_rows(self._gather, common, view.turns)
            if step is not None:
                self._count(step, view, self._gather.num_entered)
        if gathered is None or gathered.tokens is not None:
            common = self._shift(common, view.first_blocks, keep=in_graph)
        metadata = super().build(common_prefix_len, common, fast_build)
        return self.metadata_cls(
            **vars(metadata),
            tasks=view.tasks,
            gathered=gathered,
            buffers=self._gather,
        )

    def _count(self, step: Step, view: StepView, num_entered: torch.Tensor) -> None:
        """Count what kernels will choose, and say where they count what enters core."""
        for turn in view.turns:
            if turn is not None and turn.scores and turn.state.ranks_in_kernels:
                num_selected = turn.state.plan.num_core_vision * len(self.layer_names)
                turn.state.counts.count(key("core_rows_selected"), num_selected)
                step.num_entered = num_entered

    def _shift(
        self, common: CommonAttentionMetadata, first_blocks: list[int], keep: bool
    ) -> CommonAttentionMetadata:
        """Return `common` with every row starting at its first block.

        Args:
            common: of the step; its tensors are the runner's, and are not written.
            first_blocks: for each row; rows behind these start at 0.
            keep: put the result into the buffers that graphs read.
        """
        num_reqs = common.num_reqs
        table = common.block_table_tensor[:num_reqs]
        padded = first_blocks + [0] * (num_reqs - len(first_blocks))
        first = torch.tensor(padded, dtype=torch.int32)
        lens = common.seq_lens_cpu_upper_bound
        assert lens is not None
        lens = lens[:num_reqs] - first * self.block_size
        out = self._buffers(table) if keep else None
        new_table, seq_lens = shift(
            first.to(self.device, non_blocking=True),
            table,
            common.seq_lens[:num_reqs],
            self.block_size,
            out,
        )
        return common.replace(
            block_table_tensor=new_table,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=lens,
            # Captured graphs are for any length.
            max_seq_len=max(int(lens.max()), 1) if not keep else common.max_seq_len,
        )

    def _buffers(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_reqs, width = table.shape
        if self._table is None:
            self._table = table.new_zeros(self._max_num_seqs, width)
        assert self._table.shape[1] == width
        return self._table[:num_reqs], self._seq_lens[:num_reqs]


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
        gathered = None if ours is None else ours.gathered
        if gathered is None or gathered.tokens is not None:
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
        if ours is None or not (ours.tasks or gathered):
            return output
        cache = self._cache(layer, kv_cache, ours.buffers)
        if gathered is not None:
            count = ours.num_actual_tokens
            gathered.attend(
                layer.layer_name,
                query[:count],
                cache.keys,
                cache.values,
                self.scale,
                self.logits_soft_cap,
                output[:count],
            )
        if ours.tasks:
            self._perform(layer.layer_name, cache, ours, query, output)
        return output

    def _perform(
        self,
        layer_name: str,
        cache: TritonCache,
        ours: CUDAMetadata,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Do a layer's tasks: by kernels what they can rank, else by policies."""
        index, buffers = extract_layer_index(layer_name), ours.buffers
        lists = None if buffers is None else buffers.layers[layer_name]
        by_kernels = KernelLayer(index, cache, lists, RANKS)
        by_policies = Layer(index, cache, RANKS)
        for task in ours.tasks:
            if task.state.ranks_in_kernels:
                by_kernels.perform(task, query)
            else:
                by_policies.perform(task, query, output)

    def _cache(
        self,
        layer: torch.nn.Module,
        kv_cache: torch.Tensor,
        buffers: GatherBuffers | None,
    ) -> TritonCache:
        """Return the layer's cache as selection and eviction see it."""
        plain = kv_cache, self.head_size, self.scale, self.logits_soft_cap
        if buffers is None:
            return TritonCache(*plain)
        lists = buffers.layers[layer.layer_name]
        return TritonCache(*plain, lists.core_list, buffers.scores)


class CUDABackend(AttentionBackend):
    """A back end of vLLM's that stores and reads what matters."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16"]

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
    def supports_mm_prefix(cls) -> bool:
        """Return False: rows that attend to what follows them cannot be evicted."""
        return False

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
