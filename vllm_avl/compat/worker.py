"""Subclass of vLLM's CPU worker, chosen through its `worker_cls` setting."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_avl.backend.introspection import RequestReport, report
from vllm_avl.backend.step import Step, WorkerRequests, executing
from vllm_avl.cache.spec import AVLSpec
from vllm_avl.compat.scheduler import received_plans
from vllm_avl.config import parse_config
from vllm_avl.kernels import host
from vllm_avl.support import check_groups


class AVLCPUWorker(CPUWorker):
    """Keeps the plans that come with the steps, and opens a step around each pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = parse_config(self.vllm_config.additional_config)
        self._avl_requests = WorkerRequests(config.introspection)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse cache groups that are not ours, then allocate."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        check_groups(specs, AVLSpec)
        super().initialize_from_config(kv_cache_config)
        host.start(specs[0].dtype)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step, with its plans at the metadata builders' hand."""
        self._avl_requests.update(
            scheduler_output.finished_req_ids,
            scheduler_output.preempted_req_ids or (),
            received_plans(scheduler_output),
        )
        batch = self.model_runner.input_batch
        step = Step(self._avl_requests.running, lambda: batch.req_ids)
        with executing(step):
            return super().execute_model(scheduler_output)

    def avl_requests(self) -> list[str]:
        """Return the ids that `avl_report` knows, the oldest first."""
        requests = self._avl_requests
        return [name for name, _ in requests.finished] + list(requests.running)

    def avl_report(self, request_id: str) -> RequestReport | None:
        """Return what a running or remembered request stores on this rank."""
        state = self._avl_requests.find(request_id)
        return None if state is None else report(request_id, state)
