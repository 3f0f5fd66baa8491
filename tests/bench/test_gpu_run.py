"""The prepared run on a GPU: limits, isolation, what it leaves, its command lines."""

import csv
import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.report import append_rows

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GPU = BENCHMARKS / "gpu"
# Ignores that it is asked to stop, and has left a process in a session of its own.
HANGS = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
left = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("started", os.getpid(), left.pid, flush=True)
time.sleep(600)
"""
LEAVES = """
import subprocess
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)
"""
# A run of steps that a test names, by the code of run.py.
RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import run, runner
runner.STOP_SECONDS, runner.LEAST_SECONDS = 0.5, 0.3
said = json.loads(sys.argv[2])
run.make_steps = lambda paths, rehearse: [
    runner.Step(name, command, seconds, lambda log, line=line: log.splitlines()[line])
    for name, command, seconds, line in said
]
run.main(sys.argv[3:])
"""


def python(code):
    return [sys.executable, "-c", code]


def command(tmp_path, steps, *options):
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    return [*python(RUN), str(GPU), json.dumps(steps), *folders, *options]


def run(tmp_path, steps, *options):
    done = subprocess.run(
        command(tmp_path, steps, *options), capture_output=True, text=True, timeout=100
    )
    with (tmp_path / "out" / "steps.csv").open(newline="") as lines:
        rows = {row["step"]: row for row in csv.DictReader(lines)}
    return done, rows


def is_gone(pid):
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "\nState:\tZ" in status.read_text()


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    steps = [
        ("fails", python("print('why'); raise SystemExit(3)"), 20, 0),
        ("hangs", python(HANGS), 1.5, 0),
        ("is-not-there", ["/no/such/program"], 20, 0),
        ("leaves", python(LEAVES), 20, 0),
        ("has-no-figure", python("print('one line')"), 20, 5),
        ("works", python("print('42 of 42')"), 20, 0),
    ]
    done, rows = run(tmp_path, steps)
    assert done.returncode == 1
    results = {name: (row["result"], row["rc"]) for name, row in rows.items()}
    assert results == {
        "fails": ("failed", "3"),
        "hangs": ("timed out", "124"),
        "is-not-there": ("failed", "127"),
        "leaves": ("ok", "0"),
        "has-no-figure": ("ok", "0"),
        "works": ("ok", "0"),
    }
    assert rows["works"]["headline"] == "42 of 42"
    assert rows["has-no-figure"]["headline"].startswith("no figure (IndexError")
    _, *hanging = rows["hangs"]["headline"].split()
    for pid in (*hanging, rows["leaves"]["headline"]):
        assert is_gone(pid)
    log = (tmp_path / "out" / "steps.log").read_text()
    assert "===== fails: 01-fails.log\nwhy\n" in log
    assert re.search(r"\[1/6\] fails: failed, \d+ s: why\n", done.stdout)
    assert "[2/6] hangs: up to 2 s; " in done.stdout
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert summary in done.stdout
    assert re.search(r"\| works \| ok \| 0 \| \d+ \| 42 of 42 \|\n", summary)


def test_no_step_begins_when_time_is_over(tmp_path):
    steps = [
        (
            "long",
            python("import time; print('began', flush=True); time.sleep(60)"),
            50,
            0,
        ),
        ("not-asked-for", python("print('never')"), 50, 0),
        ("late", python("print('too late')"), 50, 0),
    ]
    started = time.monotonic()
    only = ("--only", "late")  # and what makes the environment: the first
    done, rows = run(tmp_path, steps, "--seconds", "2.5", *only)
    assert time.monotonic() - started < 30
    assert done.returncode == 1
    assert list(rows) == ["long", "late"]
    assert rows["long"]["result"] == "timed out"
    assert rows["late"] == {
        "step": "late",
        "result": "not started",
        "rc": "",
        "seconds": "0",
        "headline": "no time was left",
    }


