"""Decides which requests are adaptive and makes their plans."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.request import Request

from vllm_avl.config import AVLConfig, settings_of_request
from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan, make_plan
from vllm_avl.policies import POLICIES

VISION_MODALITIES = ("image", "video")


def plan_request(
    request: Request,
    config: AVLConfig,
    block_size: int,
    chunk_unit: int | None = None,
    *,
    whole_pictures: bool = False,
) -> Plan | Stock:
    """Plan `request`, or say why it is served exactly as stock.

    One output token is scoring, beam search and prefill only. Requests with n > 1
    reach the scheduler with `avl: 0`.

    Args:
        request: that wants blocks.
        config: the server's.
        block_size: tokens a block of ours holds.
        chunk_unit: tokens at multiples of which vLLM ends a prompt's chunks, the last
            one before its end, too; None where it ends them anywhere.
        whole_pictures: whether no chunk may end inside an encoder input.
    """
    params = request.sampling_params
    if params is None:
        return Stock.POOLING
    kind = _stock_by_kind(request, params)
    if kind is not None:
        return kind
    settings = settings_of_request(params.extra_args, config)
    if settings is None:
        return Stock.OFF
    ranges = vision_ranges(request)
    if not ranges:
        return Stock.NO_VISION
    if not POLICIES[settings.policy].adapts:
        return Stock.POLICY_FULL
    # Of any modality: the last chunk waits for one encoder output only.
    places = [feature.mm_position for feature in request.mm_features]
    last_encoded = max(place.offset for place in places)
    if whole_pictures:
        last_encoded = max(place.offset + place.length for place in places)
    if chunk_unit is not None:
        last = request.num_prompt_tokens - 1
        last_encoded = max(last_encoded, last // chunk_unit * chunk_unit)
    if request.num_prompt_tokens - last_encoded < 2:
        # A chunk could end in front of it, and leave a lone last token.
        return Stock.NOTHING_TO_SAVE
    plan = make_plan(
        request.num_prompt_tokens,
        ranges,
        block_size,
        settings,
        last_encoded,
        request.num_prompt_tokens + request.max_tokens,
    )
    return Stock.NOTHING_TO_SAVE if plan is None else plan


def _stock_by_kind(request: Request, params: SamplingParams) -> Stock | None:
    """Say why a request is never adapted, whatever its settings are."""
    if params.max_tokens == 1:
        return Stock.ONE_TOKEN
    if (request.kv_transfer_params or {}).get("do_remote_decode"):
        return Stock.REMOTE_DECODE
    return Stock.STREAMING_INPUT if request.resumable else None


def vision_ranges(request: Request) -> list[tuple[int, int]]:
    """Half-open ranges of the prompt's embedded vision tokens, ascending."""
    features = filter(is_vision, request.mm_features)
    return sorted(chain.from_iterable(map(embedded_ranges, features)))


def is_vision(feature: MultiModalFeatureSpec) -> bool:
    """Whether an input's tokens are vision tokens."""
    return feature.modality in VISION_MODALITIES


def embedded_ranges(feature: MultiModalFeatureSpec) -> Iterator[tuple[int, int]]:
    """Yield half-open ranges of an input's tokens, without its separators."""
    for start, last in feature.mm_position.extract_embeds_range():
        yield start, last + 1
