"""Reads one line's worth of result out of what a step printed or wrote."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = Mapping[str, str]


def machine(log: str) -> str:
    """Return what there is, of the environment's last line."""
    found = json.loads(log.splitlines()[-1])
    return ", ".join(f"{name} {version}" for name, version in found.items())


def last_words(log: str) -> str:
    """Return the last line."""
    return log.splitlines()[-1].split("\r")[-1][:160]


def checks(log: str) -> str:
    """Return how many lines begin with ok, and those that begin with FAIL."""
    lines = log.splitlines()
    failed = [line[:80] for line in lines if line.startswith("FAIL")]
    return "; ".join([f"{sum(x.startswith('ok ') for x in lines)} ok", *failed])


def tests(log: str) -> str:
    """Return pytest's last line, or how far it came, and the first that failed."""
    lines = log.splitlines()
    counted = re.compile(r"\d+ (passed|failed|errors?|tests? coll)")
    ends = [line.strip("= ") for line in lines if counted.search(line)]
    failed = [line for line in lines if re.match(r"(\[gw.*)?(FAILED|ERROR)", line)]
    if not ends:
        passed = sum(bool(re.search(r"\bPASSED\b", line)) for line in lines)
        ends = [f"no end: {passed} passed, {len(failed)} failed by then"]
    return "; ".join([ends[-1], *(line[:120] for line in failed[:1])])


@dataclass(frozen=True)
class Rows:
    """Figures of the benchmarks' CSV files in a folder, with what they ought to be."""

    folder: Path

    def attention(self, num_heads: int) -> str:
        """Return what the best of ours gain with so many heads, by batch."""
        rows = [
            row
            for row in self._read("kernels_attention.csv")
            if int(row["num_heads"]) == num_heads and "best" in row["choice"]
        ]
        batches = dict.fromkeys(row["batch"] for row in rows)
        return "; ".join(
            _attention([row for row in rows if row["batch"] == batch])
            for batch in batches
        )

    def compaction(self) -> str:
        """Return what a prompt's end adds to its prefill's attention, by shape."""
        added: dict[str, float] = {}
        for row in self._read("kernels_compaction.csv"):
            if row["operation"] in ("prefill", "select_core"):
                continue
            if row["way"] == "w=1" or row["way"].endswith("in place"):
                continue
            shape = f"{row['num_heads']}/{row['num_kv_heads']} heads"
            added[shape] = added.get(shape, 0) + float(row["over_prefill"])
        sums = (f"{shape} {total:.2f}" for shape, total in added.items())
        return (
            f"scores, ranks and copies over the prefill's attention: {'; '.join(sums)}"
        )

    def decode(self) -> str:
        """Return avl's time a token over stock's."""
        rows = self._read("serving.csv")
        stock, *others = [r for r in rows if r["measurement"] == "latency"]
        return "; ".join(
            f"{row['variant']}, {row['concurrency']} at once: TPOT {row['tpot_ratio']}"
            f" of stock's {stock['tpot_ms']} ms, ITL {_over(row, stock, 'itl_ms')}"
            " (to be at most 0.6)"
            for row in others
        )

    def pool(self) -> str:
        """Return avl's tokens per second over stock's."""
        rows = self._read("serving.csv")
        stock, *others = [r for r in rows if r["measurement"] == "throughput"]
        return "; ".join(
            f"{row['variant']}: {row['tokens_ratio']} of stock's "
            f"{stock['tokens_per_s']} tokens/s (to be at least 1.5)"
            for row in others
        )

    def _read(self, name: str) -> list[Row]:
        with (self.folder / name).open(newline="") as lines:
            return list(csv.DictReader(lines))


def _attention(rows: Sequence[Row]) -> str:
    """Return a batch's figures; each way has a row for each of its reads."""
    found = {(row["way"], row["reads"]): row for row in rows}
    row = found["ours", "core"]

    def faster(name: str) -> str:
        return f"{1 / float(row[f'over_{name}_full']):.2f}"

    peer = found.get(("xformers", "tail"))
    tail = ""
    if peer:
        tail = f", tail {_over(peer, found['ours', 'tail'], 'us')} x xformers' (1)"
    return (
        f"{row['num_heads']}/{row['num_kv_heads']} heads, batch {row['batch']}: "
        f"core {faster('TRITON_ATTN')} x TRITON_ATTN's full (to be 2.5), "
        f"{faster('FLASH_ATTN')} x FLASH_ATTN's (2), "
        f"{float(row['share_of_copy']):.0%} of a copy's bandwidth (80 %){tail}"
    )


def _over(row: Row, stock: Row, name: str) -> str:
    return f"{float(row[name]) / float(stock[name]):.2f}"
