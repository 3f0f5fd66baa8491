"""The places where vLLM has no extension point yet, on every platform."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.gpu_worker import Worker

from vllm_avl.compat import front_end, platform
from vllm_avl.compat.seam import Patch, Seam

SEAMS: tuple[Seam, ...] = (
    Seam(
        Scheduler,
        "_get_local_prefix_cache_hit",
        ("self", "request"),
        "first contact with a request that wants blocks, again after preemption",
    ),
    Seam(
        Scheduler,
        "_reserve_prefill_lookahead",
        ("self", "request", "num_computed_tokens", "num_new_tokens"),
        "where running, new and resumed requests have their chunk shortened",
    ),
    Seam(
        Scheduler,
        "schedule",
        ("self", "throttle_prefills"),
        "the step's message",
    ),
    Seam(
        FullAttentionManager,
        "remove_skipped_blocks",
        ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens"),
        "blocks of a live request go back to the pool",
    ),
    Seam(
        FullAttentionManager,
        "cache_blocks",
        ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
        "written blocks must not enter the prefix cache",
    ),
    Seam(
        FullAttentionManager,
        "_remove_blocks_in_range",
        ("self", "request_id", "first_block", "last_block"),
        "frees the head and leaves null blocks",
    ),
    Seam(
        FullAttentionManager,
        "pop_blocks_for_free",
        ("self", "request_id"),
        "the end of a request's blocks, by finish, abort or preemption",
    ),
    Seam(FullAttentionManager, "new_step_starts", ("self",), "settled blocks go first"),
    Seam(
        Worker,
        "execute_model",
        ("self", "scheduler_output"),
        "the plans arrive",
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
        type(current_platform),
        "check_and_update_config",
        ("vllm_config",),
        "a back end cannot choose a block size, a scheduler and a worker, or refuse",
        wrap=platform.update_config,
        until="back ends take part in vLLM's configuration",
    ),
    Patch(
        InputProcessor,
        "process_inputs",
        (
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
            "arrival_time",
            "lora_request",
            "tokenization_kwargs",
            "trace_headers",
            "priority",
            "data_parallel_rank",
            "resumable",
            "session_id",
            "kv_hints",
        ),
        "a bad vllm_xargs value must be a 400; n > 1 is known in the front end only",
        wrap=front_end.check_request,
        until="vLLM has a hook that validates SamplingParams.extra_args",
    ),
)


if current_platform.is_cpu():
    from vllm_avl.compat import cpu

    SEAMS, PATCHES = SEAMS + cpu.SEAMS, PATCHES + cpu.PATCHES
elif current_platform.is_cuda():
    from vllm_avl.compat import cuda

    SEAMS, PATCHES = SEAMS + cuda.SEAMS, PATCHES + cuda.PATCHES


def mismatches() -> list[str]:
    """Where the installed vLLM is not the one this was written for."""
    found = [seam.mismatch() for seam in (*SEAMS, *PATCHES)]
    return [mismatch for mismatch in found if mismatch is not None]


def apply_all() -> None:
    """Apply every patch, once a process."""
    for patch in PATCHES:
        patch.apply()
