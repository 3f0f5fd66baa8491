"""The method's operations on paged tensors, each beside an eager reference.

Nothing here knows vLLM. Caches are views `[num_blocks, num_kv_heads, block_size,
head_size]` with any strides, so one operation serves every memory layout.
"""

from vllm_avl.kernels.compact_blocks import compact_blocks
from vllm_avl.kernels.vision_scores import vision_scores

__all__ = ["compact_blocks", "vision_scores"]
