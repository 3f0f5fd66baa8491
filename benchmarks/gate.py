"""Refuses to time an engine whose compiled loops differ from eager code.

While a few requests are answered with a benchmark's own settings, refreshes among
them, all that the loops attend, score and rank is done by their eager references, too,
in fp64 over the same rows. What the loops err may be twice what eager code errs in the
precision of the result, and the last bits of fp32, by root mean square; ranks must be
equal. On a CPU: kernels for CUDA are checked where they are timed, in
`benchmarks/kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm_avl.kernels.cpu import reference
from vllm_avl.kernels.cpu.decode_rows import DecodeRows

from benchmarks.engines import Engine, Request
from vllm_avl.worker.cpu import cache

Weights = Mapping[int, torch.Tensor]
EXACT = torch.float64
LAST_BITS = 1e-6
"""Of fp32: eager code's exponentials are exact to less than that."""


@dataclass
class Errors:
    """Sums of squares over all calls of one loop."""

    ours: float = 0.0
    eager: float = 0.0
    exact: float = 0.0

    def add(self, ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        """Count one result."""
        self.ours += float((ours.double() - exact).square().sum())
        self.eager += float((eager.double() - exact).square().sum())
        self.exact += float(exact.square().sum())

    @property
    def are_small(self) -> bool:
        """Whether ours are at most twice eager code's and `LAST_BITS`; NaN is not."""
        budget = 2 * self.eager**0.5 + LAST_BITS * self.exact**0.5
        return self.ours**0.5 <= budget


@dataclass
class Checked:
    """What was computed twice."""

    errors: dict[str, Errors] = field(default_factory=dict)
    differing_ranks: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def errors_of(self, loop: str) -> Errors:
        """Return the sums of a loop that was called."""
        self.counts[loop] += 1
        return self.errors.setdefault(loop, Errors())

    def check_attended(
        self,
        weights: Weights,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: DecodeRows,
        masks: np.ndarray,
        output: torch.Tensor,
        *numbers: float,
        **form: Any,
    ) -> None:
        """Attend all rows again; arguments behind the first are the loop's."""
        outputs, again = [], []
        for dtype in (torch.float32, EXACT):
            outputs.append(torch.zeros(output.shape, dtype=dtype))
            given = query.to(dtype), kv_cache, rows, masks, outputs[-1]
            again.append(reference.selected_attention(*given, *numbers, **form))
        tokens = torch.from_numpy(rows.tokens)
        eager, exact = (of_dtype[tokens] for of_dtype in outputs)
        self.errors_of("attend").add(output[tokens], eager.to(output.dtype), exact)
        for row, probabilities in weights.items():
            errors = self.errors_of("refresh")
            errors.add(probabilities, *(of_dtype[row] for of_dtype in again))

    def check_scored(
        self,
        scores: torch.Tensor,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        *numbers: Any,
        **form: Any,
    ) -> None:
        """Score a prompt's last rows again; arguments as of `check_attended`."""
        *numbers, output = numbers
        outputs, again = [], []
        for dtype in (torch.float32, EXACT):
            outputs.append(torch.zeros(query.shape, dtype=dtype))
            given = query.to(dtype), kv_cache, blocks, num_tokens
            wanted = *numbers, outputs[-1]
            again.append(reference.attention_scores(*given, *wanted, **form))
        self.errors_of("score").add(scores, *again)
        if output is not None:
            eager, exact = outputs
            errors = self.errors_of("scoring rows")
            errors.add(output, eager.to(output.dtype), exact)

    def check_ranked(self, order: torch.Tensor, *arguments: Any) -> None:
        """Rank again."""
        self.counts["rank"] += 1
        same = torch.equal(order, reference.rank_rows(*arguments))
        self.differing_ranks += not same

    def failures(self, *, refreshes: bool) -> list[str]:
        """Say what is wrong, or was not checked."""
        expected = ["score", "rank", *(["attend", "refresh"] if refreshes else [])]
        found = [f"no {one} was checked" for one in expected if not self.counts[one]]
        found += [
            f"{loop}: error {(one.ours / one.exact) ** 0.5:.1e}, eager code's "
            f"{(one.eager / one.exact) ** 0.5:.1e}"
            for loop, one in self.errors.items()
            if not one.are_small
        ]
        if self.differing_ranks:
            found.append(
                f"{self.differing_ranks} of {self.counts['rank']} ranks differ"
            )
        return found


@contextmanager
def checked_loops(
    engine: Engine, xargs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Refuse to go on if a loop computed something else in here.

    Args:
        engine: an adaptive one, which serves few and short requests meanwhile.
        xargs: of all of them, as they will be timed.

    Raises:
        SystemExit: it did, or none of the loops ran.
    """
    checked = Checked()
    checks = {
        "selected_attention": checked.check_attended,
        "attention_scores": checked.check_scored,
        "rank_rows": checked.check_ranked,
    }
    with ExitStack() as stack:
        for name, check in checks.items():
            twice = _done_twice(getattr(cache, name), check)
            stack.enter_context(patch.object(cache, name, twice))
        yield
    settings = engine.settings(xargs)
    refreshes = settings.has_core and settings.refresh_interval > 0
    failures = checked.failures(refreshes=refreshes)
    if failures:
        raise SystemExit(f"{'; '.join(failures)}: nothing was timed")
    counts = ", ".join(f"{name} {count}" for name, count in checked.counts.items())
    print(f"checked against eager code: {counts}")


def check_loops(
    engine: Engine, sample: Sequence[Request], xargs: Mapping[str, Any] | None = None
) -> None:
    """Let `engine` answer `sample`, as in `checked_loops`."""
    with checked_loops(engine, xargs):
        engine.run(sample, xargs)


def _done_twice(
    loop: Callable[..., Any], check: Callable[..., None]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = loop(*args, **kwargs)
        check(result, *args, **kwargs)
        return result

    return run
