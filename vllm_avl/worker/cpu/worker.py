"""Subclass of vLLM's CPU worker, chosen through its `worker_cls` setting."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_avl.config import AVLConfig
from vllm_avl.kernels import cpu
from vllm_avl.scheduler.spec import AVLSpec
from vllm_avl.worker.fp8 import number_dtype
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.worker import AVLWorker


class AVLCPUWorker(AVLWorker, CPUWorker):
    """vLLM's CPU worker with adaptive requests."""

    def _kernels(self, spec: AVLSpec, _config: AVLConfig) -> Kernels:
        """Compile those of the CPU, so that the first request need not wait."""
        cpu.start(number_dtype(spec.dtype))
        return Kernels(attend_scored=True)
