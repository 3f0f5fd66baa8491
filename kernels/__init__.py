"""The method's operations on paged tensors, each beside an eager reference.

Nothing here knows vLLM. `cpu` has them as compiled loops, `cuda` in Triton.
"""
