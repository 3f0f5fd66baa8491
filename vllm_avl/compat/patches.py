"""The places where vLLM has no extension point yet, in every process.

What only workers need is in `worker_patches`.
"""

from __future__ import annotations

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_avl.compat import front_end, platform, responses, stats
from vllm_avl.compat.seam import Patch, Seam, mismatches_of

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
        Scheduler,
        "update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "what workers counted arrives; decisions leave with first tokens",
    ),
    Seam(
        Scheduler,
        "make_stats",
        (
            "self",
            "spec_decoding_stats",
            "kv_connector_stats",
            "cudagraph_stats",
            "perf_stats",
            "ec_connector_stats",
        ),
        "what an engine counted leaves",
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
    Patch(
        StatLoggerManager,
        "__init__",
        (
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        "a stat logger plug-in turns statistics on in every server it is installed "
        "beside, and cannot come first",
        wrap=stats.add_logger,
        until="SchedulerStats has a field for plug-ins",
    ),
    Patch(
        OutputProcessor,
        "process_outputs",
        (
            "self",
            "engine_core_outputs",
            "engine_core_timestamp",
            "iteration_stats",
            "weight_version",
        ),
        "how a request is served has to reach the front end",
        wrap=front_end.receive_decisions,
        until="EngineCoreOutput has a field for plug-ins",
    ),
    Patch(
        OutputProcessor,
        "_finish_request",
        ("self", "req_state"),
        "the page shows finished answers, where it may",
        wrap=front_end.keep_answer,
        until="the front end has a hook for finished requests",
    ),
    Patch(
        OpenAIServingChat,
        "create_chat_completion",
        ("self", "request", "raw_request"),
        "a response has to say how its request was served; bad requests are refused "
        "before their pictures are read",
        wrap=responses.say_in_usage,
        until="vLLM lets plug-ins extend a response's usage",
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
    return mismatches_of((*SEAMS, *PATCHES))


def apply_all() -> None:
    """Apply every patch, once a process."""
    for patch in PATCHES:
        patch.apply()
