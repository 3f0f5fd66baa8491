"""One prepared run on a machine with a GPU: everything worth knowing, in ten minutes.

    run.py --bundle DIR --out DIR   vLLM out of a bundle, see environment.py --help
    run.py --out DIR                the vLLM and vllm-avl of this Python
    run.py --rehearse               without a GPU: the same steps, small

Each step has a time limit, and its result is written before the next one begins; one
that fails does not stop the others. OUT gets few files, flat: summary.md (the machine
and a table), steps.csv, steps.log (the end of each step's output) and the CSV rows of
the benchmarks. Exit status 1: something failed or was not started.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from runner import Outcome, Runner
from steps import Paths, make_steps

SECONDS = 535
"""Under nine minutes, whatever the steps do."""
REHEARSAL_SECONDS = 3000
"""A rehearsal shares its machine with other work."""
LOG_BYTES = 1 << 20
"""Of a step's log, the end; of a server's, behind a step that failed, a tenth."""
COLUMNS = ("step", "result", "rc", "seconds", "headline")
WORK = Path(tempfile.gettempdir()) / "vllm-avl-gpu"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the steps and print what came of them."""
    args = parse(argv)
    # The default would end this process at once and leave its step behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    paths = Paths(args.work, args.bundle, args.wheels)
    steps = make_steps(paths, args.rehearse)
    unknown = set(args.only) - {step.name for step in steps}
    if unknown:
        raise SystemExit(f"no step {unknown}: {[step.name for step in steps]}")
    if args.only:
        # The first has the code of today in the environment, too.
        steps = [steps[0], *(step for step in steps[1:] if step.name in args.only)]
    if args.list:
        for step in steps:
            print(f"{step.seconds:4.0f} s  {step.name:15} {' '.join(step.command)}")
        return
    shutil.rmtree(paths.run, ignore_errors=True)
    paths.run.mkdir(parents=True)
    report = Report(args.out, paths)
    Runner(paths.run, args.seconds, say, ended=report.add).run(steps)
    print(f"\n{report.text()}", flush=True)
    sys.exit(any(outcome.rc != 0 for outcome in report.outcomes))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; all paths become absolute."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default_out = parser.add_argument, os.environ.get("OUT", "gpu-run")
    add("--bundle", type=folder, help="folder of the pieces of vLLM's bundle")
    add("--wheels", type=folder, help="folder of more wheels, such as xformers")
    add("--out", type=Path, default=default_out, help=f"results ({default_out})")
    add("--work", type=Path, default=WORK, help=f"scratch, kept ({WORK})")
    add("--seconds", type=float, default=SECONDS, help=f"for all steps ({SECONDS})")
    add("--only", nargs="+", default=[], metavar="STEP", help="these steps")
    add("--list", action="store_true", help="print the steps, run none")
    add("--rehearse", action="store_true", help="without a GPU; takes longer")
    args = parser.parse_args(argv)
    args.out, args.work = args.out.resolve(), args.work.resolve()
    if args.rehearse and args.seconds == SECONDS:
        args.seconds = REHEARSAL_SECONDS
    return args


def folder(text: str) -> Path:
    """Read the name of a folder that is there."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return path


def say(line: str) -> None:
    """Print a line and the time, at once."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


class Report:
    """What a run leaves in a folder, complete after each step."""

    def __init__(self, out: Path, paths: Paths) -> None:
        self._out, self._paths = out, paths
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        for old in ("summary.md", "steps.csv", "steps.log"):
            (out / old).unlink(missing_ok=True)

    def add(self, outcome: Outcome, log: Path) -> None:
        """Write down one more step."""
        self.outcomes.append(outcome)
        with (self._out / "steps.log").open("ab") as together:
            for file, size in self._logs(outcome, log):
                together.write(f"\n===== {outcome.name}: {file.name}\n".encode())
                together.write(file.read_bytes()[-size:])
        for rows in sorted(self._paths.results.glob("*.csv")):
            shutil.copy(rows, self._out)
        (self._out / "summary.md").write_text(self.text())
        with (self._out / "steps.csv").open("w", newline="") as lines:
            writer = csv.writer(lines, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(map(cells, self.outcomes))

    def _logs(self, outcome: Outcome, log: Path) -> list[tuple[Path, int]]:
        """Return the step's log, and of one that failed also its servers'."""
        began = time.time() - outcome.seconds - 1
        servers = [
            (file, LOG_BYTES // 10)
            for file in sorted(self._paths.run.glob("serving-*/*/*.log"))
            if outcome.rc and file.stat().st_mtime > began
        ]
        return [(log, LOG_BYTES), *servers]

    def text(self) -> str:
        """Return the machine's line and a table of all steps."""
        table = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, self.outcomes)]
        lines = [f"| {' | '.join(map(str, row))} |" for row in table]
        return "\n".join([self._machine(), "", *lines, ""])

    def _machine(self) -> str:
        """Return what the first step said of the machine."""
        first = self.outcomes[0]
        made = first.name == "environment" and first.rc == 0
        return first.headline if made else "machine not described"


def cells(outcome: Outcome) -> list[object]:
    """Return a step's row."""
    known = asdict(outcome)
    figure = known["headline"].replace("|", "/")
    rc = "" if known["rc"] is None else known["rc"]
    return [known["name"], outcome.verdict, rc, round(known["seconds"]), figure]


if __name__ == "__main__":
    main()
