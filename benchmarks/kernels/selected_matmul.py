"""What gathering inside the matmul saves: the operator figure of the A-VL paper.

One query row against cached keys, one row of weights against cached values, and both,
in three ways: with all vision tokens, with index_select and then matmul, and with our
operators that gather the selected rows themselves. The indices of index_select are
ready before it is timed. Results are checked against the oracle first.

  selected_matmul.py              the paper's sizes: needs a CUDA GPU
  selected_matmul.py --quick      a small case on a GPU, no CSV row
  selected_matmul.py --interpret  results only, without a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import Benchmark, main
from benchmarks.kernels import harness
from benchmarks.kernels import reference_matmul as reference
from benchmarks.kernels import select_rows_matmul as operators
from benchmarks.kernels.over_batch import draw_over_batch
from benchmarks.kernels.timing import num_copies
from benchmarks.kernels.ways import CHECKED_REQUESTS, Check, Way, Workload, on_copies

FULL, SLICE = "full matmul", "index_select + matmul"
PARTS = ("q·Kᵀ", "p·V", "both")


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    batch: int
    num_heads: int
    head_size: int
    vision_tokens: int
    fraction: float
    dtype: torch.dtype

    @property
    def num_selected(self) -> int:
        """Tokens selected in each request."""
        return harness.share(self.fraction, self.vision_tokens)


class Selected(NamedTuple):
    """Which tokens are selected, and what the queries and weights are."""

    query: torch.Tensor
    """[batch, num_heads, 1, head_size]"""
    weights: torch.Tensor
    """[batch, num_heads, 1, vision_tokens]"""
    chosen_weights: torch.Tensor
    """[batch, num_heads, 1, num_selected]"""
    indices: torch.Tensor
    """[batch, num_selected] int32, in no order."""
    rows: torch.Tensor
    """[batch * num_heads * num_selected] int64, among the rows of all heads."""


class Copy(NamedTuple):
    """Keys and values, each [batch, num_heads, vision_tokens, head_size]."""

    key: torch.Tensor
    value: torch.Tensor


class Operators(NamedTuple):
    """One way to multiply."""

    columns: Callable[[Copy], torch.Tensor]
    """q·Kᵀ"""
    rows: Callable[[Copy], torch.Tensor]
    """p·V"""

    def call(self, part: str) -> Callable[[Copy], torch.Tensor]:
        """Return what one call of a part is."""
        calls = dict(zip(PARTS, (self.columns, self.rows, self.both), strict=True))
        return calls[part]

    def both(self, copy: Copy) -> torch.Tensor:
        """Multiply twice; the weights are given, so that no softmax is timed."""
        self.columns(copy)
        return self.rows(copy)


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Return a case for each fraction and batch."""
    return [
        Case(
            batch,
            args.num_heads,
            args.head_size,
            args.vision_tokens,
            fraction,
            harness.dtype_of(args),
        )
        for fraction in args.fractions
        for batch in args.batches
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    harness.add_shared_options(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=harness.batches(64), help="requests")
    add("--num-heads", type=int, default=32, help="of queries, keys and values")
    add("--head-size", type=int, default=128, help="of each")
    add("--vision-tokens", type=int, default=2358, help="of each request")
    add(
        "--fractions",
        type=float,
        nargs="+",
        default=[0.5, 0.3],
        help="of the vision tokens selected: the paper's S and C",
    )


def build(case: Case, device: torch.device) -> Workload:
    """Return all ways to multiply, in every part."""
    selected = select(case, device)
    shape = case.batch, case.num_heads, case.vision_tokens, case.head_size
    row_bytes = case.batch * case.num_heads * case.head_size * case.dtype.itemsize
    chosen_bytes = row_bytes * case.num_selected
    copies = [
        Copy(*torch.randn(2, *shape, dtype=case.dtype, device=device))
        for _ in range(num_copies(chosen_bytes, device))
    ]
    ways = []
    for part in PARTS:
        results = expected(selected, copies[0], part)
        for name, how in multiplications(selected).items():
            num_rows = case.vision_tokens if name == FULL else case.num_selected
            call = how.call(part)
            check = Check(
                f"{name} {part}",
                lambda call=call: call(copies[0])[:CHECKED_REQUESTS],
                *results[name == FULL],
            )
            ways.append(
                Way(
                    labels={"part": part, "way": name},
                    calls=on_copies(call, copies),
                    num_bytes=row_bytes * num_rows * (2 if part == "both" else 1),
                    checks=[check],
                    required=name == "ours",
                    baseline=None if name == "ours" else name,
                    group=part,
                )
            )
    return Workload(ways)


def select(case: Case, device: torch.device) -> Selected:
    """Choose tokens at random, others in each request, and make queries and weights."""
    batch, heads, tokens = case.batch, case.num_heads, case.vision_tokens
    order = torch.rand(batch, tokens, device=device).argsort(1)
    indices = order[:, : case.num_selected]
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1)
    weights = torch.rand(batch, heads, 1, tokens, dtype=case.dtype, device=device)
    weights /= tokens
    return Selected(
        torch.randn(batch, heads, 1, case.head_size, dtype=case.dtype, device=device),
        weights,
        weights[..., : case.num_selected].contiguous(),
        indices.int(),
        (head * tokens + indices[:, None]).flatten(),
    )


