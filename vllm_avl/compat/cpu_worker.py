"""Subclass of vLLM's CPU worker, chosen through its `worker_cls` setting."""

from __future__ import annotations

from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_avl.backend.listed import GATHER_BELOW
from vllm_avl.compat.worker import AVLWorker
from vllm_avl.kernels import host


class AVLCPUWorker(AVLWorker, CPUWorker):
    """vLLM's CPU worker with adaptive requests."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate, and compile what a refresh needs."""
        super().initialize_from_config(kv_cache_config)
        dtype = kv_cache_config.kv_cache_groups[0].kv_cache_spec.dtype
        if dtype in host.DTYPES:
            host.start(dtype)
            self._avl_requests.gather_below = GATHER_BELOW
