"""Attention and the moving of rows on a CPU, as loops that Numba compiles.

A cache is `[num_blocks, num_kv_heads, 2, block_size · head_size]`, contiguous: a block's
keys by column `[head_size, block_size]`, then its values by row, as vLLM's kernel lays
them out. Block sizes are multiples of 32, head sizes of 16.
"""