def multiplications(selected: Selected) -> dict[str, Operators]:
    """Return the three ways, by name."""
    query, weights, chosen_weights, indices, rows = selected

    def sliced(cached: torch.Tensor) -> torch.Tensor:
        chosen = cached.flatten(0, 2).index_select(0, rows)
        return chosen.view(*query.shape[:2], -1, cached.shape[3])

    return {
        FULL: Operators(
            lambda copy: query @ copy.key.mT, lambda copy: weights @ copy.value
        ),
        SLICE: Operators(
            lambda copy: query @ sliced(copy.key).mT,
            lambda copy: chosen_weights @ sliced(copy.value),
        ),
        "ours": Operators(
            lambda copy: operators.select_columns_matmul(query, copy.key, indices),
            lambda copy: operators.select_rows_matmul(
                chosen_weights, copy.value, indices
            ),
        ),
    }


def expected(
    selected: Selected, copy: Copy, part: str
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return (exact, eager) results of a part: with selected, then with all tokens."""
    query, weights, chosen_weights, indices, _ = (
        x[:CHECKED_REQUESTS] for x in selected
    )
    key, value = (x[:CHECKED_REQUESTS] for x in copy)
    everything = torch.arange(key.shape[2], device=key.device).expand(len(key), -1)
    results = []
    for chosen, factor in ((indices, chosen_weights), (everything, weights)):
        if part == PARTS[0]:
            multiply, left, right = reference.select_columns_matmul, query, key
        else:
            multiply, left, right = reference.select_rows_matmul, factor, value
        both = (multiply(x, right, chosen) for x in (left.double(), left))
        results.append(tuple(both))
    return tuple(results)


def draw(rows: Sequence[Mapping], file: Path) -> None:
    """Draw both products over the batch, one panel a fraction."""
    draw_over_batch(
        rows,
        lambda row: (
            f"q·Kᵀ and p·V, {row['fraction']:g} of {row['vision_tokens']} tokens"
            if row["part"] == "both"
            else None
        ),
        lambda row: row["way"],
        file,
    )


KERNELS = harness.Kernels(
    name="selected_matmul",
    modules=(operators,),
    baselines=(FULL, SLICE),
    cases=make_cases,
    build=build,
    draw=draw,
)
PRESETS = {
    "quick": {"batches": [1, 8], "rounds": 5},
    "interpret": {
        "batches": [2],
        "fractions": [0.3],
        "num_heads": 2,
        "head_size": 32,
        "vision_tokens": 250,
    },
}
BENCHMARK = Benchmark(__doc__, KERNELS.measure, add_options, PRESETS)

if __name__ == "__main__":
    main(BENCHMARK)
