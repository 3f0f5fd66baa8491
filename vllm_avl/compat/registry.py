"""Puts the name `avl` and our cache spec into vLLM's registries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_avl.compat.platform import CPU, device
from vllm_avl.scheduler.manager import AVLManager
from vllm_avl.scheduler.spec import AVLSpec
from vllm_avl.support import NAME


def is_registered() -> bool:
    """Whether this process knows the name already."""
    return NAME in AttentionBackendEnum.__members__


def register_all(restore: Callable[[], AttentionBackendEnum]) -> None:
    """Register the back end's name and the spec's manager.

    Args:
        restore: gives `member` in a process that may know nothing of us yet; a function
            of a module.
    """
    # On other devices the name must be known to be refused.
    register_backend(NAME, (device() or CPU).backend)
    # Configurations are unpickled before plug-ins load: the member must bring its own
    # registration along.
    name: Any = member()
    name.__reduce_ex__ = lambda _protocol: (restore, ())
    # Fill the registry first: it takes a non-empty one for complete.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(
        AVLSpec, AVLManager, uniform_type_base_spec=FullAttentionSpec
    )


def member() -> AttentionBackendEnum:
    """Return the registered name."""
    return AttentionBackendEnum[NAME]
