"""Refuses what adaptive attention does not support: one sentence, with the way out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vllm_avl.config import AVLConfig
from vllm_avl.policies import POLICIES

NAME = "AVL"
"""Of the back end in vLLM's registry."""
BACKEND = f"--attention-backend {NAME.lower()}"
WAY_OUT = f"or start without {BACKEND}"
FP8_CACHES = ("fp8", "fp8_e4m3")
"""Quantised caches that are supported, by vLLM's names: e4m3, a scale a tensor."""
PLAIN_CACHES = ("auto", "bfloat16", "float16")


class UnsupportedError(ValueError):
    """The server was asked for something adaptive attention cannot do."""


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot be combined with us, and what to do about it."""

    applies: Callable[[Any], bool]
    """Takes vLLM's `VllmConfig`."""
    sentence: str


REFUSALS = (
    Refusal(
        lambda c: c.model_config.use_mla,
        "does not support multi-head latent attention (MLA) models; choose another "
        "model",
    ),
    Refusal(
        lambda c: c.model_config.is_encoder_decoder,
        "does not support encoder-decoder models (cross attention); choose another "
        "model",
    ),
    Refusal(
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "does not support decode context parallelism; drop "
        "--decode-context-parallel-size",
    ),
    Refusal(
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "does not support prefill context parallelism; drop "
        "--prefill-context-parallel-size",
    ),
    Refusal(
        lambda c: c.parallel_config.use_ubatching,
        "does not support micro-batching; drop --enable-dbo and --ubatch-size",
    ),
    Refusal(
        lambda c: (
            c.cache_config.cache_dtype in FP8_CACHES
            and c.cache_config.kv_cache_dtype_skip_layers
        ),
        "does not support a KV cache that is fp8 in some layers; drop "
        "--kv-cache-dtype-skip-layers",
    ),
    Refusal(
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "does not support KV-sharing fast prefill; drop --kv-sharing-fast-prefill",
    ),
)


SIMPLE_OFFLOADING = "SimpleCPUOffloadConnector"
OFFLOADING = "OffloadingConnector"
NIXL = "NixlConnector"
CONNECTORS = ("ExampleConnector", NIXL, OFFLOADING, SIMPLE_OFFLOADING)
"""KV connectors that were run beside us."""
HOST_SPEC = "CPUOffloadingSpec"
"""Where OffloadingConnector stores unless it is told: in the host's memory."""


def refuse_platform(name: str) -> NoReturn:
    """Refuse devices without a back end of ours."""
    raise UnsupportedError(
        f"{BACKEND} runs on CPUs and on CUDA devices, and this platform is {name}; "
        f"start without {BACKEND}"
    )


def refuse_vllm(problems: Sequence[str]) -> NoReturn:
    """Refuse a vLLM whose functions are not those that we build on."""
    raise UnsupportedError(
        f"{BACKEND} does not fit this vLLM: {'; '.join(problems)}; install a supported "
        f"vLLM, {WAY_OUT}"
    )


def check_base(attention: str, is_cuda: bool) -> None:
    """Refuse a choice of attention where there is none."""
    if attention != "auto" and not is_cuda:
        raise UnsupportedError(
            f"{BACKEND} has additional_config.avl.attention = {attention!r} on CUDA "
            f"devices only; leave it out, {WAY_OUT}"
        )


def refuse_flash(reasons: Sequence[str]) -> NoReturn:
    """Refuse FlashAttention, which was asked for, for vLLM's reasons."""
    raise UnsupportedError(
        f"{BACKEND} cannot have additional_config.avl.attention = 'flash': FLASH_ATTN "
        f"does not serve this model on this device ({', '.join(reasons)}); leave it "
        f"out, {WAY_OUT}"
    )


def warn_of_quality(model_type: str, cache_dtype: str) -> None:
    """Say where answers are reported to suffer, whether or not rows are evicted."""
    if cache_dtype in FP8_CACHES and model_type in ("qwen2_vl", "qwen2_5_vl"):
        logging.getLogger("vllm.avl").warning(
            "An fp8 KV cache is reported to spoil answers of Qwen2-VL and Qwen2.5-VL "
            "(github.com/vllm-project/vllm/issues/41343, seen with fp8_e5m2 and "
            "scales of 1); compare with --kv-cache-dtype auto"
        )


def check_config(
    vllm_config: Any, avl_config: AVLConfig, offloading: str | None = None
) -> None:
    """Refuse settings that cannot be combined with adaptive attention.

    Args:
        vllm_config: vLLM's.
        avl_config: ours.
        offloading: the KV connector that vLLM takes for `--kv-offloading-size`; None
            where that is not given.
    """
    for refusal in REFUSALS:
        if refusal.applies(vllm_config):
            raise UnsupportedError(f"{BACKEND} {refusal.sentence}, {WAY_OUT}")
    device_type = vllm_config.device_config.device_type
    _check_cache(vllm_config.cache_config.cache_dtype, device_type)
    _check_connector(vllm_config, offloading)
    _check_chunks(vllm_config.scheduler_config, avl_config)
    _check_stages(vllm_config, avl_config, offloading)


def _check_stages(
    vllm_config: Any, avl_config: AVLConfig, offloading: str | None
) -> None:
    """Refuse what was not tried with pipeline stages."""
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if num_stages == 1:
        return
    found = {
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--kv-offloading-size": offloading is not None,
    }
    for option, is_set in found.items():
        if is_set:
            raise UnsupportedError(
                f"{BACKEND} does not support {option} with pipeline parallelism; drop "
                f"one of {option} and --pipeline-parallel-size, {WAY_OUT}"
            )
    check_policy_in_stages(avl_config, num_stages)


