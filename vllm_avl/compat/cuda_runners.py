"""What vLLM's two model runners on CUDA have no extension point for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_avl.compat.seam import Patch, Seam
from vllm_avl.worker.step import current_step


def has_work() -> bool:
    """Whether the step being executed needs Python in its attention layers."""
    step = current_step()
    return step is not None and step.has_work


def gather_as_mixed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the V2 runner's gathering of a batch: such a step is no uniform decode."""

    @functools.wraps(original)
    def gather_batch_req_state(
        self: Any, scheduler_output: Any, dummy_run: bool
    ) -> tuple[Any, int | None]:
        state, uniform_token_count = original(self, scheduler_output, dummy_run)
        return state, None if has_work() else uniform_token_count

    return gather_batch_req_state


def dispatch_as_mixed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the V1 runner's choice of a graph: such a step is no uniform decode."""

    @functools.wraps(original)
    def _determine_batch_execution_and_padding(
        self: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if has_work():
            kwargs["force_uniform_decode"] = False
        return original(self, *args, **kwargs)

    return _determine_batch_execution_and_padding


# FlashAttention's builder is the same seam, but is not imported before it is chosen:
# its module reads the server's configuration.
SEAMS = (
    Seam(
        TritonAttentionMetadataBuilder,
        "build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "what a step reads",
    ),
)

PATCHES = (
    Patch(
        GPUModelRunnerV2,
        "gather_batch_req_state",
        ("self", "scheduler_output", "dummy_run"),
        "a full CUDA graph would skip what has to be done after attention",
        wrap=gather_as_mixed,
        until="metadata builders can veto a full graph for one step",
    ),
    Patch(
        GPUModelRunner,
        "_determine_batch_execution_and_padding",
        (
            "self",
            "num_tokens",
            "num_reqs",
            "num_scheduled_tokens_np",
            "max_num_scheduled_tokens",
            "use_cascade_attn",
            "allow_microbatching",
            "force_eager",
            "force_uniform_decode",
            "force_has_lora",
            "force_num_active_loras",
            "num_encoder_reqs",
        ),
        "a full CUDA graph would skip what has to be done after attention",
        wrap=dispatch_as_mixed,
        until="metadata builders can veto a full graph for one step",
    ),
)
