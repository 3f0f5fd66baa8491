"""vLLM's GPU worker on the CPU."""

from __future__ import annotations

import gc
from typing import Any

import torch

from standin import cuda

PROGRAMS = 32
"""Of a small device: for an interpreter, each program costs the same, idle or not."""


def install(compile_only: bool) -> None:
    """Point the GPU worker at the CPU; replace a kernel that is not interpretable."""
    from vllm.v1.worker import gpu_worker

    gpu_worker.Worker.init_device = init_device
    if not compile_only:
        use_torch_top_k_top_p()
        use_small_device()


def init_device(self: Any) -> None:
    """Stand for `Worker.init_device`, whose device is cuda:0; the rest is the same."""
    from vllm.v1.worker import gpu_worker

    self.device = torch.device("cpu")
    gpu_worker.init_worker_distributed_environment(
        self.vllm_config,
        self.rank,
        self.distributed_init_method,
        self.local_rank,
        gpu_worker.current_platform.dist_backend,
    )
    gpu_worker.set_random_seed(self.model_config.seed)
    gc.collect()
    snapshot = gpu_worker.MemorySnapshot(device=self.device)
    # It has looked at the host's memory.
    snapshot.free_memory, snapshot.total_memory = cuda.MEMORY
    self.init_snapshot = snapshot
    self.requested_memory = gpu_worker.request_memory(snapshot, self.cache_config)
    self._init_workspace_and_model_runner()


def use_torch_top_k_top_p() -> None:
    """Sample with torch: the interpreter cannot run Triton's top-k kernel."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def use_small_device() -> None:
    """Let fewer programs share the rows of a request; kernels' own tests have many."""
    from vllm_avl.worker.cuda import listed_rows

    listed_rows.PROGRAMS_PER_DEVICE = PROGRAMS
