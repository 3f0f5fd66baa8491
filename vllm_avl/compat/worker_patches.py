"""What a worker needs of vLLM, looked at where one starts and nowhere else.

A process that configures or inspects may see no device, and could not import this.
"""

from __future__ import annotations

import functools

from vllm.model_executor.layers.attention import chunked_local_attention
from vllm.platforms import current_platform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_worker import Worker

from vllm_avl.compat.platform import leave_to_stock
from vllm_avl.compat.seam import Patch, Seam, mismatches_of, unmet_by
from vllm_avl.support import refuse_vllm
from vllm_avl.worker.counted import CountedOutput
from vllm_avl.worker.drafts import place_by_length

SEAMS: tuple[Seam, ...] = (
    Seam(
        Worker,
        "execute_model",
        ("self", "scheduler_output"),
        "the plans arrive",
    ),
    Seam(
        Worker,
        "sample_tokens",
        ("self", "grammar_output"),
        "what the step counted leaves",
    ),
    Seam(
        Worker,
        "initialize_from_config",
        ("self", "kv_cache_config"),
        "the final cache groups are known",
    ),
)
PATCHES: tuple[Patch, ...] = (
    Patch(
        SpecDecodeBaseProposer,
        "_update_positions_dependent_metadata",
        (
            "self",
            "positions",
            "common_attn_metadata",
            "batch_size",
            "input_batch_size",
            "block_size",
        ),
        "vLLM puts what a drafter's own layers cache where the rotary position says, "
        "which in several axes lies in front: in blocks that we have given back",
        wrap=place_by_length,
        until="vLLM places a draft's rows by their number",
    ),
    Patch(
        chunked_local_attention,
        "get_attn_backend",
        (
            "head_size",
            "dtype",
            "kv_cache_dtype",
            "use_mla",
            "has_sink",
            "use_sparse",
            "use_mm_prefix",
            "use_per_head_quant_scales",
            "attn_type",
            "num_heads",
            "has_sliding_window",
        ),
        "a layer that sees a chunk of the text says so to nobody who chooses its back "
        "end, and would get the one that was asked for",
        wrap=leave_to_stock,
        until="back ends are chosen by whether a layer is local, as by its window",
    ),
)
OURS: tuple[type, ...] = (CountedOutput,)
"""What vLLM or a worker makes of ours; of back ends one that is always there."""

if current_platform.is_cpu():
    from vllm_avl.worker.cpu import backend as cpu

    OURS += cpu.AVLBackend, cpu.AVLMetadataBuilder, cpu.AVLImpl
elif current_platform.is_cuda():
    from vllm_avl.compat import cuda_runners
    from vllm_avl.worker.cuda import triton as cuda

    OURS += cuda.AVLTritonBackend, cuda.AVLTritonMetadataBuilder, cuda.AVLTritonImpl
    SEAMS, PATCHES = SEAMS + cuda_runners.SEAMS, PATCHES + cuda_runners.PATCHES


def mismatches() -> list[str]:
    """Where the installed vLLM is not the one this was written for."""
    return mismatches_of((*SEAMS, *PATCHES)) + unmet_by(OURS)


@functools.cache
def apply_all() -> None:
    """Apply every patch, once a process.

    Raises:
        UnsupportedError: vLLM's functions are others.
    """
    problems = mismatches()
    if problems:
        refuse_vllm(problems)
    for patch in PATCHES:
        patch.apply()
