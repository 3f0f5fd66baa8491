"""Makes vLLM's platform choose our back end, scheduler, worker and block size."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm import envs
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_avl.config import parse_config
from vllm_avl.drafters import ADAPTED_DRAFTERS, check_drafts
from vllm_avl.support import (
    NAME,
    OFFLOADING,
    SIMPLE_OFFLOADING,
    check_attention,
    check_base,
    check_config,
    check_unclaimed,
    refuse_flash,
    refuse_platform,
    warn_of_quality,
)


@dataclass(frozen=True)
class Device:
    """What we bring for a kind of device."""

    backend: str
    worker: str
    block_size: int | None
    """Where the user gives none; None for vLLM's own."""


# Small blocks free more finely than the CPU platform's 128 would.
CPU = Device(
    "vllm_avl.worker.cpu.backend.AVLBackend",
    "vllm_avl.worker.cpu.worker.AVLCPUWorker",
    32,
)
FLASH, TRITON = AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN
OVER = {
    FLASH: "vllm_avl.worker.cuda.flash.AVLFlashBackend",
    TRITON: "vllm_avl.worker.cuda.triton.AVLTritonBackend",
}
"""Ours on CUDA, by the back end of vLLM's that it is over."""
CUDA = Device(OVER[TRITON], "vllm_avl.worker.worker.AVLWorker", None)


def device() -> Device | None:
    """Return what runs on this process's platform, None where nothing does."""
    if current_platform.is_cpu():
        return CPU
    return CUDA if current_platform.is_cuda() else None


SCHEDULER = "vllm_avl.scheduler.scheduler.AVLScheduler"
ASYNC_SCHEDULER = "vllm_avl.scheduler.scheduler.AVLAsyncScheduler"
OUR_SCHEDULERS = (None, SCHEDULER, ASYNC_SCHEDULER)


def is_chosen(vllm_config: VllmConfig) -> bool:
    """Whether the server was started with our back end."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == NAME


def block_size(vllm_config: VllmConfig) -> int:
    """Tokens that a block of the adapted layers holds, once the engine has begun.

    `cache_config.block_size` is the least of all cache groups.
    """
    size = vllm_config.cache_config.effective_attention_block_size
    assert size is not None  # There is one group of full attention.
    return size


def choose_backend(original: Callable[..., str]) -> classmethod:
    """Wrap `get_attn_backend_cls`: a decoder layer gets ours where it was asked for."""

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: type,
        selected_backend: Any,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> str:
        if selected_backend is None or selected_backend.name != NAME:
            return original(selected_backend, attn_selector_config, num_heads)
        asked = attn_selector_config
        by_head = asked.use_per_head_quant_scales
        check_attention(asked.attn_type, asked.use_mla, by_head)
        windowed = attn_selector_config.has_sliding_window
        if attn_selector_config.attn_type == "decoder" and not windowed:
            return CPU.backend
        return original(None, attn_selector_config, num_heads)

    return classmethod(get_attn_backend_cls)


def choose_base(original: Callable[..., str]) -> classmethod:
    """Wrap CUDA's `get_attn_backend_cls`: before it, say what ours is over."""

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: Any,
        selected_backend: Any,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> str:
        if selected_backend is not None and selected_backend.name == NAME:
            if attn_selector_config.has_sliding_window:
                # Stays vLLM's, and what it says is about full attention is not ours.
                return original(None, attn_selector_config, num_heads)
            avl_config = parse_config(get_current_vllm_config().additional_config)
            capability = cls.get_device_capability()
            backends = cls.get_valid_backends(
                capability, attn_selector_config, num_heads
            )
            base = find_base(avl_config.attention, *backends)
            logging.getLogger("vllm.avl").info("Attention over %s.", base.name)
            register_backend(selected_backend, OVER[base])
        return original(selected_backend, attn_selector_config, num_heads)

    return classmethod(get_attn_backend_cls)


def leave_to_stock(original: Callable[..., type]) -> Callable[..., type]:
    """Wrap `get_attn_backend`: a layer gets what stock would choose for it."""

    @functools.wraps(original)
    def get_attn_backend(*args: Any, **kwargs: Any) -> type:
        vllm_config = get_current_vllm_config()
        if not is_chosen(vllm_config):
            return original(*args, **kwargs)
        attention = vllm_config.attention_config
        ours, attention.backend = attention.backend, None
        try:
            return original(*args, **kwargs)
        finally:
            attention.backend = ours

    return get_attn_backend


def find_base(
    attention: str, valid: Iterable[Any], invalid: Mapping[Any, tuple[int, list[str]]]
) -> AttentionBackendEnum:
    """Return the back end of vLLM's that ours is over.

    Args:
        attention: of the configuration.
        valid: what stock may choose, what it prefers first.
        invalid: priorities, and the reasons against what it may not.
    """
    if attention == "triton":
        return TRITON
    usable = [candidate.backend for candidate in valid if candidate.backend in OVER]
    if attention == "flash":
        if FLASH not in usable:
            refuse_flash(invalid[FLASH][1])
        return FLASH
    # Where neither is, vLLM refuses ours with the reasons.
    return usable[0] if usable else TRITON


def offloading_connector(cache_config: CacheConfig) -> str | None:
    """Return which KV connector vLLM is going to take for `--kv-offloading-size`.

    It decides behind us: `VllmConfig._post_init_kv_transfer_config`.
    """
    if cache_config.kv_offloading_size is None:
        return None
    if cache_config.kv_offloading_backend != "native":
        return cache_config.kv_offloading_backend
    return SIMPLE_OFFLOADING if envs.VLLM_USE_SIMPLE_KV_OFFLOAD else OFFLOADING


def update_config(original: Callable[..., None]) -> classmethod:
    """Wrap `check_and_update_config`: take our places, or refuse."""

    @functools.wraps(original)
    def check_and_update_config(cls: type, vllm_config: VllmConfig) -> None:
        if not is_chosen(vllm_config) or vllm_config.model_config is None:
            original(vllm_config)
            return
        ours = device()
        if ours is None:
            refuse_platform(current_platform.device_name)
        avl_config = parse_config(vllm_config.additional_config)
        check_base(avl_config.attention, current_platform.is_cuda())
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        check_unclaimed("--scheduler-cls", scheduler.scheduler_cls, OUR_SCHEDULERS)
        check_unclaimed("--worker-cls", parallel.worker_cls, ("auto", ours.worker))
        cache = vllm_config.cache_config
        if ours.block_size is not None and not cache.user_specified_block_size:
            cache.block_size = ours.block_size
            cache.user_specified_block_size = True
        original(vllm_config)
        check_config(vllm_config, avl_config, offloading_connector(cache))
        check_drafts(vllm_config, avl_config)
        warn_of_quality(
            vllm_config.model_config.hf_config.model_type, cache.cache_dtype
        )
        drafts = vllm_config.speculative_config
        if drafts is not None and drafts.method in ADAPTED_DRAFTERS:
            # Its layers share our cache group, and with it what is freed.
            drafts.attention_backend = vllm_config.attention_config.backend
        parallel.worker_cls = ours.worker
        scheduler.scheduler_cls = (
            ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
        )

    return classmethod(check_and_update_config)
