"""What eviction costs beside the prefill: scores, choices, and moves of rows.

For one LLaVA prompt: the scores of its tokens by the last w rows, the choice of what is
stored and core, the move of the kept rows to the end of its blocks, and, of a refresh,
the choice of a new core and the exchange of rows where core is packed. Each beside the
prefill attention of the same prompt (FlashAttention where vLLM has it, otherwise
torch's). Scores are checked against the oracle's error budget, the rest bit by bit.

  compaction.py              a prompt of LLaVA-1.5's size: needs a CUDA GPU
  compaction.py --quick      a few rounds on a GPU, no CSV row
  compaction.py --interpret  results only, without a GPU
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from baselines import flash_function
from paged import SHAPES, TINY, Heads, Pool
from timing import num_copies
from torch.nn.functional import scaled_dot_product_attention
from vllm_avl.kernels.gpu import (
    compact_blocks,
    exchange_rows,
    ranking,
    reference,
    select_core,
    select_prompt,
    vision_scores,
)
from ways import Bits, Check, Way, Workload, on_copies

PREFILL = "prefill"
BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement."""

    heads: Heads
    block_size: int
    tokens: int
    store: float
    core: float
    turnover: float
    windows: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Of a token's keys or values."""
        return self.heads.num_kv_heads * self.heads.head_size * self.dtype.itemsize


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print the table and append to the CSV."""
    args = parse(argv)
    shapes = TINY if args.interpret else SHAPES
    cases = [
        Case(
            heads=shapes[shape],
            block_size=args.block_size,
            tokens=args.tokens,
            store=args.store,
            core=args.core,
            turnover=args.turnover,
            windows=tuple(args.windows),
            dtype=harness.dtype_of(args),
        )
        for shape in args.shapes
    ]
    benchmark = harness.Benchmark(
        name="compaction",
        modules=(
            *(vision_scores, ranking, select_prompt, select_core),
            *(compact_blocks, exchange_rows),
        ),
        baselines=(PREFILL,),
        build=build,
    )
    harness.main(benchmark, cases, args)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = harness.make_parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="(both)")
    add("--block-size", type=int, default=16, help="slots of a cache block (16)")
    add("--tokens", type=int, default=2358, help="of the prompt (2358)")
    add("--store", type=float, default=0.5, help="of the tokens kept: S (0.5)")
    add("--core", type=float, default=0.3, help="of the tokens in core: C (0.3)")
    add("--turnover", type=float, default=0.38, help="of core that changes (0.38)")
    add("--windows", type=int, nargs="+", default=[1, 32], help="rows w (1 32)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds = 5
    if args.interpret:
        args.tokens, args.windows = 150, [1, 8]
    return args


def build(case: Case, device: torch.device) -> Workload:
    """Return the prefill attention and everything that eviction adds to it."""
    heads, num_rows = case.heads, harness.share(case.core, case.tokens)
    moved = harness.share(case.turnover, num_rows)
    copies = num_copies(4 * moved * case.row_bytes, device), 1
    shape = case.tokens, heads.num_heads, heads.head_size
    query = torch.randn(shape, dtype=case.dtype, device=device)
    pool = Pool.random(heads, case.block_size, case.tokens, copies, query)
    workload = Workload([prefill(case, query)])
    workload.ways += [score(case, pool, query, window) for window in case.windows]
    workload.ways.append(choose_of_prompt(case, pool))
    workload.ways.append(compact(case, pool))
    workload.ways.append(choose_core(case, pool))
    workload.ways.append(exchange(case, pool, num_rows, moved))
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


class Choices:
    """What is stored and core of a prompt all of whose tokens compete."""

    def __init__(self, case: Case, pool: Pool) -> None:
        size, self.pool, self.size = case.block_size, pool, case.block_size
        self.device, self.num_heads = pool.tables.device, case.heads.num_kv_heads
        self.num_slots = case.tokens // size * size
        num_freed = int((1 - case.store) * self.num_slots) // size
        self.start = num_freed * size
        self.num_core = harness.share(case.core, self.num_slots)
        # Whole numbers: heads are added in any order.
        scores = torch.randint(0, 1 << 16, (self.num_heads, pool.num_rows))
        self.scores = scores.float().to(self.device)

    def buffers(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return row tokens and the list, before anything is chosen."""
        new = torch.zeros(2, self.pool.num_rows, dtype=torch.int32, device=device)
        return new[0], new[1]

    def of_prompt(
        self, choose: Callable, blocks: torch.Tensor, buffers: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Choose on the device of `blocks`; return the slots that move."""
        scores = self.scores[0, : self.num_slots].to(blocks.device)
        competes = torch.ones_like(scores, dtype=torch.bool)
        budget = self.start, self.num_slots - self.start, self.num_core
        return choose(scores, competes, blocks, self.size, *budget, *buffers)[0]

    def of_core(
        self,
        choose: Callable,
        scores: torch.Tensor,
        blocks: torch.Tensor,
        buffers: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Choose a new core on the device of `blocks`; return what entered."""
        entered = blocks.new_zeros(1)
        sizes = (self.start, self.num_slots, self.num_core)
        ends = (blocks.new_full((1,), size) for size in sizes)
        choose(scores, *buffers, entered, blocks.unsqueeze(0), self.size, *ends)
        return entered

    def result_of_prompt(self, choose: Callable, device: str) -> torch.Tensor:
        """Everything that is written, on the CPU."""
        buffers = self.buffers(device)
        source = self.of_prompt(choose, self.pool.tables[0, 0].to(device), buffers)
        return torch.cat([source, *buffers]).cpu()

    def result_of_core(self, choose: Callable, device: str) -> torch.Tensor:
        """Everything that is written, on the CPU."""
        blocks = self.pool.tables[0, 0]
        buffers = self.buffers("cpu")
        self.of_prompt(reference.select_prompt, blocks.cpu(), buffers)
        buffers = [buffer.to(device) for buffer in buffers]
        scores = self.scores.flip(1).to(device, copy=True)
        entered = self.of_core(choose, scores, blocks.to(device), buffers)
        return torch.cat([entered, *buffers]).cpu()


def choose_of_prompt(case: Case, pool: Pool) -> Way:
    """Return the choice of what is stored, moved and listed."""
    choices = Choices(case, pool)
    buffers, ours = choices.buffers(choices.device), select_prompt.select_prompt
    expected = choices.result_of_prompt(reference.select_prompt, "cpu")
    return Way(
        labels={"operation": "select_prompt", "way": f"{choices.num_slots} tokens"},
        calls=on_copies(
            lambda blocks: choices.of_prompt(ours, blocks, buffers), pool.tables[:, 0]
        ),
        # A score, a key, a token and an entry each.
        num_bytes=4 * 4 * choices.num_slots,
        checks=[
            Bits(
                "select_prompt",
                lambda: choices.result_of_prompt(ours, choices.device.type),
                expected,
            )
        ],
        required=True,
    )


def choose_core(case: Case, pool: Pool) -> Way:
    """Return the choice of a new core by one refresh."""
    choices = Choices(case, pool)
    buffers, ours = choices.buffers(choices.device), select_core.select_core
    for blocks in pool.tables[:, 0]:
        choices.of_prompt(select_prompt.select_prompt, blocks, buffers)
    expected = choices.result_of_core(reference.select_core, "cpu")
    num_stored = choices.num_slots - choices.start
    return Way(
        labels={"operation": "select_core", "way": f"{num_stored} stored"},
        calls=on_copies(
            lambda blocks: choices.of_core(ours, choices.scores, blocks, buffers),
            pool.tables[:, 0],
        ),
        num_bytes=4 * (choices.num_heads + 3) * num_stored,
        checks=[
            Bits(
                "select_core",
                lambda: choices.result_of_core(ours, choices.device.type),
                expected,
            )
        ],
        required=True,
    )


def compact(case: Case, pool: Pool) -> Way:
    """Return the move of the kept rows to the end; both lists descend."""
    device = pool.tables.device
    num_kept = harness.share(case.store, case.tokens)
    kept = torch.randperm(case.tokens, device=device)[:num_kept]
    source = kept.sort(descending=True).values.int()
    target = torch.arange(case.tokens - 1, case.tokens - 1 - num_kept, -1)
    return moving(
        case, pool, "compact_blocks", (source, target.int().to(device)), num_kept
    )


def exchange(case: Case, pool: Pool, num_core: int, num_pairs: int) -> Way:
    """Return the exchange of rows at random places in core with others outside it."""
    device = pool.tables.device
    first_core = case.tokens - num_core
    leaving = first_core + torch.randperm(num_core, device=device)[:num_pairs]
    entering = torch.randperm(first_core, device=device)[:num_pairs]
    pairs = entering.int(), leaving.int()
    return moving(case, pool, "exchange_rows", pairs, 2 * num_pairs)


def moving(
    case: Case, pool: Pool, name: str, lists: tuple[torch.Tensor, ...], num_rows: int
) -> Way:
    """Return an operation that writes `num_rows` rows, keys and values."""
    move = getattr({"compact_blocks": compact_blocks}.get(name, exchange_rows), name)

    def moved(by: Callable) -> torch.Tensor:
        cache = pool.cache.clone()
        by(*cache.split(case.heads.head_size, -1), pool.tables[0, 0], *lists)
        return cache.view(BITS[case.dtype.itemsize])

    return Way(
        labels={"operation": name, "way": f"{len(lists[0])} moves"},
        calls=on_copies(
            lambda blocks: move(pool.keys, pool.values, blocks, *lists),
            pool.tables[:, 0],
        ),
        num_bytes=2 * 2 * num_rows * case.row_bytes,
        checks=[Bits(name, lambda: moved(move), moved(getattr(reference, name)))],
        required=True,
    )


if __name__ == "__main__":
    main()
