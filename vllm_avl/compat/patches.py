"""The places where vLLM has no extension point yet, in every process.

What only workers need is in `worker_patches`.
"""

from __future__ import annotations

from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.multimodal.cache import LruKeyReplicatedSenderCache
from vllm.platforms import current_platform
from vllm.renderers.base import BaseRenderer
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager

from vllm_avl.compat import offloading, platform
from vllm_avl.compat.seam import Patch, Seam, mismatches_of, unmet_by
from vllm_avl.front_end import asks, picture_cache, responses
from vllm_avl.front_end import requests as front_end
from vllm_avl.front_end import stat_logger as stats
from vllm_avl.scheduler.manager import AVLManager
from vllm_avl.scheduler.scheduler import AVLAsyncScheduler, AVLScheduler

SEAMS: tuple[Seam, ...] = (
    Seam(
        Scheduler,
        "_get_local_prefix_cache_hit",
        ("self", "request", "max_cache_hit_length"),
        "first contact with a request that wants blocks, again after preemption",
        also=(("self", "request"),),  # 0.32
    ),
    Seam(
        Scheduler,
        "_try_schedule_encoder_inputs",
        (
            "self",
            "request",
            "num_computed_tokens",
            "num_new_tokens",
            "encoder_compute_budget",
            "shift_computed_tokens",
        ),
        "where running, new and resumed requests have their chunk shortened",
    ),
    Seam(
        Scheduler,
        "_mark_prefix_replay",
        ("self", "request", "num_hit_tokens", "window_loaded"),
        "where a hit of a connector may be cut: it reaches new requests and loaded "
        "ones",
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
        "get_num_blocks_to_allocate",
        (
            "self",
            "request_id",
            "num_tokens",
            "new_computed_blocks",
            "total_computed_tokens",
            "num_local_computed_tokens",
            "num_tokens_main_model",
            "apply_admission_cap",
            "prefill_end",
        ),
        "blocks that a prompt's end needs besides are asked for in time",
    ),
    Seam(
        FullAttentionManager,
        "allocate_new_blocks",
        ("self", "request_id", "num_tokens", "num_tokens_main_model"),
        "and taken",
    ),
    Seam(
        FullAttentionManager,
        "add_local_computed_blocks",
        (
            "self",
            "request_id",
            "new_computed_blocks",
            "num_local_computed_tokens",
            "num_external_computed_tokens",
        ),
        "hits may be of what another request has given back",
    ),
    Seam(
        FullAttentionManager,
        "cache_blocks",
        ("self", "request", "num_tokens", "retention_interval", "replay_boundaries"),
        "answers that saw less than all must not enter the prefix cache",
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
    Seam(
        KVCacheCoordinator,
        "cache_blocks",
        ("self", "request", "num_computed_tokens"),
        "an answer that saw less than all must not be shared by other cache groups",
    ),
    Seam(FullAttentionManager, "new_step_starts", ("self",), "settled blocks go first"),
    *offloading.SEAMS,
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
        "usage counts at an answer's end; the page may show finished answers",
        wrap=front_end.keep_answer,
        until="the front end has a hook for finished requests",
    ),
    Patch(
        OutputProcessor,
        "add_request",
        ("self", "request", "prompt", "parent_req", "request_index", "queue"),
        "answers carry ids that clients choose; here requests get the engine's",
        wrap=asks.note_request,
        until="an answer's request is known by the engine's id",
    ),
    Patch(
        BaseRenderer,
        "_process_tokens_async",
        ("self", "prompt", "skip_mm_cache"),
        "where pictures as the model sees them meet the hashes of their features",
        wrap=asks.note_pictures,
        until="a feature knows its picture",
    ),
    Patch(
        BaseRenderer,
        "_process_multimodal",
        (
            "self",
            "prompt",
            "mm_data",
            "mm_uuids",
            "mm_processor_kwargs",
            "media_io_kwargs",
            "skip_mm_cache",
        ),
        "a prompt that fails after its pictures were read leaves the cache of pictures "
        "unlike the engine's",
        wrap=picture_cache.undo_failure,
        until="vLLM takes out what the engine will not see",
    ),
    Patch(
        LruKeyReplicatedSenderCache,
        "get_and_update_item",
        ("self", "mm_item", "mm_hash"),
        "which pictures a failing prompt has entered",
        wrap=picture_cache.note_entry,
        until="vLLM takes out what the engine will not see",
    ),
    Patch(
        OpenAIServingChat,
        "create_chat_completion",
        ("self", "request", "raw_request"),
        "a response has to say how its request was served; what vLLM refuses after "
        "pictures are read leaves the cache of pictures unlike the engine's",
        wrap=responses.follow_call,
        until="vLLM lets plug-ins extend responses, and takes out what it refuses",
    ),
    Patch(
        OpenAIServingChatBatch,
        "create_batch_chat_completion",
        ("self", "request", "raw_request"),
        "as create_chat_completion",
        wrap=responses.follow_call,
        until="as create_chat_completion",
    ),
    Patch(
        OpenAIServingResponses,
        "create_responses",
        ("self", "request", "raw_request"),
        "as create_chat_completion",
        wrap=responses.follow_call,
        until="as create_chat_completion",
    ),
    Patch(
        OpenAIServingResponses,
        "responses_full_generator",
        (
            "self",
            "request",
            "sampling_params",
            "result_generator",
            "context",
            "model_name",
            "tokenizer",
            "request_metadata",
            "created_time",
        ),
        "the answer at the end of a stream and of a background run, too",
        wrap=responses.say_in_response,
        until="vLLM lets plug-ins extend responses",
    ),
    Patch(
        AnthropicServingMessages,
        "messages_full_converter",
        ("self", "generator"),
        "the Messages API drops what a chat completion says beside its own fields",
        wrap=responses.say_in_message,
        until="vLLM lets plug-ins extend responses",
    ),
    Patch(
        AnthropicServingMessages,
        "message_stream_converter",
        ("self", "generator"),
        "as messages_full_converter",
        wrap=responses.say_in_messages,
        until="vLLM lets plug-ins extend responses",
    ),
)

OURS = (AVLManager, AVLScheduler, AVLAsyncScheduler, stats.AVLStatLogger)
"""What vLLM makes of ours, outside of workers."""

if current_platform.is_cpu():
    from vllm_avl.compat import cpu

    SEAMS, PATCHES = SEAMS + cpu.SEAMS, PATCHES + cpu.PATCHES
elif current_platform.is_cuda():
    from vllm_avl.compat import cuda

    SEAMS, PATCHES = SEAMS + cuda.SEAMS, PATCHES + cuda.PATCHES


def mismatches() -> list[str]:
    """Where the installed vLLM is not the one this was written for."""
    return mismatches_of((*SEAMS, *PATCHES)) + unmet_by(OURS)


def apply_all() -> None:
    """Apply every patch, once a process."""
    for patch in PATCHES:
        patch.apply()
