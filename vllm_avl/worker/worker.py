"""Subclass of vLLM's GPU worker, chosen through its `worker_cls` setting.

The CPU worker is one too; `cpu_worker` adds what it needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from vllm_avl.compat import worker_patches
from vllm_avl.config import AVLConfig, parse_config
from vllm_avl.messages import received_compactions, send_counts
from vllm_avl.scheduler.spec import AVLSpec, our_group, spec_of
from vllm_avl.worker.counted import CountedOutput
from vllm_avl.worker.introspection import (
    RequestReport,
    RequestSummary,
    report,
    summarize,
)
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.stages import Stages
from vllm_avl.worker.step import Step, WorkerRequests, executing


class AVLWorker(Worker):
    """Keeps the plans that come with the steps, and opens a step around each pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        worker_patches.apply_all()
        super().__init__(*args, **kwargs)
        self._avl_requests = WorkerRequests()
        self._avl_num_drafts: dict[str, int] = {}
        self._avl_step: Step | None = None
        self._avl_stages = Stages()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse cache groups that are not ours, then allocate."""
        group = kv_cache_config.kv_cache_groups[our_group(kv_cache_config)]
        super().initialize_from_config(kv_cache_config)
        spec = spec_of(group.kv_cache_spec)
        assert isinstance(spec, AVLSpec)
        config = parse_config(self.vllm_config.additional_config)
        self._avl_requests = WorkerRequests(
            config.introspection,
            self.device,
            self._kernels(spec, config),
            spec.block_size,
        )

    def _kernels(self, _spec: AVLSpec, config: AVLConfig) -> Kernels:
        """What the device's kernels can do with core."""
        return Kernels(choose_core=True, num_lists=config.num_lists)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run one step, with its plans at the metadata builders' hand."""
        self._avl_requests.update(
            scheduler_output.finished_req_ids,
            scheduler_output.preempted_req_ids or (),
            received_compactions(scheduler_output),
        )
        drafts = scheduler_output.scheduled_spec_decode_tokens
        self._avl_num_drafts = {name: len(tokens) for name, tokens in drafts.items()}
        step = self._avl_requests.begin(
            computed_tokens(scheduler_output),
            scheduler_output.num_scheduled_tokens,
            self._row_ids,
            self._avl_num_drafts,
        )
        with executing(step):
            output = super().execute_model(scheduler_output)
        if step is not None:
            step.end()
            if step.num_selections:
                self._avl_stages.pass_on(self._avl_requests.counts, self.device)
        self._avl_step = step
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and let the step's counts travel with its tokens."""
        # A drafter's layers run behind it, and are layers of the step.
        with executing(self._avl_step):
            output = super().sample_tokens(grammar_output)
        counts = self._avl_requests.counts.take()
        if isinstance(output, AsyncModelRunnerOutput):
            # What it rejects is known behind the next step only, and reports of
            # lengths are that much too long for as long.
            return CountedOutput(output, counts)
        if self._avl_num_drafts and output is not None:
            rejected = rejected_drafts(output, self._avl_num_drafts)
            self._avl_requests.take_back(rejected)
        if counts:
            send_counts(output, counts)
        return output

    def _row_ids(self) -> Sequence[str]:
        """Request ids in the order of the batch's rows, of runner V1."""
        return self.model_runner.input_batch.req_ids

    def avl_requests(self) -> list[str]:
        """Return the ids that `avl_report` knows, the oldest first."""
        return [name for name, _ in self._avl_requests.known()][::-1]

    def avl_summaries(self) -> list[RequestSummary]:
        """Return the numbers of all that `avl_report` knows, the newest first."""
        return [summarize(name, state) for name, state in self._avl_requests.known()]

    def avl_report(self, request_id: str) -> RequestReport | None:
        """Return what a running or remembered request stores on this rank."""
        state = self._avl_requests.find(request_id)
        return None if state is None else report(request_id, state)


def rejected_drafts(
    output: ModelRunnerOutput, num_drafts: Mapping[str, int]
) -> dict[str, int]:
    """Drafts that a step has not accepted, by request id.

    Args:
        output: of the step: accepted drafts, and the token behind them.
        num_drafts: of the step, by request id.
    """
    sampled = output.sampled_token_ids
    return {
        name: max(count + 1 - len(sampled[output.req_id_to_index[name]]), 0)
        for name, count in num_drafts.items()
        if name in output.req_id_to_index
    }


def computed_tokens(scheduler_output: SchedulerOutput) -> dict[str, int]:
    """Tokens that a step's requests have computed before it, by request id."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    for new in scheduler_output.scheduled_new_reqs:
        computed[new.req_id] = new.num_computed_tokens
    return computed
