"""What a worker needs of vLLM, looked at where one starts and nowhere else.

A process that configures or inspects may see no device, and could not import this.
"""

from __future__ import annotations

import functools

from vllm.platforms import current_platform
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_worker import Worker

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