def test_results_are_there_at_once_and_a_stopped_run_leaves_nothing(tmp_path):
    steps = [("first", python("print('done')"), 20, 0), ("hangs", python(HANGS), 60, 0)]
    process = subprocess.Popen(command(tmp_path, steps), stdout=subprocess.DEVNULL)
    log = tmp_path / "work" / "run" / "02-hangs.log"
    end = time.monotonic() + 60
    while not (log.exists() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    assert "| first | ok | 0 |" in (tmp_path / "out" / "summary.md").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    for pid in log.read_text().split()[1:]:
        assert is_gone(pid)


@pytest.fixture
def module(monkeypatch):
    """Import of a module of the prepared run, whose scripts lie beside each other."""
    monkeypatch.syspath_prepend(str(GPU))
    return importlib.import_module


def test_an_environment_out_of_a_bundle(tmp_path):
    bundle, wheels = tmp_path / "bundle", tmp_path / "wheels"
    for folder in (bundle, wheels, tmp_path / "site" / "vllm"):
        folder.mkdir(parents=True)
    # It must come before this Python's own; nothing here is imported but this.
    (tmp_path / "site" / "vllm" / "__init__.py").write_text("where = 'bundle'\n")
    pack(tmp_path / "site", bundle)
    with zipfile.ZipFile(wheels / "more-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("more_of_it.py", "where = 'wheel'\n")
    made = tmp_path / "made"
    script = [sys.executable, str(GPU / "environment.py"), str(made)]
    options = ["--bundle", str(bundle), "--wheels", str(wheels)]
    done = subprocess.run([*script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout.splitlines()[-1])
    assert described["gpu"]
    assert described["vllm-avl"] == "0.1.0"
    seen = look(made / "bin" / "python", tmp_path)
    assert seen == {
        "vllm": str(made / "bundle" / "vllm" / "__init__.py"),
        "more_of_it": str(made / "wheels" / "more_of_it.py"),
        "vllm_avl.kernels": str(site(made) / "vllm_avl" / "kernels" / "__init__.py"),
        "kernels": None,
        "plugins": ["vllm_avl.plugin:register"],
    }
    assert os.access(made / "bin" / "vllm", os.X_OK)
    (bundle / "it.tar.xz.01").write_bytes(b"another")
    done = subprocess.run(
        [*script[:2], str(tmp_path / "other"), "--bundle", str(bundle)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "it.tar.xz.01 is not what SHA256SUMS says" in done.stderr


def pack(folder, bundle):
    """Write a folder as a bundle of two pieces."""
    whole = bundle.parent / "it.tar.xz"
    with tarfile.open(whole, "w:xz") as archive:
        archive.add(folder, ".")
    content = whole.read_bytes()
    lines = []
    for index, piece in enumerate((content[:100], content[100:])):
        name = f"it.tar.xz.{index:02}"
        (bundle / name).write_bytes(piece)
        lines.append(f"{hashlib.sha256(piece).hexdigest()}  {name}\n")
    (bundle / "SHA256SUMS").write_text("".join(lines))


def site(environment):
    (found,) = environment.glob("lib/python3.*/site-packages")
    return found


def look(interpreter, folder):
    """Return where an environment finds packages, and its plug-ins of ours."""
    code = """
import importlib.metadata, importlib.util, json, sys
sys.modules["vllm_avl"] = importlib.util.module_from_spec(
    importlib.util.find_spec("vllm_avl"))
found = {}
for name in ("vllm", "more_of_it", "vllm_avl.kernels", "kernels"):
    spec = importlib.util.find_spec(name)
    found[name] = spec and spec.origin
points = importlib.metadata.entry_points(group="vllm.general_plugins", name="avl")
found["plugins"] = [point.value for point in points]
print(json.dumps(found))
"""
    output = subprocess.check_output([interpreter, "-c", code], text=True, cwd=folder)
    return json.loads(output)


def test_command_lines_are_ones_that_the_scripts_take(module, tmp_path):
    steps = module("steps")
    (tmp_path / "gpu_checks.py").touch()
    paths = steps.Paths(tmp_path, bundle=tmp_path)
    for rehearse in (False, True):
        listed = steps.make_steps(paths, rehearse)
        for step in listed:
            script, *options = step.command[1:]
            if script == "-m":
                script = next(word for word in options if "tests" in word)
            assert Path(script).exists()
            name = Path(script).stem
            if name in ("serving", "attention", "compaction"):
                folder = "" if name == "serving" else "kernels."
                module = importlib.import_module(f"benchmarks.{folder}{name}")
                module.BENCHMARK.parse(options)
    assert [step.name for step in steps.make_steps(paths, False)] == [
        *("environment", "smoke", "kernels", "engine", "attention", "compaction"),
        *("decode", "pool", "attention-gqa", "vllm-kernels"),
    ]


def test_help_and_list():
    def output(*options):
        return subprocess.check_output([str(GPU / "run.sh"), *options], text=True)

    assert "--rehearse" in output("--help")
    assert output("--list").splitlines()[1].split()[:3] == ["75", "s", "smoke"]


def test_headlines_of_logs(module):
    headlines = module("headlines")
    log = "..F\nFAILED tests/a.py::b - assert 1\n== 1 failed, 2 passed in 3.21s ==\n"
    said = "1 failed, 2 passed in 3.21s; FAILED tests/a.py::b - assert 1"
    assert headlines.tests(log) == said
    assert headlines.tests("19 tests collected in 0.1s\n") == (
        "19 tests collected in 0.1s"
    )
    log = "[gw3] [ 7%] PASSED a::b\n[gw1] [ 15%] FAILED a::c\n"
    assert headlines.tests(log) == (
        "no end: 1 passed, 1 failed by then; [gw1] [ 15%] FAILED a::c"
    )
    assert headlines.checks("ok    a\nFAIL  b: E\nok    c\n") == "2 ok; FAIL  b: E"
    assert headlines.last_words("a\nb\n") == "b"
    found = {"gpu": "NVIDIA H200", "torch": "2.11"}
    assert (
        headlines.machine(f"x\n{json.dumps(found)}\n") == "gpu NVIDIA H200, torch 2.11"
    )


def test_headlines_of_rows(module, tmp_path):
    rows = module("headlines").Rows(tmp_path)
    ours = {
        **{"num_heads": 32, "num_kv_heads": 32, "batch": 32, "reads": "core"},
        **{"way": "ours", "choice": "best default", "share_of_copy": 0.84},
        **{"over_TRITON_ATTN_full": 0.4, "over_FLASH_ATTN_full": 0.5, "us": 90.0},
    }
    others = [
        {"choice": ""},
        {"num_heads": 28},
        {"reads": "tail", "us": 100.0},
        {"reads": "tail", "us": 96.0, "way": "xformers"},
    ]
    attention = [ours, *(ours | other for other in others)]
    append_rows(tmp_path / "kernels_attention.csv", attention)
    assert rows.attention(32) == (
        "32/32 heads, batch 32: core 2.50 x TRITON_ATTN's full (to be 2.5), "
        "2.00 x FLASH_ATTN's (2), 84% of a copy's bandwidth (80 %), "
        "tail 0.96 x xformers' (1)"
    )
    assert "xformers" not in rows.attention(28)
    heads = {"num_heads": 32, "num_kv_heads": 32}
    ends = [
        ("prefill", "flash", 1.0),
        ("vision_scores", "w=1", 9.0),
        ("vision_scores", "w=32", 0.25),
        ("copy_rows", "5 rows, private", 0.5),
        ("copy_rows", "5 rows, in place", 9.0),
        ("select_core", "5 stored", 9.0),
    ]
    names = ("operation", "way", "over_prefill")
    compaction = [heads | dict(zip(names, end, strict=True)) for end in ends]
    append_rows(tmp_path / "kernels_compaction.csv", compaction)
    assert rows.compaction().endswith("attention: 32/32 heads 0.75")
    stock = {
        **{"measurement": "latency", "variant": "stock", "concurrency": 32},
        **{"tpot_ratio": 1.0, "tpot_ms": 20.0, "itl_ms": 16.0},
        **{"tokens_ratio": 1.0, "tokens_per_s": 500.0},
    }
    avl = stock | {"variant": "S=0.5", "tpot_ratio": 0.6, "itl_ms": 8.0}
    pool = [x | {"measurement": "throughput"} for x in (stock, avl)]
    append_rows(tmp_path / "serving.csv", [stock, avl, *pool])
    assert rows.decode() == (
        "S=0.5, 32 at once: TPOT 0.6 of stock's 20 ms, ITL 0.50 (to be at most 0.6)"
    )
    assert rows.pool().startswith("S=0.5: 1 of stock's 500 tokens/s")
