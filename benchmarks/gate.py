"""Refuses to time an engine whose compiled loops differ from eager code.

While a few requests are answered with a benchmark's own settings, refreshes among
them, all that the loops attend, score and rank is computed by plain operations, too,
in fp64 over the same rows. What the loops err may be twice what eager code errs in the
precision of the result, and the last bits of fp32, by root mean square; ranks must be
equal. On a CPU: kernels for CUDA are checked where they are timed, in
`benchmarks/kernels`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm_avl.kernels.cpu import reference
from vllm_avl.kernels.cpu.decode_rows import DecodeRows

from benchmarks.engines import Engine, Request
from vllm_avl.worker.cpu.cache import CPUCache

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
        cache: CPUCache,
        query: torch.Tensor,
        rows: DecodeRows,
        masks: np.ndarray,
        output: torch.Tensor,
    ) -> None:
        """Attend all rows again."""
        errors = self.errors_of("attend")
        group = query.shape[1] // cache.num_kv_heads
        for row, token in enumerate(rows.tokens):
            keys, values = _read(cache, rows.block_table[row], rows.num_tokens[row])
            for head in range(query.shape[1]):
                of_head = head // group
                read = reference.read_slots(rows, masks, row, of_head)
                given = cache, query[token, head], keys[of_head, read]
                eager, exact = (
                    _weights(*given, dtype=t) for t in (torch.float32, EXACT)
                )
                errors.add(
                    output[token, head],
                    eager.to(query.dtype) @ values[of_head, read].to(query.dtype),
                    exact @ values[of_head, read].to(EXACT),
                )
                if rows.scored[row]:
                    seen = cache.seen_by[int(token)][head, read]
                    self.errors_of("refresh").add(seen, eager, exact)

    def check_scored(
        self,
        cache: CPUCache,
        query: torch.Tensor,
        blocks: torch.Tensor,
        num_tokens: int,
        scores: torch.Tensor,
    ) -> None:
        """Score a prompt's last rows again."""
        errors = self.errors_of("score")
        group = query.shape[1] // cache.num_kv_heads
        keys, _ = _read(cache, blocks, num_tokens)
        places = torch.arange(num_tokens)
        last = num_tokens - len(query) + torch.arange(len(query))
        hidden = places > last[:, None]
        for head in range(query.shape[1]):
            given = cache, query[:, head], keys[head // group], hidden
            eager, exact = (
                _weights(*given, dtype=t).sum(0) for t in (torch.float32, EXACT)
            )
            errors.add(scores[head], eager, exact)

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
    attend, score, rank = CPUCache.attend, CPUCache.score, CPUCache.rank

    def attending(cache: CPUCache, *arguments: Any) -> None:
        attend(cache, *arguments)
        checked.check_attended(cache, *arguments)

    def scoring(cache: CPUCache, *arguments: Any) -> torch.Tensor:
        scores = score(cache, *arguments)
        checked.check_scored(cache, *arguments[:3], scores)
        return scores

    def ranking(cache: CPUCache, *arguments: Any) -> torch.Tensor:
        order = rank(cache, *arguments)
        checked.check_ranked(order, *arguments)
        return order

    with patch.multiple(CPUCache, attend=attending, score=scoring, rank=ranking):
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


def _read(
    cache: CPUCache, blocks: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[num_kv_heads, num_tokens, head_size] keys and values, fp32."""
    slots = torch.arange(int(num_tokens))
    num_blocks = -(-len(slots) * cache.head_size // (cache.halves.shape[-1]))
    return cache.rows(blocks[:num_blocks], slots)


def _weights(
    cache: CPUCache,
    query: torch.Tensor,
    keys: torch.Tensor,
    hidden: torch.Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[..., num_keys] attention probabilities."""
    logits = query.to(dtype) @ keys.to(dtype).T * cache.scale
    if cache.soft_cap:
        logits = cache.soft_cap * torch.tanh(logits / cache.soft_cap)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return torch.softmax(logits, -1)
