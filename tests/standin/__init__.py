"""vLLM's CUDA code path on CPU tensors: see `hopper`."""
