"""Which methods of speculative decoding go beside adaptive attention, and how far."""

from __future__ import annotations

from typing import Any

from vllm_avl.config import AVLConfig
from vllm_avl.support import BACKEND, NAME, WAY_OUT, UnsupportedError

CACHELESS_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
"""Methods of speculative decoding that draft without a KV cache of their own."""
ADAPTED_DRAFTERS = ("eagle", "eagle3", "mtp", "draft_model")
"""Methods whose own layers are adapted like the model's."""
READ_LESS = ("ngram", "suffix", "medusa", "custom_class")
"""Methods beside which steps may read a part of what is stored, unless some are in
flight: then nobody knows on the host how many drafts were accepted.

Of others own layers would choose core between two passes of a step.
"""
MTP_MODELS = ("GlmOcrMTPModel",)
"""Architectures of multi-token prediction that were run beside us."""


def check_drafts(vllm_config: Any, avl_config: AVLConfig) -> None:
    """Refuse drafters, and settings beside them, that are not supported."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return
    device_type = vllm_config.device_config.device_type
    methods = CACHELESS_DRAFTERS + ADAPTED_DRAFTERS
    if drafts.method not in methods:
        raise UnsupportedError(
            f"{BACKEND} does not support speculative decoding by {drafts.method!r}, "
            f"which has a KV cache of its own or is untried; "
            f"let the method in --speculative-config be {', '.join(methods[:-1])} or "
            f"{methods[-1]}, {WAY_OUT}"
        )
    if vllm_config.model_config.is_hybrid and device_type != "cpu":
        raise UnsupportedError(
            f"{BACKEND} does not support speculative decoding beside recurrent layers "
            f"on {device_type} devices; drop --speculative-config, {WAY_OUT}"
        )
    if drafts.method in ADAPTED_DRAFTERS:
        _check_adapted_drafter(drafts)
    if drafts.method == "draft_model":
        _check_draft_model(drafts.draft_model_config, vllm_config.model_config)
    if drafts.method == "mtp":
        _check_mtp(drafts.draft_model_config)
    is_async = vllm_config.scheduler_config.async_scheduling
    if not avl_config.reads_all and not _may_read_less(drafts.method, is_async):
        raise UnsupportedError(
            f"{BACKEND} supports speculative decoding by {_drafting(drafts.method)} "
            f"where all that is stored is read: {_reading(avl_config)}; leave "
            "core_ratio and text_keep_ratio out, drop --speculative-config, "
            f"{_without_async(drafts.method)}{WAY_OUT}"
        )


def _check_adapted_drafter(drafts: Any) -> None:
    backend = drafts.attention_backend
    found = {
        "parallel_drafting": drafts.parallel_drafting,
        "attention_backend": backend is not None and backend.name != NAME,
        "kv_cache_dtype": drafts.kv_cache_dtype is not None,
        "use_heterogeneous_vocab": drafts.use_heterogeneous_vocab,
    }
    for field, is_set in found.items():
        if is_set:
            raise UnsupportedError(
                f"{BACKEND} adapts the layers of the drafter like the model's, and "
                f"does not support {field} = {getattr(drafts, field)!r} in "
                f"--speculative-config; leave it out, {WAY_OUT}"
            )


def _check_draft_model(draft: Any, model: Any) -> None:
    found = {
        "other layers than full attention": (
            draft.is_hybrid
            or draft.is_attention_free
            or draft.get_sliding_window() is not None
        ),
        # vLLM takes a rotary position for the place of a token.
        "rotary positions in several axes": draft.uses_mrope or model.uses_mrope,
    }
    for feature, present in found.items():
        if present:
            raise UnsupportedError(
                f"{BACKEND} does not support a draft model where it or the model has "
                f"{feature}; choose another method in --speculative-config, {WAY_OUT}"
            )


def _check_mtp(draft: Any) -> None:
    unknown = [name for name in draft.architectures if name not in MTP_MODELS]
    if unknown:
        raise UnsupportedError(
            f"{BACKEND} supports multi-token prediction by {', '.join(MTP_MODELS)}, "
            f"not yet by {', '.join(unknown)}; choose another method in "
            f"--speculative-config, {WAY_OUT}"
        )


def check_drafted_request(avl_config: AVLConfig, method: str, is_async: bool) -> None:
    """Refuse a request's settings that a server with drafts cannot serve.

    Args:
        avl_config: the request's.
        method: of the drafts.
        is_async: whether the server schedules a step before the last has run.
    """
    if not avl_config.reads_all and not _may_read_less(method, is_async):
        raise UnsupportedError(
            f"vllm_xargs: with speculative decoding by {_drafting(method)} all that "
            f"is stored is read, and this request has {_reading(avl_config)}; let "
            "avl_core_ratio be the store ratio and avl_text_keep_ratio 1, "
            f"{_without_async(method)}or leave both out"
        )


def _may_read_less(method: str, is_async: bool) -> bool:
    return method in READ_LESS and not is_async


def _drafting(method: str) -> str:
    in_flight = " and asynchronous scheduling" if method in READ_LESS else ""
    return f"{method!r}{in_flight}"


def _without_async(method: str) -> str:
    return "serve with --no-async-scheduling, " if method in READ_LESS else ""


def _reading(avl_config: AVLConfig) -> str:
    return (
        f"core_ratio = {avl_config.read_ratio!r} of store_ratio = "
        f"{avl_config.store_ratio!r}, text_keep_ratio = "
        f"{avl_config.text_keep_ratio!r}"
    )
