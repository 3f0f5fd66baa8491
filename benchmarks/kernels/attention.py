"""Decode attention of one layer: ours with a core list, against everybody's kernels.

Ours reads a core list and the text behind it (core), all that is stored, scoring it
(refresh) or not (tail), or the full cache. Against it: vLLM's TRITON_ATTN, its
FlashAttention and xformers over the full cache and over the tail, and index_select with
torch's attention over the same core rows. Times are those of a call inside a CUDA
graph; eager times include the launch. Every call reads another copy of the batch, so
that data come from HBM, and bytes are the least that must be read. Ours is tried with
all numbers of splits; `choice` names the fastest, and the back end's own.
Results are checked against the oracle first, four requests of each batch.

  attention.py              all sizes: needs a CUDA GPU
  attention.py --quick      a small case on a GPU, no CSV row
  attention.py --interpret  results only, without a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm_avl.kernels.cuda import reference_attention
from vllm_avl.kernels.cuda import selected_attention as kernels

from benchmarks.harness import Benchmark, main
from benchmarks.kernels import baselines, harness
from benchmarks.kernels.over_batch import draw_over_batch
from benchmarks.kernels.paged import SHAPES, TINY, Heads, Pool, Reads
from benchmarks.kernels.timing import num_copies
from benchmarks.kernels.ways import CHECKED_REQUESTS, Check, Way, Workload, on_copies
from vllm_avl.worker.cuda.listed_rows import num_splits


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    heads: Heads
    batch: int
    block_size: int
    vision_tokens: int
    text_tokens: int
    store: float
    core: float
    dtype: torch.dtype
    splits: tuple[int, ...]

    @property
    def seq_len(self) -> int:
        """Of a request that stores all."""
        return self.vision_tokens + self.text_tokens

    def reads(self) -> list[Reads]:
        """Return what a step can read; whole blocks are evicted."""
        stored = harness.share(self.store, self.vision_tokens)
        evicted = (self.vision_tokens - stored) // self.block_size * self.block_size
        stored = self.seq_len - evicted
        num_core = harness.share(self.core, self.vision_tokens)
        return [
            Reads("core", stored, stored - self.text_tokens, num_core),
            Reads("refresh", stored, scored=True),
            Reads("tail", stored),
            Reads("full", self.seq_len),
        ]


@dataclass
class Ours:
    """Calls of our kernel that read one thing, with all it needs allocated."""

    heads: Heads
    pool: Pool
    query: torch.Tensor
    reads: Reads
    core_list: torch.Tensor
    refresh: kernels.Refresh | None = field(init=False, default=None)
    integers: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        batch, device = len(self.query), self.query.device
        reads, num_rows = self.reads, self.pool.num_rows

        def same(value: int) -> torch.Tensor:
            return torch.full((batch,), value, dtype=torch.int32, device=device)

        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self.integers = {
            "seq_lens": same(reads.seq_len),
            "query_start_loc": starts,
            "first_slot": same(reads.first_slot),
            "num_core": same(reads.num_core),
        }
        if reads.scored:
            scores, logits = (
                torch.zeros(count, num_rows, dtype=torch.float32, device=device)
                for count in (self.heads.num_kv_heads, self.heads.num_heads)
            )
            self.refresh = kernels.Refresh(same(1), scores, logits)

    def attend(self, num_splits: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the kernel for any block table, with scratch of its own."""
        shape = *self.query.shape[:2], num_splits
        wide = partial(self.query.new_empty, dtype=torch.float32)
        buffers = {
            "output": torch.empty_like(self.query),
            "lse": wide(self.query.shape[:2]),
            "partial": (wide(*shape, self.heads.head_size), wide(shape)),
        }

        def call(table: torch.Tensor) -> torch.Tensor:
            kernels.selected_attention(
                **self._inputs(self.query, table),
                **buffers,
                num_splits=num_splits,
                refresh=self.refresh,
            )
            return buffers["output"]

        return call

    def expected(self, table: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return [output, scores] of the first requests, exact and eager."""
        found = []
        for query in (self.query.double(), self.query):
            checked = query[:CHECKED_REQUESTS]
            output, refresh = torch.empty_like(checked), None
            if self.refresh:
                wide = torch.promote_types(query.dtype, torch.float32)
                scores = torch.zeros_like(self.refresh.scores, dtype=wide)
                scored = self.refresh.scored
                refresh = kernels.Refresh(scored, scores, self.refresh.logits)
            reference_attention.selected_attention(
                **self._inputs(checked, table[:CHECKED_REQUESTS]),
                output=output,
                refresh=refresh,
            )
            found.append([output, *([self.scores(table, scores)] if refresh else [])])
        return list(zip(*found, strict=True))

    def scores(self, table: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return those of the rows that the first requests read."""
        rows = self.pool.rows_read(self.reads, self.core_list, table)
        return scores[:, rows[:CHECKED_REQUESTS].flatten()]

    def _inputs(self, query: torch.Tensor, table: torch.Tensor) -> dict[str, Any]:
        return {
            "query": query,
            "key_cache": self.pool.keys,
            "value_cache": self.pool.values,
            "block_table": table,
            "core_list": self.core_list,
            "scale": self.heads.scale,
            **self.integers,
        }


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Return a case for each shape and batch."""
    shapes = TINY if args.interpret else SHAPES
    return [
        Case(
            heads=shapes[shape],
            batch=batch,
            block_size=args.block_size,
            vision_tokens=args.vision_tokens,
            text_tokens=args.text_tokens,
            store=args.store,
            core=args.core,
            dtype=harness.dtype_of(args),
            splits=tuple(args.splits),
        )
        for shape in args.shapes
        for batch in args.batches
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    harness.add_shared_options(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of heads")
    add("--batches", type=int, nargs="+", default=harness.batches(64), help="requests")
    add("--splits", type=int, nargs="+", default=harness.batches(32), help="of a call")
    add("--block-size", type=int, default=16, help="slots of a cache block")
    add("--vision-tokens", type=int, default=2358, help="of each request")
    add("--text-tokens", type=int, default=64, help="behind the vision tokens")
    add("--store", type=float, default=0.5, help="of the vision tokens: S")
    add("--core", type=float, default=0.3, help="of the vision tokens: C")


def build(case: Case, device: torch.device) -> Workload:
    """Return ours and everybody's ways to attend to everything a step can read."""
    heads, dtype = case.heads, case.dtype
    row_bytes = 2 * heads.num_kv_heads * heads.head_size * dtype.itemsize
    all_reads = case.reads()
    least = case.batch * row_bytes * min(reads.num_rows for reads in all_reads)
    query = torch.randn(
        case.batch, heads.num_heads, heads.head_size, dtype=dtype, device=device
    )
    copies = num_copies(least, device), case.batch
    pool = Pool.random(heads, case.block_size, case.seq_len, copies, query)
    core_list = pool.last(all_reads[0].seq_len).list_core(all_reads[0])
    workload = Workload()
    for reads in all_reads:
        ours = Ours(heads, pool.last(reads.seq_len), query, reads, core_list)
        num_bytes = case.batch * row_bytes * reads.num_rows + 2 * query.nbytes
        expected = ours.expected(ours.pool.tables[0])
        workload.ways += [
            our_way(ours, num_splits, num_bytes, expected) for num_splits in case.splits
        ]
        add_baselines(workload, ours, num_bytes, expected[0])
    return workload


def our_way(
    ours: Ours,
    num_splits: int,
    num_bytes: int,
    expected: list[tuple[torch.Tensor, torch.Tensor]],
) -> Way:
    """Return our kernel with so many splits."""
    call, tables = ours.attend(num_splits), ours.pool.tables
    name = f"ours {ours.reads.name}, {num_splits} splits"

    def scores() -> torch.Tensor:
        ours.refresh.scores.zero_()
        call(tables[0])
        return ours.scores(tables[0], ours.refresh.scores)

    checks = [Check(name, lambda: call(tables[0])[:CHECKED_REQUESTS], *expected[0])]
    if ours.refresh:
        checks.append(Check(f"{name}, scores", scores, *expected[1]))
    return Way(
        labels={"reads": ours.reads.name, "way": "ours", "num_splits": num_splits},
        calls=on_copies(call, tables),
        num_bytes=num_bytes,
        checks=checks,
        required=True,
    )


def add_baselines(
    workload: Workload,
    ours: Ours,
    num_bytes: int,
    expected: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add everybody who can read what ours reads, without scoring."""
    reads = ours.reads

    def way(name: str, attend: Callable, copies: Sequence) -> Way:
        whole = f"{name}_{reads.name}" if reads.name == "full" else None
        result = lambda: attend(copies[0])[:CHECKED_REQUESTS]  # noqa: E731
        return Way(
            labels={"reads": reads.name, "way": name, "num_splits": ""},
            calls=on_copies(attend, copies),
            num_bytes=num_bytes,
            checks=[Check(f"{name} {reads.name}", result, *expected)],
            baseline=name if name == baselines.SLICE else whole,
        )

    for name, (make, copies) in readers(ours).items():
        workload.attempt(
            name,
            lambda name=name, make=make, copies=copies: way(
                name, make(ours.heads, ours.pool, ours.query), copies()
            ),
        )


def readers(ours: Ours) -> dict[str, tuple[Callable, Callable[[], Sequence]]]:
    """Return, by name, who makes a baseline and what its calls are made with."""
    pool, reads = ours.pool, ours.reads
    if reads.scored:
        return {}
    if reads.num_core:
        rows = partial(pool.rows_read, reads, ours.core_list)
        chosen = partial(map, rows, pool.tables)
        return {baselines.SLICE: (baselines.sliced_attention, lambda: [*chosen()])}
    tails = partial(baselines.tails, pool, reads)
    masks = partial(baselines.xformers_masks, pool, reads)
    return {
        baselines.TRITON: (baselines.triton_attention, tails),
        baselines.FLASH: (baselines.flash_attention, tails),
        baselines.XFORMERS: (baselines.xformers_attention, masks),
    }


def mark_choices(rows: list[dict]) -> None:
    """Name the fastest number of splits of a read, and the back end's own."""
    for row in rows:
        default = num_splits(row["batch"] * row["num_kv_heads"])
        same = [x for x in rows if (x["reads"], x["way"]) == (row["reads"], row["way"])]
        # Not `==`: a way that has eager times only, and NaN here, is still shown.
        best = not row["us"] > min(x["us"] for x in same)
        marks = ["best"] * best + ["default"] * (row["num_splits"] == default)
        row["choice"] = " ".join(marks)


def draw(rows: Sequence[Mapping], file: Path) -> None:
    """Draw all baselines and the best of ours over the batch, one panel a shape."""

    def panel(row: Mapping) -> str | None:
        heads = Heads(row["num_heads"], row["num_kv_heads"], row["head_size"])
        return heads.name if row["choice"].startswith("best") else None

    draw_over_batch(rows, panel, lambda row: f"{row['way']}, {row['reads']}", file)


FULL = (baselines.TRITON, baselines.FLASH, baselines.XFORMERS)
KERNELS = harness.Kernels(
    name="attention",
    modules=(kernels,),
    baselines=(*(f"{name}_full" for name in FULL), baselines.SLICE),
    cases=make_cases,
    build=build,
    finish=mark_choices,
    shown=lambda row: bool(row["choice"]),
    draw=draw,
)
PRESETS = {
    "quick": {"batches": [1, 8], "rounds": 5, "splits": [1, 8]},
    "interpret": {
        "batches": [2],
        "splits": [1, 4],
        "vision_tokens": 250,
        "text_tokens": 9,
    },
}
BENCHMARK = Benchmark(__doc__, KERNELS.measure, add_options, PRESETS)

if __name__ == "__main__":
    main(BENCHMARK)
