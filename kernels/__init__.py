"""The method's operations on paged tensors, each beside an eager reference.

Nothing here knows vLLM. Caches are views `[num_blocks, num_kv_heads, block_size,
head_size]` with any strides, so one operation serves every memory layout.
"""

from vllm_avl.kernels.attention_scores import attention_scores
from vllm_avl.kernels.compact_blocks import compact_blocks
from vllm_avl.kernels.exchange_rows import exchange_rows
from vllm_avl.kernels.scored_attention import scored_attention

__all__ = ["attention_scores", "compact_blocks", "exchange_rows", "scored_attention"]
