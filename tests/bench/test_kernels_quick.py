"""The kernel benchmarks check results without a GPU, and time nothing there."""

import csv
import importlib
import inspect
import math
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
import torch

from benchmarks.harness import main
from benchmarks.testing.interpreted import interpreted

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
SCRIPTS = ["selected_matmul", "attention", "compaction"]
SHORT = {
    "selected_matmul": [],
    "attention": ["--shapes", "gqa"],
    "compaction": ["--shapes", "gqa"],
}
SMALL = {
    "selected_matmul": ["--batches", "1", "2", "--vision-tokens", "40"],
    "attention": ["--batches", "1", "2", "--splits", "1", "2", "--vision-tokens", "70"],
    "compaction": ["--tokens", "70", "--windows", "2"],
}
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="is about machines without a GPU"
)


@pytest.fixture
def module():
    """Import of a kernel benchmark's module."""
    return lambda name: importlib.import_module(f"benchmarks.kernels.{name}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    command = [sys.executable, str(KERNELS / f"{script}.py"), "--help"]
    result = preloaded.run(command, 100)
    assert result.returncode == 0
    assert "--interpret" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_interpreted_results_are_checked_and_not_timed(
    script, module, tmp_path, capsys
):
    options = ["--interpret", "--quick", "--results", str(tmp_path)]
    main(module(script).BENCHMARK, [*options, *SHORT[script]])
    output = capsys.readouterr().out
    assert "checked ours" in output or "checked copy_rows, in place" in output
    assert output.endswith("interpreted: no times\n")
    assert not list(tmp_path.iterdir())


@without_gpu
@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_measured_without_a_gpu(script, module, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(module(script).BENCHMARK, ["--quick", "--results", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().out == "no CUDA device: nothing was measured\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_measured_rows_are_written(script, module, tmp_path, monkeypatch, capsys):
    chosen = module(script)
    time_without_gpu(module, monkeypatch)
    if script != "selected_matmul":
        monkeypatch.setattr(chosen, "SHAPES", module("paged").TINY)
    sizes = ["--dtype", "float32", "--results", str(tmp_path), *SHORT[script]]
    if script == "selected_matmul":
        sizes += ["--num-heads", "2", "--head-size", "32"]
    main(chosen.BENCHMARK, [*sizes, *SMALL[script]])
    with (tmp_path / f"kernels_{script}.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {"us", "us_p10", "us_p90", "eager_us", "share_of_copy"} <= set(rows[0])
    assert all(row["gpu"] == "none" for row in rows)
    assert (tmp_path / f"kernels_{script}.png").exists() == (script != "compaction")
    check_rows(script, rows)
    assert "| us_p90 " in capsys.readouterr().out


def check_rows(script, rows):
    if script == "selected_matmul":
        # Every way a batch, a fraction and a part; the first way of a case takes 1 us.
        assert len(rows) == 2 * 2 * 3 * 3
        both = [float(r["over_full matmul"]) for r in rows if r["part"] == "both"]
        assert both[:3] == pytest.approx([1, 8 / 7, 9 / 7], rel=1e-3)
    elif script == "attention":
        assert {row["reads"] for row in rows} == {"core", "refresh", "tail", "full"}
        ours = [r for r in rows if (r["way"], r["reads"]) == ("ours", "core")]
        assert [row["choice"].split(" ")[0] for row in ours[::2]] == ["best"] * 2
        assert {row["over_xformers_full"] for row in rows} == {"nan"}
    else:
        assert [row["operation"] for row in rows][1:] == [
            "vision_scores",
            "rank_rows",
            "copy_rows",
            "copy_rows",
            "select_core",
        ]
        assert [row["over_prefill"] for row in rows] == [*"123456"]


def time_without_gpu(module, monkeypatch):
    """Let the n-th way of a case take n microseconds."""
    timing, harness = module("timing"), module("harness")

    def measure(ways, rounds):
        return [timing.Times([n + 1.0] * 3, [n + 9.0]) for n in range(len(ways))]

    @contextmanager
    def runnable(args, modules):
        with interpreted(*modules):
            yield torch.device("cpu")

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(harness, "kernels_runnable", runnable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")


def test_nothing_is_timed_when_ours_is_wrong(module, monkeypatch):
    script = module("selected_matmul")

    def wrong(weights, value, indices):
        return weights.new_zeros(*weights.shape[:3], value.shape[3])

    monkeypatch.setattr(script.operators, "select_rows_matmul", wrong)
    with pytest.raises(SystemExit, match="ours: .* nothing was timed"):
        main(script.BENCHMARK, ["--interpret"])


@pytest.mark.parametrize("is_wrong", [False, True])
def test_baselines_are_called_as_vllm_calls_them(module, monkeypatch, capsys, is_wrong):
    from vllm import triton_utils

    # What vLLM imports while Triton is said to be there would go on believing it.
    from vllm.v1.attention.backends import triton_attn  # noqa: F401
    from vllm.v1.attention.ops import triton_unified_attention

    real = inspect.signature(triton_unified_attention.unified_attention)

    def unified_attention(**arguments):
        real.bind(**arguments)
        paged_attention(**arguments, is_wrong=is_wrong)

    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(
        triton_unified_attention, "unified_attention", unified_attention
    )
    flash = SimpleNamespace(
        flash_attn_varlen_func=paged_attention, is_fa_version_supported=lambda _: True
    )
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", flash)
    options = ["--interpret", "--shapes", "gqa", "--splits", "1"]
    main(module("attention").BENCHMARK, options)
    output = capsys.readouterr().out
    for reads in ("tail", "full"):
        assert f"checked FLASH_ATTN {reads}: error" in output
        assert (f"checked TRITON_ATTN {reads}: error" in output) != is_wrong
        assert (f"not measured: {reads} TRITON_ATTN: " in output) == is_wrong


def paged_attention(
    q,
    k,
    v,
    out,
    block_table,
    seqused_k,
    max_seqlen_k,
    softmax_scale,
    is_wrong=False,
    **rest,
):
    """What both kernels compute, of [num_blocks, block_size, num_kv_heads, size]."""
    assert k.shape[:3] == v.shape[:3]
    group = q.shape[1] // k.shape[2]
    for request, blocks in enumerate(block_table.long()):
        length = int(seqused_k[request]) - is_wrong
        assert length <= max_seqlen_k
        keys, values = (x[blocks].flatten(0, 1)[:length] for x in (k, v))
        for head, query in enumerate(q[request]):
            weights = (keys[:, head // group] @ query * softmax_scale).softmax(0)
            out[request, head] = weights @ values[:, head // group]


class FakeGPU:
    """Calls advance its clock, in milliseconds; a graph takes what its calls took."""

    def __init__(self, monkeypatch):
        self.clock, self.capturing = 0, False
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "CUDAGraph": SimpleNamespace,
            "graph": self.capture,
            "Event": self.event,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": nullcontext,
            "synchronize": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self, milliseconds):
        self.clock += milliseconds

    @contextmanager
    def capture(self, graph):
        start, self.capturing = self.clock, True
        try:
            yield
        finally:
            self.capturing = False
        graph.replay = partial(self.run, self.clock - start)

    def event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "time", self.clock)
        event.elapsed_time = lambda end: end.time - event.time
        return event


def test_ways_take_turns_on_all_copies(module, monkeypatch):
    timing, ways = module("timing"), module("ways")
    gpu, seen = FakeGPU(monkeypatch), []

    def call(copy):
        seen.append(copy)
        gpu.run(copy)

    pair = [
        ways.Way({"way": "a"}, ways.on_copies(call, [1, 2, 3]), 1, baseline="a"),
        ways.Way({"way": "b"}, ways.on_copies(call, [4]), 8),
    ]
    times = timing.measure(pair, rounds=6)
    assert [way.replayed for way in times] == [[2e3] * 6, [4e3] * 6]
    assert [way.eager for way in times] == [[2e3] * 2, [4e3] * 2]
    # 21 calls of three copies: to warm up, in the graph, and in two eager rounds.
    assert seen.count(1) == seen.count(2) == seen.count(3) == 7 * 4
    rows = timing.summarize(pair, times, bandwidth=4e3, baselines=("a", "z"))
    assert [row["over_a"] for row in rows] == [1, 2]
    assert math.isnan(rows[0]["over_z"])
    # Eight bytes in 4000 microseconds are 2000 a second.
    assert rows[1]["share_of_copy"] == 0.5


def test_what_no_graph_can_hold_has_eager_times_only(module, monkeypatch, capsys):
    timing, ways = module("timing"), module("ways")
    gpu = FakeGPU(monkeypatch)

    def call():
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        gpu.run(5)

    (times,) = timing.measure([ways.Way({"way": "a"}, [call], 1)], rounds=1)
    assert math.isnan(times.replayed[0])
    assert times.eager == [5e3]
    assert "not captured" in capsys.readouterr().out
