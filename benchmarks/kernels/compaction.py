"""What eviction costs beside the prefill: scores, choices, and copies of rows.

For one LLaVA prompt: the scores of its tokens by the last w rows, the choice of what is
stored and core, the copies of the kept rows to private blocks, or in place to the last
of its own, and, of a refresh, the choice of a new core. Each beside the prefill
attention of the same prompt (FlashAttention where vLLM has it, otherwise torch's).
Scores are checked against the oracle's error budget, the rest bit by bit.

  compaction.py              a prompt of LLaVA-1.5's size: needs a CUDA GPU
  compaction.py --quick      a few rounds on a GPU, no CSV row
  compaction.py --interpret  results only, without a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm_avl.kernels.cuda import (
    copy_rows,
    rank_rows,
    ranking,
    reference,
    select_core,
    vision_scores,
)

from benchmarks.harness import Benchmark, main
from benchmarks.kernels import harness
from benchmarks.kernels.baselines import flash_function
from benchmarks.kernels.paged import SHAPES, TINY, Heads, Pool
from benchmarks.kernels.timing import num_copies
from benchmarks.kernels.ways import Bits, Check, Way, Workload, on_copies

PREFILL = "prefill"
PRIVATE, IN_PLACE = "private", "in place"


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    heads: Heads
    block_size: int
    tokens: int
    store: float
    core: float
    windows: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of a token's keys or values."""
        return self.heads.num_kv_heads * self.heads.head_size * self.dtype.itemsize


