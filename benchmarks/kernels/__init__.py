"""Kernels against what else computes the same, and against a copy of their bytes."""
