"""Watches the attention of decode steps: time, rows read, and what refreshes take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from engines import Run


@dataclass
class Refreshes:
    """What refreshes took, one of one request in one layer at a time."""

    whole: list[float] = field(default_factory=list)
    attend: list[float] = field(default_factory=list)
    """Attention and scores."""
    move: list[float] = field(default_factory=list)
    num_rows_moved: list[int] = field(default_factory=list)
    """Rows that change places with core; none where core is a list."""

    def milliseconds(self) -> dict[str, float]:
        """Medians, and the rows that a refresh brings into core."""
        if not self.whole:
            return {}
        return {
            "refresh_request_layer_ms": 1e3 * median(self.whole),
            "refresh_attend_ms": 1e3 * median(self.attend),
            "refresh_move_ms": 1e3 * median(self.move or [0.0]),
            "rows_into_core": median(self.num_rows_moved or [0]),
        }


@dataclass
class Steps:
    """What the decode steps of one run took, in the order they ran."""

    run: Run
    attention_seconds: list[float] = field(default_factory=list)
    num_scoring: list[int] = field(default_factory=list)
    """Requests that refresh, by step."""
    num_rows: list[int] = field(default_factory=list)
    """Cached rows that the attention of one layer reads, by step."""
    refreshes: Refreshes = field(default_factory=lambda: Refreshes())

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

    from vllm_avl.backend import cpu, step

    steps = Steps(Run())
    build = cpu_attn.CPUAttentionMetadataBuilder.build
    make_view = step.make_view

    def built(builder: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = build(builder, *args, **kwargs)
        steps.attention_seconds.append(0.0)
        steps.num_rows.append(int(metadata.seq_lens.sum()))
        steps.num_scoring.append(0)
        return metadata

    def viewed(*args: Any) -> Any:
        view = make_view(*args)
        pending.append(view)
        return view

    pending: list[Any] = []

    def timed(forward: Any) -> Any:
        def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
            while pending:
                count(steps, pending.pop())
            start = time.perf_counter()
            output = forward(impl, *args, **kwargs)
            if impl.attn_type == "decoder" and steps.attention_seconds:
                steps.attention_seconds[-1] += time.perf_counter() - start
            return output

        return attend

    stock, avl = cpu_attn.CPUAttentionBackendImpl, cpu.AVLImpl
    with ExitStack() as patches:
        enter = patches.enter_context
        enter(patch.object(cpu_attn.CPUAttentionMetadataBuilder, "build", built))
        enter(patch.object(step, "make_view", viewed))
        for target, name, wrapper in refresh_watches(steps.refreshes):
            enter(patch.object(target, name, wrapper))
        enter(patch.object(avl, "forward", timed(avl.forward)))
        enter(patch.object(stock, "forward", once(timed, stock.forward, avl)))
        yield steps


def refresh_watches(seen: Refreshes) -> Iterator[tuple[type, str, Any]]:
    """Yield the methods that make up a refresh, wrapped to note their times."""
    from vllm_avl.backend.cpu_cache import CPUCache
    from vllm_avl.backend.layer import Layer

    def watch(function: Any, note: Any) -> Any:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            note(time.perf_counter() - start, *args)
            return result

        return timed

    def performed(seconds: float, layer: Any, task: Any, *rest: Any) -> None:
        if task.scores_while_attending:
            # Core that is a list has been attended before, in one call.
            seen.whole.append(seconds + task.gathers * seen.attend[-1])

    def attended(seconds: float, cache: Any, query: Any, rows: Any) -> None:
        if all(row.mask is None for row in rows):
            seen.attend.append(seconds / len(rows))

    def moved(seconds: float, cache: Any, blocks: Any, moves: Any) -> None:
        if moves.exchange:
            seen.move.append(seconds)
            seen.num_rows_moved.append(len(moves.source))

    yield Layer, "perform", watch(Layer.perform, performed)
    yield CPUCache, "select", watch(CPUCache.select, attended)
    yield CPUCache, "move", watch(CPUCache.move, moved)


def once(timed: Any, forward: Any, inner: type) -> Any:
    """Time `forward` unless it is called from within a timed subclass."""
    outer = timed(forward)

    def attend(impl: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = forward if isinstance(impl, inner) else outer
        return chosen(impl, *args, **kwargs)

    return attend


def count(steps: Steps, view: Any) -> None:
    """Add what our kernel reads, which vLLM's is not given."""
    steps.num_scoring[-1] = sum(task.scores_while_attending for task in view.tasks)
    packed = [task for task in view.tasks if not task.gathers]
    ours = [task for task in packed if task.scores_while_attending]
    for turn in [*ours, *(turn for turn in view.turns if turn and turn.gathers)]:
        num_rows = turn.num_tokens - turn.first_read_token - 1
        if not turn.reads_all:
            plan = turn.state.plan
            num_unread = plan.num_stored_blocks - plan.num_core_blocks
            num_rows -= num_unread * plan.block_size // 2  # their keys are read
        steps.num_rows[-1] += num_rows


def median(values: Sequence[float]) -> float:
    """Median as a float."""
    return float(statistics.median(values))
