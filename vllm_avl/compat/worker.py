"""Subclass of vLLM's GPU worker, chosen through its `worker_cls` setting.

The CPU worker is one too; `cpu_worker` adds what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from vllm_avl.backend.introspection import RequestReport, report
from vllm_avl.backend.step import Step, WorkerRequests, executing
from vllm_avl.cache.spec import AVLSpec
from vllm_avl.compat.scheduler import received_plans
from vllm_avl.config import parse_config
from vllm_avl.support import check_groups


class AVLWorker(Worker):
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
        self._avl_requests.device = self.device

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step, with its plans at the metadata builders' hand."""
        self._avl_requests.update(
            scheduler_output.finished_req_ids,
            scheduler_output.preempted_req_ids or (),
            received_plans(scheduler_output),
        )
        turns = self._avl_requests.turns(spans(scheduler_output))
        with executing(Step(turns, self._row_ids)):
            return super().execute_model(scheduler_output)

    def _row_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        """Request ids in the order of the batch's rows."""
        if not self.use_v2_model_runner:
            return self.model_runner.input_batch.req_ids
        names = self.model_runner.req_states.index_to_req_id
        assert common.req_idx is not None
        return [names[index] for index in common.req_idx]

    def avl_requests(self) -> list[str]:
        """Return the ids that `avl_report` knows, the oldest first."""
        requests = self._avl_requests
        return [name for name, _ in requests.finished] + list(requests.running)

    def avl_report(self, request_id: str) -> RequestReport | None:
        """Return what a running or remembered request stores on this rank."""
        state = self._avl_requests.find(request_id)
        return None if state is None else report(request_id, state)


def spans(scheduler_output: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
    """Yield `(request id, tokens before, tokens after)` of a step's requests."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in scheduler_output.scheduled_new_reqs:
        computed[new.req_id] = new.num_computed_tokens
    for name, num_new in scheduler_output.num_scheduled_tokens.items():
        yield name, computed[name], computed[name] + num_new
