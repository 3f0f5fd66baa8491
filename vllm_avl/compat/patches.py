"""The places where vLLM has no extension point yet, and the shape we rely on.

Every patch and every overridden private method is a record: what it targets, the
parameters it was written for, why it exists, and what would make it go.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_avl.compat import front_end, platform


@dataclass(frozen=True)
class Seam:
    """A function of vLLM that a subclass of ours overrides or calls."""

    owner: type
    name: str
    parameters: tuple[str, ...]
    why: str

    def mismatch(self) -> str | None:
        """Say how the installed vLLM differs, None where it fits."""
        target = f"{self.owner.__name__}.{self.name}"
        function = getattr(self.owner, self.name, None)
        if function is None:
            return f"{target} is gone"
        found = tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if found != self.parameters:
            return f"{target} takes {found}, not {self.parameters}"
        return None


@dataclass(frozen=True)
class Patch(Seam):
    """A function of vLLM that we wrap in place."""

    wrap: Callable[[Callable[..., Any]], Any]
    until: str

    def apply(self) -> None:
        """Wrap the function, whether it is a class method or a plain one."""
        setattr(self.owner, self.name, self.wrap(getattr(self.owner, self.name)))


SEAMS = (
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
        CPUAttentionMetadataBuilder,
        "build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "what a step reads",
    ),
    Seam(
        CPUWorker,
        "execute_model",
        ("self", "scheduler_output"),
        "the plans arrive",
    ),
    Seam(
        CPUWorker,
        "initialize_from_config",
        ("self", "kv_cache_config"),
        "the final cache groups are known",
    ),
)

PATCHES = (
    Patch(
        CpuPlatform,
        "get_attn_backend_cls",
        ("selected_backend", "attn_selector_config", "num_heads"),
        "the CPU platform answers CPU_ATTN whatever back end is asked for",
        wrap=platform.choose_backend,
        until="vLLM's CPU platform honours registered back ends",
    ),
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


def mismatches() -> list[str]:
    """Where the installed vLLM is not the one this was written for."""
    found = [seam.mismatch() for seam in (*SEAMS, *PATCHES)]
    return [mismatch for mismatch in found if mismatch is not None]


def apply_all() -> None:
    """Apply every patch, once a process."""
    for patch in PATCHES:
        patch.apply()
