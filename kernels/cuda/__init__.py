"""The method's operations as CUDA kernels, each beside an eager reference."""
