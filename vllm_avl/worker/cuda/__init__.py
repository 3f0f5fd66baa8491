"""The back end on CUDA: vLLM's FlashAttention or Triton attention, and ours."""
