"""A soak of one server with adaptive attention: load, probes, and faults beside them.

Load is `vllm bench serve --dataset-name random-mm`, two clients, each run with other
settings, into a pool that holds two of the longest requests: some wait, some are
preempted. Meanwhile fixed greedy questions are sent every ten seconds, and in each
phase another kind of fault: clients that leave, bad requests, bad pictures, many times
what the pool holds at once, requests under one id, requests that schemathesis makes of
the server's own description. One more phase has a server whose encoder cache holds a
single picture. After each phase the server must hold no block; in the end its engine is
killed, and a fresh server must answer the same. A 5xx is sent to stock vLLM too.

The exit status is 1 if a condition does not hold; each is printed.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from tqdm import tqdm

from benchmarks.harness import CHECKPOINTS, Benchmark, Report, main
from vllm_avl.demo.server import Server, ServerError

from . import faults, names, probes, stock, target
from .aborts import Aborts
from .fuzz import REQUIREMENT, Fuzz
from .kill import kill
from .ledger import Ledger, Suspect
from .load import Load
from .probes import PROBES, Expected, Prober
from .watch import Watch

Activity = Callable[[threading.Event, Ledger], None]
ENGINE = "VLLM::EngineCore"
WORKER = "VLLM::Worker_TP1"
TENSOR_PARALLEL = (*target.AVL, "--tensor-parallel-size", "2")
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
BURST_PAUSE_SECONDS = 5
PHASES = 7
"""Of load, for a phase that has a server of its own and as much time."""
NUM_LOADS = 2
COLUMNS = (
    *("load requests", "load tokens", "probe rounds", "probes", "probes differing"),
    *("faults", "refused with the reason", "peak running", "peak waiting"),
    *("peak blocks", "preemptions", "prefix cache hits", "slowest probe"),
    *("held blocks", "resident MB", "peak resident MB"),
    *("seconds to the last client", "seconds to the end"),
)
SHOWN = (
    *("phase", "seconds", "load requests", "probes", "probes differing", "faults"),
    *("peak waiting", "preemptions", "held blocks", "resident MB", "violations"),
)


@dataclass
class Soak:
    """The phases so far."""

    args: argparse.Namespace
    progress: tqdm
    keep: Callable[[Sequence[Mapping[str, object]]], None]
    """Adds rows to the CSV file."""
    rows: list[dict[str, object]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)

    def begin(self, name: str) -> Ledger:
        """Show that a phase begins; return what it is written to."""
        self.progress.set_description(name)
        return Ledger()

    def end(self, name: str, seconds: float, ledger: Ledger) -> None:
        """Add the phase to the table and to the CSV file."""
        counts = {column: ledger.counts[column] for column in COLUMNS}
        row = {"phase": name, "seconds": round(seconds), **counts}
        self.rows.append({**row, "violations": len(ledger.violations)})
        self.keep(self.rows[-1:])
        self.suspects += ledger.suspects
        for violation in ledger.violations:
            self.violations.append(f"{name}: {violation}")
            tqdm.write(f"VIOLATED, {name}: {violation}")


def measure(args: argparse.Namespace, report: Report) -> None:
    """Soak, and print a table of the phases; exit with 1 on a violation."""
    # The default would end this process at once and leave a server behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    model = target.checkpoint(args.checkpoints)
    facts = {"minutes": args.minutes}
    total = round(60 * args.minutes)
    with tqdm(total=total, unit="s", disable=None) as progress:
        soak = Soak(args, progress, partial(report.keep, "soak", facts))
        try:
            expected = soak_one(soak, model)
            soak_small(soak, model)
            kill_one(soak, model, expected)
            vllms_own = compare_with_stock(soak, model)
        except (ServerError, httpx.HTTPError) as error:
            raise SystemExit(f"{error}\nlogs: {args.logs}") from error
    report.show(
        "Soak", facts, [{name: row[name] for name in SHOWN} for row in soak.rows]
    )
    print("\nanswered with the same 5xx by stock vLLM:")
    print("\n".join(f"- {line}" for line in vllms_own) or "- none")
    if soak.violations:
        lines = "\n".join(soak.violations)
        raise SystemExit(f"\nviolated conditions:\n{lines}\nlogs: {args.logs}")
    print("\nall conditions hold")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--minutes", type=float, default=15, help="of load, all phases together")
    add("--load-requests", type=int, default=20, help="of one run of a load client")
    add("--fuzz-seconds", type=int, default=120, help="of schemathesis")
    add("--fuzz-examples", type=int, default=50, help="of each of its operations")
    add("--schemathesis", type=Path, help="program; found unless given")
    add("--no-fuzz", action="store_true", help="without schemathesis")
    add("--start-seconds", type=float, default=1200, help="a server may take to start")
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the models")
    add("--logs", type=Path, default=CHECKPOINTS / "soak-logs", help="folder, kept")


def check(args: argparse.Namespace) -> None:
    """Find schemathesis, unless it is not wanted."""
    if args.minutes <= 0:
        raise ValueError(f"--minutes {args.minutes} must be above 0")
    if not args.no_fuzz:
        beside = Path(sys.executable).with_name("schemathesis")
        found = args.schemathesis or shutil.which("schemathesis") or beside
        args.schemathesis = Path(found).absolute()
        if not args.schemathesis.exists():
            raise ValueError(
                f"--schemathesis {args.schemathesis} is not there: "
                f"pip install {REQUIREMENT}, or say --no-fuzz"
            )


def soak_one(soak: Soak, model: Path) -> Expected:
    """Soak one server through all phases, then kill its engine; return its answers."""
    args = soak.args
    log = args.logs / "server.log"
    with (
        target.start(model, log, args.start_seconds) as server,
        target.told_if_it_ends(server),
        ExitStack() as clients,
    ):
        began = [process.pid for process in target.processes(server)]
        ledger, start = soak.begin("idle"), time.monotonic()
        with Watch(server) as watch:
            expected = probes.learn(server, ledger)
        settle(soak, "idle", server, ledger, watch, start)
        loads = [
            clients.enter_context(
                Load(server.url, server.model, args.logs, index, args.load_requests)
            )
            for index in range(NUM_LOADS)
        ]
        for load in loads:
            load.wait()
        phases = plan(args, server, expected, loads)
        for name, activities in phases.items():
            run_phase(soak, name, server, expected, activities, len(phases))
        if not args.no_fuzz:
            numbers = (args.fuzz_examples, args.fuzz_seconds)
            fuzz = Fuzz(server, args.schemathesis, args.logs / "fuzz", *numbers)
            run_phase(soak, "schemathesis", server, expected, [fuzz], None)
        check_after_all(soak, server, expected, began)
        ledger, start = soak.begin("engine killed"), time.monotonic()
        kill(server, ENGINE, ledger)
        soak.end("engine killed", time.monotonic() - start, ledger)
    return expected


def soak_small(soak: Soak, model: Path) -> None:
    """Soak a server whose encoder cache holds one picture; quick runs leave it out.

    It computes prompts in other chunks, so its answers are its own.
    """
    args = soak.args
    if args.quick:
        return
    log = args.logs / "small.log"
    with (
        target.start(model, log, args.start_seconds, target.SMALL) as server,
        target.told_if_it_ends(server),
    ):
        ledger, start = soak.begin("idle, small"), time.monotonic()
        with Watch(server) as watch:
            expected = probes.learn(server, ledger)
        settle(soak, "idle, small", server, ledger, watch, start)
        named = names.Names(server, expected, names.learn(server))
        late = faults.Faults(server, list(faults.refused_late(server)), 0)
        activities = [named, late, bursts_of(server, expected)]
        run_phase(soak, "small encoder cache", server, expected, activities, PHASES)


def check_after_all(
    soak: Soak, server: Server, expected: Expected, began: Sequence[int]
) -> None:
    """Ask once more, idle; `began` are the ids of the processes at the start."""
    ledger, start = soak.begin("after all"), time.monotonic()
    with Watch(server) as watch:
        for probe in PROBES:
            probes.compare(server, probe, expected, ledger)
    ledger.check(
        [process.pid for process in target.processes(server)] == began,
        "0 server restarts: the processes are those of the start",
    )
    for name in ("peak waiting", "preemptions", "prefix cache hits"):
        ledger.check(
            any(row[name] for row in soak.rows), f"{name} is above 0 in some phase"
        )
    settle(soak, "after all", server, ledger, watch, start)


def bursts_of(server: Server, expected: Expected) -> Activity:
    """Return what sends bursts until it is told to stop."""

    def bursts(stop: threading.Event, ledger: Ledger) -> None:
        while not stop.is_set():
            probes.burst(server, expected, ledger)
            stop.wait(BURST_PAUSE_SECONDS)

    return bursts


def plan(
    args: argparse.Namespace, server: Server, expected: Expected, load: Sequence[Load]
) -> Mapping[str, Sequence[Activity]]:
    """Return the phases of load, and what goes on in each beside the probes."""
    named = names.Names(server, expected, names.learn(server))
    kinds: dict[str, list[Activity]] = {
        "load": [],
        "one name for all": [named],
        "clients that leave": [Aborts(server, seed) for seed in range(2)],
        "bad requests": [faults.Faults(server, list(faults.bad_requests(server)), 0)],
        "bad pictures": [faults.Faults(server, list(faults.bad_pictures(server)), 0)],
        "full pool": [bursts_of(server, expected)],
    }
    everything = [activity for kind in kinds.values() for activity in kind]
    phases = {name: [*load, *kind] for name, kind in kinds.items()}
    together = {"all at once": [*load, *everything]}
    return together if args.quick else phases | together


def run_phase(
    soak: Soak,
    name: str,
    server: Server,
    expected: Expected,
    activities: Sequence[Activity],
    phases: int | None,
) -> None:
    """Let all activities run side by side for their part of the time, then settle.

    `phases` share the time of the soak; without them the activities end by themselves.
    """
    ledger, start = soak.begin(name), time.monotonic()
    stop = threading.Event()
    limit = None if phases is None else start + 60 * soak.args.minutes / phases
    with (
        Watch(server) as watch,
        Prober(server, expected, ledger),
        ThreadPoolExecutor(len(activities)) as pool,
    ):
        running = [pool.submit(activity, stop, ledger) for activity in activities]
        try:
            while any(not one.done() for one in running):
                wait(running, timeout=1)
                if limit is not None and not stop.is_set():
                    soak.progress.update()
                    if time.monotonic() > limit:
                        stop.set()
        finally:
            stop.set()
    for one in running:
        one.result()
    settle(soak, name, server, ledger, watch, start)


def settle(
    soak: Soak, name: str, server: Server, ledger: Ledger, watch: Watch, start: float
) -> None:
    """Wait until the server is idle: nothing may be held then; add the phase."""
    seconds = time.monotonic() - start
    held, left = target.drained(server)
    ledger.check(left == 0, f"all requests end: {left:g} are left")
    ledger.check(held == 0, f"no block is leaked: {held} are held")
    ledger.check(server.is_healthy(), "the server is healthy")
    ledger.counts.update(watch.seen)
    ledger.counts["held blocks"] = held
    soak.end(name, seconds, ledger)


def kill_one(soak: Soak, model: Path, expected: Expected) -> None:
    """Start a fresh server, which must answer the same; kill a worker of two."""
    args = soak.args
    ledger, start = soak.begin("restarted"), time.monotonic()
    with target.start(model, args.logs / "restarted.log", args.start_seconds) as server:
        for probe in PROBES:
            probes.compare(server, probe, expected, ledger)
        soak.end("restarted", time.monotonic() - start, ledger)
    if args.quick:
        return
    ledger, start = soak.begin("worker killed"), time.monotonic()
    log = args.logs / "tensor-parallel.log"
    with target.start(
        model, log, args.start_seconds, TENSOR_PARALLEL, TWO_WORKERS
    ) as server:
        kill(server, WORKER, ledger)
    soak.end("worker killed", time.monotonic() - start, ledger)


def compare_with_stock(soak: Soak, model: Path) -> list[str]:
    """Send each 5xx to stock vLLM too; return those that it answers alike."""
    if not soak.suspects:
        return []
    args = soak.args
    ledger, start = soak.begin("5xx, to stock"), time.monotonic()
    with target.start(
        model, args.logs / "stock.log", args.start_seconds, options=()
    ) as server:
        same = stock.compare(server, soak.suspects, ledger)
    soak.end("5xx, to stock", time.monotonic() - start, ledger)
    return same


QUICK = {"minutes": 0.5, "load_requests": 8, "fuzz_seconds": 15, "fuzz_examples": 2}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, check)

if __name__ == "__main__":
    main(BENCHMARK)
