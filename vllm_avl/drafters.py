"""Which methods of speculative decoding go beside adaptive attention, and how far."""

from __future__ import annotations

from typing import Any

from vllm_avl.config import AVLConfig
from vllm_avl.support import BACKEND, NAME, WAY_OUT, UnsupportedError

CACHELESS_DRAFTERS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
"""Methods of speculative decoding that draft without a KV cache of their own."""
ADAPTED_DRAFTERS = ("eagle", "eagle3", "mtp", "draft_model")
"""Methods whose own layers are adapted like the model's, on a CPU."""
ADAPTED_ON_CUDA = ("eagle", "eagle3")
"""Of these, which were run on CUDA's code path, too."""
MTP_MODELS = ("GlmOcrMTPModel",)
"""Architectures of multi-token prediction that were run beside us."""


def check_drafts(vllm_config: Any, avl_config: AVLConfig) -> None:
    """Refuse drafters, and settings beside them, that are not supported."""
    drafts = vllm_config.speculative_config
    if drafts is None:
        return
    device_type = vllm_config.device_config.device_type
    adapted = ADAPTED_DRAFTERS if device_type == "cpu" else ADAPTED_ON_CUDA
    methods = CACHELESS_DRAFTERS + adapted
    if drafts.method not in methods:
        raise UnsupportedError(
            f"{BACKEND} does not support speculative decoding by {drafts.method!r} on "
            f"{device_type} devices, where it has a KV cache of its own or is untried; "
            f"let the method in --speculative-config be {', '.join(methods[:-1])} or "
            f"{methods[-1]}, {WAY_OUT}"
        )
    if drafts.method in ADAPTED_DRAFTERS:
        _check_adapted_drafter(drafts)
    if drafts.method == "draft_model":
        _check_draft_model(drafts.draft_model_config, vllm_config.model_config)
    if drafts.method == "mtp":
        _check_mtp(drafts.draft_model_config)
    if not avl_config.reads_all and not _reads_less(drafts.method, device_type):
        raise UnsupportedError(
            f"{BACKEND} supports speculative decoding by {drafts.method!r} on "
            f"{device_type} devices where all that is stored is read: "
            f"{_reading(avl_config)}; leave core_ratio and text_keep_ratio out, drop "
            f"--speculative-config, {WAY_OUT}"
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


def _reads_less(method: str, device_type: str) -> bool:
    """Whether steps with drafts may read a part of what is stored."""
    # Own layers choose core between two passes, and on CUDA a kernel scores last rows.
    return method in CACHELESS_DRAFTERS and device_type == "cpu"


def check_drafted_request(avl_config: AVLConfig, method: str, device_type: str) -> None:
    """Refuse a request's settings that a server with drafts cannot serve."""
    if not avl_config.reads_all and not _reads_less(method, device_type):
        raise UnsupportedError(
            f"vllm_xargs: with speculative decoding by {method!r} on {device_type} "
            "devices all that is stored is read, and this request has "
            f"{_reading(avl_config)}; let avl_core_ratio be the store ratio and "
            "avl_text_keep_ratio 1, or leave both out"
        )


def _reading(avl_config: AVLConfig) -> str:
    return (
        f"core_ratio = {avl_config.read_ratio!r} of store_ratio = "
        f"{avl_config.store_ratio!r}, text_keep_ratio = "
        f"{avl_config.text_keep_ratio!r}"
    )
