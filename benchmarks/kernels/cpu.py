"""Times the CPU operations against a copy of the bytes that they must read.

Each operation and the copy take turns over as many layers as keep both out of the
processor's caches; a ratio is the median over turns. On a machine that others share,
one thread (`--threads 1`) is timed by its own processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm
from vllm_avl.kernels import cpu

from benchmarks.harness import Benchmark, Report, main

DTYPES = {
    name: getattr(torch, name)
    for name in ("bfloat16", "float8_e4m3fn", "float16", "float32")
}
QUERIES = DTYPES | {"float8_e4m3fn": torch.bfloat16}
"""Dtypes of queries, by the cache's."""
NUM_TOKENS, NUM_ROWS, BLOCK_SIZE = 2400, 8, 32
NUM_SCORING_ROWS, NUM_SCORED_TOKENS, TAIL, KEPT = 32, 2341, 64, 0.3
COLD_BYTES = 100e6


@dataclass
class Case:
    operation: str
    dtype: str
    shape: str
    num_bytes: int
    run: Callable[[int], object]  # on a layer
    num_layers: int


def make_layers(dtype, num_blocks, num_kv_heads, head_size, num_bytes):
    shape = num_blocks, num_kv_heads, 2, BLOCK_SIZE * head_size
    count = max(2, int(COLD_BYTES / num_bytes))
    return [torch.randn(shape).to(DTYPES[dtype]) for _ in range(count)]


def masked(selected):
    """[NUM_ROWS, num_masked] masks that keep `KEPT` of their slots."""
    size = NUM_TOKENS - TAIL
    mask = torch.zeros(NUM_ROWS, size, dtype=torch.bool)
    if selected == "leading":
        mask[:, : int(KEPT * size) // BLOCK_SIZE * BLOCK_SIZE] = True
    for line in mask if selected == "scattered" else []:
        line[torch.randperm(size)[: int(KEPT * size)]] = True
    return mask


def attention(dtype, num_kv_heads, group, head_size, selected):
    mask = masked(selected)
    all_rows = num_kv_heads * NUM_TOKENS * NUM_ROWS * head_size
    read = 1.0 if selected == "all" else (mask[0].sum().item() + TAIL) / NUM_TOKENS
    keys = read if selected == "leading" else 1.0
    num_bytes = int(all_rows * DTYPES[dtype].itemsize * (keys + read))
    num_blocks = NUM_TOKENS // BLOCK_SIZE * NUM_ROWS
    layers = make_layers(dtype, num_blocks, num_kv_heads, head_size, num_bytes)
    table = torch.randperm(num_blocks, dtype=torch.int32).view(NUM_ROWS, -1)
    query = torch.randn(NUM_ROWS, num_kv_heads * group, head_size).to(QUERIES[dtype])
    output, nothing = torch.empty_like(query), np.zeros(NUM_ROWS, np.int64)
    masks = np.array([line.data_ptr() for line in mask])
    rows = cpu.DecodeRows(
        np.arange(NUM_ROWS),
        table,
        nothing + NUM_TOKENS,
        nothing + (0 if selected == "all" else mask.shape[1]),
        nothing,
        nothing.astype(bool),
    )

    def run(layer):
        # It keeps `mask`, whose memory is read by address.
        addresses = nothing if selected == "all" else masks[: len(mask)]
        cpu.selected_attention(query, layers[layer], rows, addresses, output, 0.1)

    shape = f"{num_kv_heads}x{group} heads of {head_size}, {selected}"
    return Case("selected_attention", dtype, shape, num_bytes, run, len(layers))


def scores(dtype, num_kv_heads, group, head_size):
    num_blocks = -(-NUM_SCORED_TOKENS // BLOCK_SIZE)
    size = num_kv_heads * NUM_SCORED_TOKENS * head_size * DTYPES[dtype].itemsize
    layers = make_layers(dtype, num_blocks, num_kv_heads, head_size, size)
    blocks = torch.randperm(num_blocks, dtype=torch.int32)
    query = torch.randn(NUM_SCORING_ROWS, num_kv_heads * group, head_size)
    query = query.to(QUERIES[dtype])

    def run(layer):
        cpu.attention_scores(query, layers[layer], blocks, NUM_SCORED_TOKENS, 0.1)

    shape = f"{num_kv_heads}x{group} heads of {head_size}, {NUM_SCORING_ROWS} rows"
    return Case("attention_scores", dtype, shape, size, run, len(layers))


def copying(dtype, num_kv_heads, head_size, overlapping):
    num_blocks = NUM_TOKENS // BLOCK_SIZE
    count = int(NUM_TOKENS * KEPT)
    size = 2 * num_kv_heads * count * head_size * DTYPES[dtype].itemsize
    layers = make_layers(dtype, 2 * num_blocks, num_kv_heads, head_size, size)
    ids = torch.randperm(2 * num_blocks, dtype=torch.int32)
    source_blocks, others = ids.split(num_blocks)
    target_blocks = source_blocks if overlapping else others
    picked = [torch.randperm(NUM_TOKENS)[:count].sort()[0] for _ in range(num_kv_heads)]
    source = torch.stack(picked).int()

    def run(layer):
        cpu.copy_rows(layers[layer], head_size, source_blocks, source, target_blocks)

    shape = f"{num_kv_heads} heads of {head_size}, {'same' if overlapping else 'other'}"
    return Case("copy_rows", dtype, shape, size, run, len(layers))


def cases(dtypes: Iterable[str]) -> Iterator[Case]:
    for dtype in dtypes:
        for num_kv_heads, group in ((8, 1), (2, 8)):
            for head_size in (64, 128):
                for selected in ("all", "scattered", "leading"):
                    yield attention(dtype, num_kv_heads, group, head_size, selected)
                yield scores(dtype, num_kv_heads, group, head_size)
        for overlapping in (False, True):
            yield copying(dtype, 8, 64, overlapping)


def time_one(case: Case, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a call, and the median ratio to the copy's."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    count = max(2, int(COLD_BYTES / case.num_bytes))
    sources = torch.zeros(count, case.num_bytes, dtype=torch.uint8)
    target = torch.zeros(case.num_bytes, dtype=torch.uint8)
    case.run(0)
    times, ratios = [], []
    for turn in range(rounds):
        start = clock()
        case.run(turn % case.num_layers)
        middle = clock()
        target.copy_(sources[turn % count])
        times.append(1e3 * (middle - start))
        ratios.append((middle - start) / (clock() - middle))
    return statistics.median(times), statistics.median(ratios)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Time every operation, on every shape, in every dtype."""
    torch.set_num_threads(args.threads)
    rows = []
    for case in tqdm(cases(args.dtypes), unit="case", disable=None):
        milliseconds, ratio = time_one(case, args.rounds)
        row = {"operation": case.operation, "dtype": case.dtype, "shape": case.shape}
        row |= {"MB": case.num_bytes / 1e6, "ms": milliseconds, "ratio": ratio}
        rows.append(row)
    report.show("CPU operations beside a copy of the same bytes", {}, rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--rounds", type=int, default=60, help="calls of each operation")
    add("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="of the cache")
    add("--threads", type=int, default=torch.get_num_threads(), help="that compute")


QUICK = {"dtypes": ["bfloat16"], "rounds": 15}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK})

if __name__ == "__main__":
    main(BENCHMARK)
