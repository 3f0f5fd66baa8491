"""Watches the attention of decode steps: time, rows read, what choosing core takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from benchmarks.runs import Run


@dataclass
class Steps:
    """What the decode steps of one run took, in the order they ran."""

    run: Run
    attention_seconds: list[float] = field(default_factory=list)
    num_scoring: list[int] = field(default_factory=list)
    """Requests that refresh, by step."""
    num_rows: list[int] = field(default_factory=list)
    """Cached rows that the attention of one layer reads, by step."""
    choosing: list[float] = field(default_factory=list)
    """What a request's choice of core took in a layer, behind its attention."""

    def seconds(self, refreshing: bool | None = None) -> list[float]:
        """Step times of decode steps: all, refreshing or ordinary ones."""
        return self._decode(self.run.step_seconds, refreshing)

    def attention(self, refreshing: bool | None = None) -> list[float]:
        """Time in the attention layers, likewise."""
        return self._decode(self.attention_seconds, refreshing)

    def rows(self, refreshing: bool | None = None) -> list[int]:
        """Rows read by one layer, likewise."""
        return self._decode(self.num_rows, refreshing)

    def _decode(self, values: list[Any], refreshing: bool | None) -> list[Any]:
        return [
            value
            for value, is_prompt, scoring in zip(
                values, self.run.prompt_step, self.num_scoring, strict=True
            )
            if not is_prompt and refreshing in (None, scoring > 0)
        ]


@contextmanager
def watched() -> Iterator[Steps]:
    """Note time, rows and refreshes of the decoder's attention, step by step."""
    from vllm.v1.attention.backends import cpu_attn

    from vllm_avl.worker.cpu import backend as cpu
    from vllm_avl.worker.layer import Layer

    steps = Steps(Run())
    build = cpu_attn.CPUAttentionMetadataBuilder.build
    build_avl, perform = cpu.AVLMetadataBuilder.build, Layer.perform

    def built(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(builder, *args, **kwargs)
        steps.attention_seconds.append(0.0)
        steps.num_rows.append(int(metadata.seq_lens.sum()))
        steps.num_scoring.append(0)
        return metadata

    def built_avl(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build_avl(builder, *args, **kwargs)
        count(steps)
        return metadata

    def timed(forward: Any) -> Any:
        def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(impl, *args, **kwargs)
            if impl.attn_type == "decoder" and steps.attention_seconds:
                steps.attention_seconds[-1] += time.perf_counter() - start
            return output

        return attend

    def performed(layer: Any, task: Any, *step: Any) -> None:
        start = time.perf_counter()
        perform(layer, task, *step)
        if task.refreshes:
            steps.choosing.append(time.perf_counter() - start)

    stock, avl = cpu_attn.CPUAttentionBackendImpl, cpu.AVLImpl
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(patch.object(cpu_attn.CPUAttentionMetadataBuilder, "build", built))
        enter(patch.object(cpu.AVLMetadataBuilder, "build", built_avl))
        enter(patch.object(Layer, "perform", performed))
        enter(patch.object(avl, "forward", timed(avl.forward)))
        enter(patch.object(stock, "forward", once(timed, stock.forward, avl)))
        yield steps


def once(timed: Any, forward: Any, inner: type) -> Any:
    """Time `forward` unless it is called from within a timed subclass."""
    outer = timed(forward)

    def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = forward if isinstance(impl, inner) else outer
        return chosen(impl, *args, **kwargs)

    return attend


def count(steps: Steps) -> None:
    """Add what our kernel must read, of which vLLM's is given one row each."""
    from vllm_avl.worker.step import current_step

    step = current_step()
    if step is None:
        return
    rows = step.rows()
    ours = rows.is_attended
    steps.num_scoring[-1] = int(rows.refreshes.sum())
    num_stored = (
        step.num_tokens[rows.index] - rows.first_block * step.requests.block_size
    )
    unread = rows.of["num_masked"] - rows.of["num_listed"]
    num_read = num_stored - (unread * ~rows.reads_all) - 1
    steps.num_rows[-1] += int(num_read[ours].sum())


def median(values: Sequence[float]) -> float:
    """Median as a float."""
    return float(statistics.median(values))