def check_policy_in_stages(avl_config: AVLConfig, num_stages: int) -> None:
    """Refuse a policy, the server's or a request's, that needs other stages' layers."""
    if num_stages > 1 and POLICIES[avl_config.policy].spans_layers:
        alone = [name for name, policy in POLICIES.items() if not policy.spans_layers]
        raise UnsupportedError(
            f"{BACKEND} does not support policy = {avl_config.policy!r} with pipeline "
            "parallelism, where it needs layers of other stages; choose one of "
            f"{', '.join(alone)}, or drop --pipeline-parallel-size"
        )


def _check_connector(vllm_config: Any, offloading: str | None) -> None:
    transfer = vllm_config.kv_transfer_config
    if offloading is None:
        if transfer is None:
            return
        _check_transfer(transfer)
        offloading = transfer.kv_connector
    elif offloading not in CONNECTORS:
        raise UnsupportedError(
            f"{BACKEND} does not support KV offloading by {offloading}; choose "
            "--kv-offloading-backend native, or drop --kv-offloading-size, "
            f"{WAY_OUT}"
        )
    if offloading == OFFLOADING:
        _check_offloading(vllm_config)
    if vllm_config.speculative_config is not None:
        raise UnsupportedError(
            f"{BACKEND} does not support KV connectors and speculative decoding "
            "together; drop --kv-transfer-config and --kv-offloading-size, or "
            f"--speculative-config, {WAY_OUT}"
        )


def _check_offloading(vllm_config: Any) -> None:
    transfer = vllm_config.kv_transfer_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    spec = extra.get("spec_name", HOST_SPEC)
    if spec != HOST_SPEC:
        raise UnsupportedError(
            f"{BACKEND} supports {OFFLOADING} with {HOST_SPEC} alone, not with "
            f"spec_name = {spec!r}; drop it from kv_connector_extra_config, {WAY_OUT}"
        )
    if vllm_config.model_config.is_hybrid:
        raise UnsupportedError(
            f"{BACKEND} does not support {OFFLOADING} beside recurrent layers; set "
            "VLLM_USE_SIMPLE_KV_OFFLOAD=1 in the environment, or drop "
            f"--kv-offloading-size and --kv-transfer-config, {WAY_OUT}"
        )


def _check_transfer(transfer: Any) -> None:
    name, path = transfer.kv_connector, transfer.kv_connector_module_path
    if name not in CONNECTORS or path is not None:
        raise UnsupportedError(
            f"{BACKEND} supports the KV connectors {', '.join(CONNECTORS[:-1])} and "
            f"{CONNECTORS[-1]} alone, not {path or name}; drop --kv-transfer-config, "
            f"{WAY_OUT}"
        )
    both_ways = "bidirectional_kv_xfer"
    if name == NIXL and transfer.kv_connector_extra_config.get(both_ways):
        raise UnsupportedError(
            f"{BACKEND} does not support {both_ways} of {NIXL}, which would hand on "
            "what an answer has evicted from; drop it from kv_connector_extra_config, "
            f"{WAY_OUT}"
        )


def _check_cache(dtype: str, device_type: str) -> None:
    caches = PLAIN_CACHES + FP8_CACHES
    if dtype not in caches:
        raise UnsupportedError(
            f"{BACKEND} does not support a KV cache of {dtype} on {device_type} "
            f"devices; choose one of {', '.join(caches)} with --kv-cache-dtype, "
            f"{WAY_OUT}"
        )


def last_chunk(avl_config: AVLConfig) -> int:
    """Tokens of a prompt's last chunk, which holds every row that scores.

    At most: a request may ask for any policy.
    """
    windows = (policy.window for policy in POLICIES.values())
    return max(avl_config.observation_window or max(windows), 2)


def _check_chunks(scheduler_config: Any, avl_config: AVLConfig) -> None:
    # A step must have room for it beside one token of every other request.
    last = last_chunk(avl_config)
    window = avl_config.observation_window or last
    needed = scheduler_config.max_num_seqs + last - 1
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        tokens = getattr(scheduler_config, name)
        if tokens is not None and tokens < needed:
            raise UnsupportedError(
                f"{BACKEND} needs --{name.replace('_', '-')} of at least {needed} "
                f"(--max-num-seqs {scheduler_config.max_num_seqs} and "
                f"observation_window {window}), not {tokens}; raise it, {WAY_OUT}"
            )
    threshold = scheduler_config.long_prefill_token_threshold
    if 0 < threshold < last:
        raise UnsupportedError(
            f"{BACKEND} needs --long-prefill-token-threshold of at least {last} "
            f"or 0, not {threshold}; raise it, {WAY_OUT}"
        )


def check_unclaimed(setting: str, value: object, ours: Sequence[object]) -> None:
    """Refuse a class of the user's where ours has to be."""
    if value not in ours:
        raise UnsupportedError(
            f"{BACKEND} brings its own {setting} and cannot use {value!r}; drop "
            f"{setting}, {WAY_OUT}"
        )


def check_attention(attn_type: str, use_mla: bool, scales_by_head: bool) -> None:
    """Refuse attention that reads another cache than its own past tokens.

    Args:
        attn_type: vLLM's word for what a layer attends to.
        use_mla: whether the cache holds latent vectors.
        scales_by_head: whether the checkpoint has a scale for each KV head.
    """
    if scales_by_head:
        raise UnsupportedError(
            f"{BACKEND} does not support fp8 KV caches with a scale for each head; "
            f"choose a checkpoint with one scale a tensor, {WAY_OUT}"
        )
    if use_mla:
        raise UnsupportedError(f"{BACKEND} {REFUSALS[0].sentence}, {WAY_OUT}")
    if attn_type == "encoder_decoder":
        raise UnsupportedError(f"{BACKEND} {REFUSALS[1].sentence}, {WAY_OUT}")
