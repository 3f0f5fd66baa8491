"""Subclass of vLLM's CPU worker, chosen through its `worker_cls` setting."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_avl.backend.listed import GATHER_BELOW
from vllm_avl.cache.spec import AVLSpec
from vllm_avl.compat.worker import AVLWorker
from vllm_avl.kernels import host


class AVLCPUWorker(AVLWorker, CPUWorker):
    """vLLM's CPU worker with adaptive requests."""

    def _choose_kernels(self, spec: AVLSpec) -> None:
        """Compile what a refresh needs, for the element types that have it."""
        if spec.dtype in host.DTYPES:
            host.start(spec.dtype)
            self._avl_requests.gather_below = GATHER_BELOW
