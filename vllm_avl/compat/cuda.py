"""What vLLM's CUDA platform has no extension point for."""

from __future__ import annotations

from vllm.platforms import current_platform

from vllm_avl.compat import platform
from vllm_avl.compat.seam import Patch, Seam

SEAMS = (
    Seam(
        type(current_platform),
        "get_valid_backends",
        ("device_capability", "attn_selector_config", "num_heads"),
        "what stock would choose",
    ),
)

PATCHES = (
    Patch(
        type(current_platform),
        "get_attn_backend_cls",
        ("selected_backend", "attn_selector_config", "num_heads"),
        "a back end cannot be over the one that stock would choose",
        wrap=platform.choose_base,
        until="a registered back end may depend on the layer it is for",
    ),
)
