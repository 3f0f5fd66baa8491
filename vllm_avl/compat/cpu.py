"""What vLLM's CPU platform has no extension point for."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from vllm_avl.compat import platform
from vllm_avl.compat.seam import Patch, Seam

SEAMS = (
    Seam(
        CPUAttentionMetadataBuilder,
        "build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "what a step reads",
    ),
)

PATCHES = (
    Patch(
        CpuPlatform,
        "get_attn_backend_cls",
        ("selected_backend", "attn_selector_config", "num_heads"),
        "the CPU platform answers CPU_ATTN whatever back end is asked for",
        wrap=platform.choose_backend,
        until="vLLM's CPU platform honours registered back ends",
    ),
)
