"""Times calls on a GPU: CUDA graph replays that take turns, with data from HBM."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.kernels.ways import Way
from benchmarks.report import spread

L2_CACHES = 4
"""Bytes that calls touch before one touches the same again, in L2 caches."""
MIN_CALLS = 20
"""In a graph, so that the time between two graphs does not show."""
EAGER_SHARE = 5
"""Eager calls are timed in every so many-th round."""
COPIED_BYTES = 1 << 30


@dataclass
class Times:
    """Microseconds of one call, by round; NaN where it could not be captured."""

    replayed: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Return how many copies of the data keep `num_bytes` a call out of the cache."""
    if device.type != "cuda":
        return 2
    l2_cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, math.ceil(L2_CACHES * l2_cache / num_bytes))


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy in the device's memory."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Way({"way": "copy"}, [lambda: target.copy_(source)], 2 * COPIED_BYTES)
    (times,) = measure([copy], 10)
    return 1e6 * copy.num_bytes / statistics.median(times.replayed)


def measure(ways: Sequence[Way], rounds: int) -> list[Times]:
    """Time every way once a round, in turn, so that all see the same clocks.

    Launches are enqueued without waiting, so that the host is ahead of the GPU.
    """
    captured = [rotate(way) for way in ways]
    graphs = [capture(calls) for calls in captured]
    times = [Times() for _ in ways]
    for index in tqdm(range(rounds), unit="round", disable=None, leave=False):
        replays = [graph and timed(graph.replay) for graph in graphs]
        torch.cuda.synchronize()
        for seen, calls, events in zip(times, captured, replays, strict=True):
            seen.replayed.append(microseconds(events) / len(calls))
        if index % EAGER_SHARE:
            continue
        for seen, calls in zip(times, captured, strict=True):
            events = timed(lambda calls=calls: [call() for call in calls])
            torch.cuda.synchronize()
            seen.eager.append(microseconds(events) / len(calls))
    return times


def rotate(way: Way) -> list[Callable]:
    """Return the calls of a graph: every copy equally often, MIN_CALLS at least."""
    return [*way.calls] * math.ceil(MIN_CALLS / len(way.calls))


def capture(calls: Sequence[Callable]) -> torch.cuda.CUDAGraph | None:
    """Put all calls into one CUDA graph; None where they cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"not captured, eager times only: {error}")
        return None
    return graph


def timed(work: Callable) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Enqueue `work` between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    return start, end


def microseconds(events: tuple[torch.cuda.Event, torch.cuda.Event] | None) -> float:
    """Time between two events that have passed; NaN for none."""
    return 1e3 * events[0].elapsed_time(events[1]) if events else math.nan


def summarize(
    ways: Sequence[Way],
    times: Sequence[Times],
    bandwidth: float,
    baselines: Sequence[str],
) -> list[dict[str, object]]:
    """Return one row a way; ratios are to the baseline's replay of the same round."""
    names = ((way.group, way.baseline) for way in ways)
    found = dict(zip(names, times, strict=True))
    rows = []
    for way, seen in zip(ways, times, strict=True):
        median = statistics.median(seen.replayed)
        per_second = 1e6 * way.num_bytes / median
        rows.append(
            {
                **way.labels,
                **spread("us", seen.replayed),
                "eager_us": statistics.median(seen.eager),
                "bytes": way.num_bytes,
                "gb_per_s": per_second / 1e9,
                "share_of_copy": per_second / bandwidth,
                **{
                    f"over_{name}": over(seen, found.get((way.group, name)))
                    for name in baselines
                },
            }
        )
    return rows


def over(seen: Times, baseline: Times | None) -> float:
    """Median ratio of two ways in the same round; NaN without a baseline."""
    if baseline is None:
        return math.nan
    pairs = zip(seen.replayed, baseline.replayed, strict=True)
    return statistics.median([ours / theirs for ours, theirs in pairs])
