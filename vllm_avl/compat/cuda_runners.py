"""What vLLM's two model runners on CUDA have no extension point for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import (
    StandaloneARSpeculator,
)
from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.speculator import (
    TargetDependentARSpeculator,
)
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_avl.compat.seam import Patch, Seam
from vllm_avl.worker.drafts import continue_the_step, repeat_the_step
from vllm_avl.worker.step import current_step


def has_work() -> bool:
    """Whether the step being executed needs Python in its attention layers."""
    step = current_step()
    return step is not None and step.has_work


def gather_for_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the V2 runner's gathering of a batch: whose its rows are.

    A step with work is no uniform decode.
    """

    @functools.wraps(original)
    def gather_batch_req_state(
        self: Any, scheduler_output: Any, dummy_run: bool
    ) -> tuple[Any, int | None]:
        state, uniform_token_count = original(self, scheduler_output, dummy_run)
        step = current_step()
        if step is not None:
            # Metadata says so too, but not that of models with recurrent states.
            step.row_ids = lambda: state.req_ids
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
        "a full CUDA graph would skip what has to be done after attention; a batch's "
        "metadata need not say whose its rows are",
        wrap=gather_for_step,
        until="metadata builders can veto a full graph for one step, and know requests",
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
    Patch(
        StandaloneARSpeculator,
        "_prefill",
        (
            "self",
            "input_batch",
            "num_rejected",
            "last_sampled",
            "num_reqs",
            "skip_attn",
            "num_tokens_across_dp",
        ),
        "metadata builders are not told that a draft model's first pass begins",
        wrap=repeat_the_step,
        until="runner V2 builds a drafter's metadata by build_for_drafting",
    ),
    Patch(
        StandaloneARSpeculator,
        "_multi_step_decode",
        (
            "self",
            "input_batch",
            "num_rejected",
            "num_reqs",
            "skip_attn",
            "num_tokens_across_dp",
        ),
        "nor that it goes on",
        wrap=continue_the_step,
        until="runner V2 builds a drafter's metadata by build_for_drafting",
    ),
    Patch(
        TargetDependentARSpeculator,
        "_multi_step_decode",
        (
            "self",
            "num_reqs",
            "skip_attn",
            "batch_desc",
            "num_tokens_across_dp",
            "seq_lens_cpu_upper_bound",
            "num_speculative_steps",
        ),
        "nor that other drafters do, whose first pass has the step's own metadata",
        wrap=continue_the_step,
        until="runner V2 builds a drafter's metadata by build_for_drafting",
    ),
)
