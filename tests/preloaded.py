"""Starts Python programs from a process that has imported vLLM already.

Of `vllm serve`, server, engine and worker each import vLLM, one after the other: most
of what a test would wait for. Here all of them, and scripts, are forks of one process
that has imported it and has done nothing else.
What they run is what their command line says; tests/e2e/test_demo.py does without.
"""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import context, forkserver, resource_tracker
from pathlib import Path
from typing import Any

import garbage
import prometheus_client.values
import setproctitle

from vllm_avl.demo import server

IMPORTED = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)


class Process(context.ForkServerProcess):
    """A fork that takes over what a process that its parent spawned would have."""

    def __getstate__(self) -> dict[str, Any]:
        inherited = Surroundings(dict(os.environ), os.getpgid(0), Output(1), Output(2))
        return self.__dict__ | {"inherited": inherited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state.pop("inherited").enter()
        self.__dict__.update(state)


class Context(context.ForkServerContext):
    """What programs that ask for `spawn` get."""

    Process = Process


class Output:
    """A file descriptor that goes to the new process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __getstate__(self) -> Any:
        return context.reduction.DupFd(self.number)

    def __setstate__(self, duplicate: Any) -> None:
        self.number = duplicate.detach()


@dataclass(frozen=True)
class Surroundings:
    """What the new process shares with the one that asked for it; 0 is a new group."""

    environment: Mapping[str, str]
    group: int
    out: Output
    errors: Output

    def enter(self) -> None:
        # It finds the place of a title by the environment as it was at first.
        setproctitle.getproctitle()
        garbage.keep_modules_out()
        os.setpgid(0, self.group)
        os.dup2(self.out.number, 1)
        os.dup2(self.errors.number, 2)
        os.environ.clear()
        os.environ.update(self.environment)
        _read_environment()
        _fork_for_spawn()


def _read_environment() -> None:
    """Do over what was done by the environment while it was imported."""
    prometheus_client.values.ValueClass = prometheus_client.values.get_value_class()
    level = os.environ.get("VLLM_LOGGING_LEVEL", "INFO")
    logger = logging.getLogger("vllm")
    for item in (logger, *logger.handlers):
        item.setLevel(level)


def _fork_for_spawn() -> None:
    """Let the process that has imported vLLM serve those who ask for `spawn`, too."""
    by_name = multiprocessing.get_context
    # Its descriptors were handed down; without this, a second one would be started.
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running

    def get_context(method: str | None = None) -> Any:
        return Context() if method == "spawn" else by_name(method)

    multiprocessing.get_context = get_context


class Program:
    """A running program, with what is used of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], process: context.ForkServerProcess) -> None:
        self.args = args
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode


def start(args: Sequence[str], environment: Mapping[str, str], output: int) -> Program:
    """Start `vllm serve ...`, leader of a process group, its output to a descriptor."""
    program, *options = args
    assert Path(program).name == "vllm"
    return _start(_serve, options, environment, output, output)


serve = functools.partial(server.serve, start=start)
"""`vllm_avl.demo.server.serve`, sooner."""


def run(
    command: Sequence[str | Path], timeout: float, environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run `python` with a script, `-m module` or `-c code` to its end.

    Args:
        command: what to run, and with what arguments.
        timeout: seconds.
        environment: added to this process's.
    """
    program, *options = map(str, command)
    assert program == sys.executable
    variables = os.environ | environment
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = _start(_python, options, variables, out.fileno(), errors.fileno())
        try:
            code = process.wait(timeout)
        finally:
            process.terminate()
        texts = [(file.seek(0), file.read())[1] for file in (out, errors)]
    return subprocess.CompletedProcess(command, code, *texts)


def _start(
    what: Callable[[Sequence[str]], None],
    options: Sequence[str],
    environment: Mapping[str, str],
    out: int,
    errors: int,
) -> Program:
    _ensure_imported()
    surroundings = Surroundings(dict(environment), 0, Output(out), Output(errors))
    process = context.ForkServerProcess(
        target=_main, args=(surroundings, what, options)
    )
    process.start()
    return Program(options, process)


def _ensure_imported() -> None:
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    forkserver.ensure_running()


def _main(
    surroundings: Surroundings,
    what: Callable[[Sequence[str]], None],
    options: Sequence[str],
) -> None:
    surroundings.enter()
    try:
        what(options)
    finally:
        atexit._run_exitfuncs()


def _serve(options: Sequence[str]) -> None:
    from vllm.entrypoints.cli.main import main

    sys.argv = [str(Path(sys.executable).with_name("vllm")), *options]
    main()


def _python(options: Sequence[str]) -> None:
    if options[0] == "-m":
        sys.argv = list(options[1:])
        runpy.run_module(options[1], run_name="__main__", alter_sys=True)
    elif options[0] == "-c":
        sys.argv = ["-c", *options[2:]]
        exec(compile(options[1], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(options)
        sys.path.insert(0, str(Path(options[0]).parent))
        runpy.run_path(options[0], run_name="__main__")
