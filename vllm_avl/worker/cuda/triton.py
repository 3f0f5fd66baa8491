"""`avl` on CUDA over vLLM's Triton attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from vllm_avl.worker.cuda.backend import (
    CUDABackend,
    CUDAImpl,
    CUDAMetadata,
    CUDAMetadataBuilder,
)


@dataclass
class AVLTritonMetadata(CUDAMetadata, TritonAttentionMetadata):
    """What a step's attention reads, and who has work after it."""


class AVLTritonMetadataBuilder(CUDAMetadataBuilder, TritonAttentionMetadataBuilder):
    """Builds the metadata of a step over what each request has stored."""

    metadata_cls: ClassVar[type] = AVLTritonMetadata


class AVLTritonImpl(CUDAImpl, TritonAttentionImpl):
    """Triton attention, then selection and eviction where they are due."""


class AVLTritonBackend(CUDABackend, TritonAttentionBackend):
    """TRITON_ATTN that stores and reads what matters."""

    @staticmethod
    def get_impl_cls() -> type[AVLTritonImpl]:
        """Return the layers' implementation."""
        return AVLTritonImpl

    @staticmethod
    def get_builder_cls() -> type[AVLTritonMetadataBuilder]:
        """Return the metadata builder."""
        return AVLTritonMetadataBuilder
