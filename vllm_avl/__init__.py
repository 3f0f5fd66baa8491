"""Adaptive attention for vision-language models in vLLM (A-VL, AAAI 2025)."""

__version__ = "0.1.0"
