"""The back end on a CPU: vLLM's own kernel, and ours compiled by Numba."""
