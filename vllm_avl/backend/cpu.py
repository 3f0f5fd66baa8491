"""The attention back end `avl` on CPU: vLLM's own kernel over the stored tail."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_avl.backend.cpu_cache import KEYS_BY_COLUMN, CPUCache
from vllm_avl.backend.layer import Layer
from vllm_avl.backend.listed import ListedRows, listed_rows
from vllm_avl.backend.ranks import RANKS
from vllm_avl.backend.request import Task
from vllm_avl.backend.step import current_step
from vllm_avl.backend.view import shift
from vllm_avl.cache.spec import AVLSpec, adapt
from vllm_avl.support import check_layer, check_layer_names, check_spec


@dataclass
class AVLMetadata(CPUAttentionMetadata):
    """Metadata over what is read, and who has work after this step's attention."""

    tasks: list[Task] = field(default_factory=list)
    listed: ListedRows | None = None
    """Rows that our kernel attends."""


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
        check_layer_names(layer_names, extract_layer_index)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.isa not in KEYS_BY_COLUMN:
            # AMX packs keys in tiles; this kernel's rows can be moved one by one.
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
        if step is None or not step.turns:
            return super().build(common_prefix_len, common, fast_build)
        view = step.view(common, self.block_size, fuses_scores=True)
        table, seq_lens = shift(
            torch.tensor(view.first_blocks, dtype=torch.int32),
            common.block_table_tensor,
            common.seq_lens,
            self.block_size,
        )
        shifted = common.replace(
            seq_lens=seq_lens,
            block_table_tensor=table,
            max_seq_len=int(seq_lens.max()),
        )
        metadata = super().build(common_prefix_len, shifted, fast_build)
        listed = listed_rows(
            view.turns,
            common.block_table_tensor,
            common.query_start_loc_cpu.tolist(),
            self.block_size,
        )
        return AVLMetadata(**vars(metadata), tasks=view.tasks, listed=listed)


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
        if ours is None or ours.listed is None or not ours.listed.is_whole_step:
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
            index = extract_layer_index(layer.layer_name)  # type: ignore[attr-defined]
            self._work(index, ours, kv_cache, query, output)
        return output

    def _work(
        self,
        index: int,
        metadata: AVLMetadata,
        kv_cache: torch.Tensor,
        query: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        cache = CPUCache(kv_cache, self.head_size, self.scale, self.logits_soft_cap)
        if metadata.listed is not None:
            paid = metadata.listed.attend(index, cache, query, output)
            cache = replace(cache, paid=paid)
        layer = Layer(index, cache, RANKS)
        for task in metadata.tasks:
            layer.perform(task, query, output)


class AVLBackend(CPUAttentionBackend):
    """CPU_ATTN that stores and reads what matters."""

    supported_kv_cache_dtypes: ClassVar[list] = ["auto"]

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
