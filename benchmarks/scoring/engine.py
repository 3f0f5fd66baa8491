"""Answers questions in this process and looks at the blocks they hold meanwhile."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm import SamplingParams

from benchmarks.testing import engine
from benchmarks.training.evaluate import MAX_IMAGES, Question, max_tokens

BLOCK_SIZE = 32
POOL_BYTES = 256 << 20


@dataclass(frozen=True)
class Served:
    """How one cell of the table was answered."""

    answers: list[str]
    kv_bytes: float
    """That a request holds while it is answered: the mean of all decode steps."""
    token_bytes: float
    """Of one token in all layers."""
    tokens_per_second: float
    """Generated tokens, prompts' time included."""


class Engine:
    """vLLM with adaptive attention; every request says how it is served."""

    def __init__(self, model: Path, settings: Mapping[str, Any]) -> None:
        """Start it, without a prefix cache, so that every cell does all its work.

        Args:
            model: folder of the checkpoint.
            settings: of the plug-in, where they are not its defaults.
        """
        self._inside = engine.Engine(
            model,
            avl=dict(settings),
            max_model_len=2048,
            max_num_seqs=16,
            kv_cache_memory_bytes=POOL_BYTES,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": MAX_IMAGES},
        )
        scheduler = self._inside.scheduler
        self._block_bytes = (
            POOL_BYTES / scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        )
        self._held: list[int] = []
        schedule = scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._held += _held_by_decodes(scheduler)
            return output

        scheduler.schedule = watched

    def serve(
        self, asked: Sequence[Question], task: str, settings: Mapping[str, Any]
    ) -> Served:
        """Answer greedily.

        Args:
            asked: the questions, all waiting from the start.
            task: decides how long an answer may be.
            settings: of each request, as `vllm_xargs`.
        """
        self._held.clear()
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens(task), extra_args=dict(settings)
        )
        tokenizer = self._inside.llm.get_tokenizer()
        requests = [question.request(tokenizer) for question in asked]
        start = time.perf_counter()
        outputs = self._inside.llm.generate(requests, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        answers = [output.outputs[0] for output in outputs]
        return Served(
            [answer.text.strip() for answer in answers],
            fmean(self._held) * self._block_bytes,
            self._block_bytes / BLOCK_SIZE,
            sum(len(answer.token_ids) for answer in answers) / seconds,
        )

    def close(self) -> None:
        """Shut it down before another one starts."""
        self._inside.shutdown()
        del self._inside
        gc.collect()


def _held_by_decodes(scheduler: Any) -> list[int]:
    """Count the blocks of each request whose prompt is behind it."""
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    return [
        sum(not block.is_null for block in manager.req_to_blocks[request.request_id])
        for request in scheduler.running
        if request.num_computed_tokens > request.num_prompt_tokens
    ]
