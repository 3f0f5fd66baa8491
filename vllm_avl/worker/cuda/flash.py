"""`avl` on CUDA over vLLM's FlashAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_avl.worker.cuda.backend import (
    CUDABackend,
    CUDAImpl,
    CUDAMetadata,
    CUDAMetadataBuilder,
)


@dataclass
class AVLFlashMetadata(CUDAMetadata, FlashAttentionMetadata):
    """What a step's attention reads, and who has work after it."""


class AVLFlashMetadataBuilder(CUDAMetadataBuilder, FlashAttentionMetadataBuilder):
    """Builds the metadata of a step over what each request has stored."""

    metadata_cls: ClassVar[type] = AVLFlashMetadata
    # vLLM would put the runner's table into metadata over a shifted one.
    supports_update_block_table: bool = False


class AVLFlashImpl(CUDAImpl, FlashAttentionImpl):
    """FlashAttention, then selection and eviction where they are due."""


class AVLFlashBackend(CUDABackend, FlashAttentionBackend):
    """FLASH_ATTN that stores and reads what matters."""

    @staticmethod
    def get_impl_cls() -> type[AVLFlashImpl]:
        """Return the layers' implementation."""
        return AVLFlashImpl

    @staticmethod
    def get_builder_cls() -> type[AVLFlashMetadataBuilder]:
        """Return the metadata builder."""
        return AVLFlashMetadataBuilder
