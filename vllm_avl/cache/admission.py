"""Decides which requests are adaptive and makes their plans."""

from __future__ import annotations

from vllm.v1.request import Request

from vllm_avl.config import AVLConfig, parse_overrides
from vllm_avl.plan import Plan, make_plan
from vllm_avl.policies import POLICIES

VISION_MODALITIES = ("image", "video")


def plan_request(request: Request, config: AVLConfig, block_size: int) -> Plan | None:
    """Plan `request`, or return None where it is served exactly as stock.

    Stock are: no vision tokens, nothing to save, one output token (scoring, beam
    search, prefill only), pooling, resumable streaming sessions, `avl: 0`, the policy
    `full`. Requests with n > 1 reach the scheduler with `avl: 0`.
    """
    params = request.sampling_params
    if params is None or params.max_tokens == 1 or request.resumable:
        return None
    overrides = parse_overrides(params.extra_args)
    ranges = vision_ranges(request)
    if not overrides.avl or not ranges:
        return None
    config = overrides.apply(config)
    if not POLICIES[config.policy].adapts:
        return None
    # Of any modality: the last chunk waits for one encoder output only.
    last_encoded = max(f.mm_position.offset for f in request.mm_features)
    return make_plan(
        request.num_prompt_tokens,
        ranges,
        block_size,
        config,
        min(last_encoded, request.num_prompt_tokens - 1),
        request.num_prompt_tokens + request.max_tokens,
    )


def vision_ranges(request: Request) -> list[tuple[int, int]]:
    """Half-open ranges of the prompt's embedded vision tokens, ascending."""
    return sorted(
        (start, last + 1)
        for feature in request.mm_features
        if feature.modality in VISION_MODALITIES
        for start, last in feature.mm_position.extract_embeds_range()
    )
