"""Where vLLM's CPU build has fp8 caches."""

import pytest
import torch

NEEDS_FP8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 caches need AVX-512"
)