def make_cases(args: argparse.Namespace) -> list[Case]:
    """Return a case for each shape."""
    shapes = TINY if args.interpret else SHAPES
    return [
        Case(
            heads=shapes[shape],
            block_size=args.block_size,
            tokens=args.tokens,
            store=args.store,
            core=args.core,
            windows=tuple(args.windows),
            dtype=harness.dtype_of(args),
        )
        for shape in args.shapes
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    harness.add_shared_options(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of heads")
    add("--block-size", type=int, default=16, help="slots of a cache block")
    add("--tokens", type=int, default=2358, help="of the prompt")
    add("--store", type=float, default=0.5, help="of the tokens kept: S")
    add("--core", type=float, default=0.3, help="of the tokens in core: C")
    add("--windows", type=int, nargs="+", default=[1, 32], help="rows w that score")


def build(case: Case, device: torch.device) -> Workload:
    """Return the prefill attention and everything that eviction adds to it."""
    heads, num_kept = case.heads, harness.share(case.store, case.tokens)
    least = min(case.tokens, 2 * 2 * num_kept) * case.row_bytes
    # The blocks of a second request are private to the first.
    copies = num_copies(least, device), 2
    shape = case.tokens, heads.num_heads, heads.head_size
    query = torch.randn(shape, dtype=case.dtype, device=device)
    pool = Pool.random(heads, case.block_size, case.tokens, copies, query)
    workload = Workload([prefill(case, query)])
    workload.ways += [score(case, pool, query, window) for window in case.windows]
    stored = Stored(case, pool)
    workload.ways.append(rank(stored))
    workload.ways += [copy(case, stored, where) for where in (PRIVATE, IN_PLACE)]
    workload.ways.append(choose_core(stored))
    return workload


def prefill(case: Case, query: torch.Tensor) -> Way:
    """Return causal attention of the whole prompt, as fast as it is to be had."""
    heads = case.heads
    shape = case.tokens, heads.num_kv_heads, heads.head_size
    key, value = torch.randn(2, *shape, dtype=query.dtype, device=query.device)
    try:
        name, attend = "FlashAttention", flash_prefill(case, query, key, value)
    except ImportError:
        name, attend = "torch SDPA", torch_prefill(case, query, key, value)
    exact = torch_prefill(case, query.double(), key.double(), value.double())()
    eager = torch_prefill(case, query, key, value)()
    return Way(
        labels={"operation": "prefill attention", "way": name},
        calls=[attend],
        num_bytes=2 * query.nbytes + 2 * key.nbytes,
        checks=[Check(f"prefill, {name}", attend, exact, eager)],
        baseline=PREFILL,
    )


def flash_prefill(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return the FlashAttention that vLLM ships.

    Raises:
        ImportError: it is not installed.
    """
    flash = flash_function()
    starts = torch.tensor([0, case.tokens], dtype=torch.int32, device=query.device)
    return lambda: flash(
        query,
        key,
        value,
        max_seqlen_q=case.tokens,
        cu_seqlens_q=starts,
        max_seqlen_k=case.tokens,
        cu_seqlens_k=starts,
        softmax_scale=case.heads.scale,
        causal=True,
    )


def torch_prefill(
    case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Return torch's attention of the whole prompt."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return lambda: scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=case.heads.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )[0].transpose(0, 1)


def score(case: Case, pool: Pool, query: torch.Tensor, window: int) -> Way:
    """Return the scores of all tokens by the last `window` rows."""
    last = query[-window:]
    rest = case.tokens, case.heads.scale

    def call(blocks: torch.Tensor) -> torch.Tensor:
        return vision_scores.vision_scores(last, pool.keys, blocks, *rest)

    blocks = pool.tables[0, 0]
    exact, eager = (
        reference.vision_scores(x, pool.keys, blocks, *rest)
        for x in (last.double(), last)
    )
    scores = case.heads.num_heads * case.tokens * 4
    return Way(
        labels={"operation": "vision_scores", "way": f"w={window}"},
        calls=on_copies(call, pool.tables[:, 0]),
        num_bytes=case.tokens * case.row_bytes + last.nbytes + scores,
        checks=[
            Check(f"vision_scores, w={window}", lambda: call(blocks), exact, eager)
        ],
        required=True,
    )


class Stored:
    """What a prompt stores, all of whose full blocks' tokens compete."""

    def __init__(self, case: Case, pool: Pool) -> None:
        size, self.pool, self.device = case.block_size, pool, pool.tables.device
        self.num_heads = case.heads.num_kv_heads
        self.num_ranked = case.tokens // size * size
        num_freed = int((1 - case.store) * self.num_ranked) // size
        self.num_stored = self.num_ranked - num_freed * size
        self.num_core = harness.share(case.core, self.num_ranked)
        self.prompt = pool.tables[:, 0]
        self.private = pool.tables[:, 1, : self.num_stored // size].contiguous()
        """[num_copies, blocks] that nobody else holds."""
        self.last = pool.tables[:, 0, num_freed : self.num_ranked // size].contiguous()
        """[num_copies, blocks] of the prompt's own."""
        # Whole numbers: heads are added in any order.
        scores = torch.randint(0, 1 << 16, (self.num_heads, pool.num_rows))
        self.scores = scores.float().to(self.device)
        """By cache row; for the prompt, those of a head by token."""

    def rank(self, choose: Callable, device: str) -> torch.Tensor:
        """Choose on a device; return the tokens that stay, on the CPU."""
        scores = self.scores[:1, : self.num_ranked].to(device)
        return choose(scores, scores, self.num_stored, self.num_core).cpu()

    @cached_property
    def order(self) -> torch.Tensor:
        """[1, num_stored] int32 tokens that stay, core first, by the oracle."""
        return self.rank(reference.rank_rows, "cpu")

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `select_core` updates of every copy: row tokens, empty lists."""
        slots = torch.arange(self.num_stored)
        tokens = 2 * self.order[0] + (slots < self.num_core)
        rows = self.pool.rows_of(self.private.unsqueeze(1), slots.to(self.device))
        row_tokens, core_list = torch.zeros(
            2, self.pool.num_rows, dtype=torch.int32, device=self.device
        )
        row_tokens[rows] = tokens.int().to(self.device)
        return row_tokens, core_list.unsqueeze(0)

    def choose_core(
        self,
        choose: Callable,
        scores: torch.Tensor,
        blocks: torch.Tensor,
        buffers: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Choose a new core on the device of `blocks`; return what entered."""
        entered = blocks.new_zeros(1)
        stop, size = (
            blocks.new_full((1,), x) for x in (self.num_stored, self.num_core)
        )
        block_size = self.pool.block_size
        choose(scores, *buffers, entered, blocks.unsqueeze(0), block_size, stop, size)
        return entered

    def chosen_core(self, choose: Callable, device: str) -> torch.Tensor:
        """Everything that choosing a new core writes, on the CPU."""
        scores = self.scores.to(device, copy=True)
        buffers = [buffer.to(device) for buffer in self.buffers()]
        blocks = self.private[0].to(device)
        entered = self.choose_core(choose, scores, blocks, buffers)
        return torch.cat([entered, *(buffer.flatten() for buffer in buffers)]).cpu()


def rank(stored: Stored) -> Way:
    """Return the choice of what is stored, and what of that is core."""
    ours, device = rank_rows.rank_rows, stored.device
    scores = stored.scores[:1, : stored.num_ranked].contiguous()
    sizes = stored.num_stored, stored.num_core
    return Way(
        labels={"operation": "rank_rows", "way": f"{stored.num_ranked} tokens"},
        calls=[lambda: ours(scores, scores, *sizes)],
        # A score and a key each, and what stays.
        num_bytes=4 * (2 * stored.num_ranked + stored.num_stored),
        checks=[
            Bits("rank_rows", lambda: stored.rank(ours, device.type), stored.order)
        ],
        required=True,
    )


def choose_core(stored: Stored) -> Way:
    """Return the choice of a new core by one refresh."""
    buffers, ours = stored.buffers(), select_core.select_core
    expected = stored.chosen_core(reference.select_core, "cpu")
    return Way(
        labels={"operation": "select_core", "way": f"{stored.num_stored} stored"},
        calls=on_copies(
            lambda blocks: stored.choose_core(ours, stored.scores, blocks, buffers),
            stored.private,
        ),
        num_bytes=4 * (stored.num_heads + 3) * stored.num_stored,
        checks=[
            Bits(
                "select_core",
                lambda: stored.chosen_core(ours, stored.device.type),
                expected,
            )
        ],
        required=True,
    )


def copy(case: Case, stored: Stored, where: str) -> Way:
    """Return the copies of the kept rows to private blocks, or to the prompt's own."""
    pool, in_place = stored.pool, where == IN_PLACE
    targets = stored.last if in_place else stored.private
    blocks = list(zip(stored.prompt, targets, strict=True))
    order = stored.order.to(stored.device)

    def call(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        source_blocks, target_blocks = pair
        copy_rows.copy_rows(
            pool.cache, source_blocks, order, target_blocks, in_place=in_place
        )

    def copied(by: Callable, device: str) -> torch.Tensor:
        cache = pool.cache.clone()
        source_blocks, target_blocks = (ids.to(device) for ids in blocks[0])
        by(cache, source_blocks, order.to(device), target_blocks, in_place=in_place)
        return cache.view(copy_rows.BITS[cache.itemsize])

    # The oracle looks up blocks one by one: not on a device, which it would wait for.
    expected = copied(reference.copy_rows, "cpu")
    return Way(
        labels={"operation": "copy_rows", "way": f"{order.shape[1]} rows, {where}"},
        calls=on_copies(call, blocks),
        num_bytes=2 * 2 * order.numel() * case.row_bytes,
        checks=[
            Bits(
                f"copy_rows, {where}",
                lambda: copied(copy_rows.copy_rows, stored.device.type),
                expected,
            )
        ],
        required=True,
    )


KERNELS = harness.Kernels(
    name="compaction",
    modules=(vision_scores, ranking, rank_rows, select_core, copy_rows),
    baselines=(PREFILL,),
    cases=make_cases,
    build=build,
)
PRESETS = {"quick": {"rounds": 5}, "interpret": {"tokens": 150, "windows": [1, 8]}}
BENCHMARK = Benchmark(__doc__, KERNELS.measure, add_options, PRESETS)

if __name__ == "__main__":
    main(BENCHMARK)
