"""Runs a real `vllm serve` beside this process and stops all of it afterwards."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import openai
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

HOST = "127.0.0.1"
POLL_SECONDS = 0.2
REPORT_SECONDS = 10.0
STOP_SECONDS = 10.0
TAIL_LINES = 25
IMPORTS = (
    "its front end imports vLLM",
    "its engine imports vLLM",
    "its worker imports vLLM",
)
"""What it does first, process by process, without a word about it."""
SAID = re.compile(r"^\(\w+ pid=\d+\) [A-Z]+ \S+ \S+ \[\S+\] (.*)$", re.MULTILINE)
MOST_SAID = 70
# A connection for each request: vLLM closes one after an error, just when the next
# request would go into it.
LIMITS = httpx.Limits(max_keepalive_connections=0)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
# For models so small that threads only wait for each other, and for several servers
# on one machine: vLLM would pin each of them to the same core.
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
# What a test process sets for engines of its own must not reach the server.
NOT_INHERITED = ("VLLM_ENABLE_V1_MULTIPROCESSING",)


class ServerError(RuntimeError):
    """The server ended, or was not ready in time; holds the end of its log."""


class Process(Protocol):
    """What is used of `subprocess.Popen`."""

    @property
    def args(self) -> Any:
        """Its command line."""

    @property
    def pid(self) -> int:
        """Its number, and its process group's."""

    def poll(self) -> int | None:
        """Return its exit status, None while it runs."""

    def terminate(self) -> None:
        """Ask it to end."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; return its exit status."""


Start = Callable[[Sequence[str], Mapping[str, str], int], Process]


@dataclass(frozen=True)
class Metrics:
    """What the server reported at one moment."""

    samples: Sequence[Sample]

    def total(self, name: str) -> float:
        """Return a metric, summed over its label sets."""
        return sum(sample.value for sample in self.samples if sample.name == name)

    @property
    def num_blocks(self) -> int:
        """Blocks that requests can hold: all but the null block."""
        return int(self._cache_config["num_gpu_blocks"]) - 1

    @property
    def block_size(self) -> int:
        """Tokens that a block holds."""
        return int(self._cache_config["block_size"])

    @property
    def held_blocks(self) -> int:
        """Blocks that requests held at the end of the last step."""
        return round(self.total("vllm:kv_cache_usage_perc") * self.num_blocks)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated since the start, by all requests."""
        return int(self.total("vllm:generation_tokens_total"))

    @property
    def _cache_config(self) -> dict[str, str]:
        name = "vllm:cache_config_info"
        (labels,) = [s.labels for s in self.samples if s.name == name]
        return labels


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    model: str
    port: int
    log: Path
    process: Process
    http: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=120.0, limits=LIMITS)
    )
    """One for all requests: making one takes longer than a token."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def client(self) -> openai.OpenAI:
        """Return an OpenAI client that tries once."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            return self.http.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def metrics(self) -> Metrics:
        """Read /metrics."""
        text = self.http.get(f"{self.url}/metrics").raise_for_status().text
        return Metrics(
            [
                sample
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            ]
        )

    def metric(self, name: str) -> float:
        """Read one metric, summed over its label sets."""
        return self.metrics().total(name)

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return _tail(self.log)


def _start(
    command: Sequence[str], environment: Mapping[str, str], output: int
) -> Process:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


@contextmanager
def serve(
    model: Path | str,
    options: Sequence[str],
    *,
    log: Path,
    port: int | None = None,
    timeout: float = 300.0,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] = lambda line: None,
    start: Start = _start,
) -> Iterator[Server]:
    """Start `vllm serve`, yield it when it is healthy, stop all of its processes.

    Args:
        model: checkpoint folder or name.
        options: further arguments of `vllm serve`.
        log: file for its output, replaced.
        port: on the loopback interface; a free one by default.
        timeout: seconds until it must be healthy.
        environment: added to `ENVIRONMENT`.
        report: takes a line every few seconds while waiting.
        start: starts it, leader of a process group, from its command line, its
            environment and the descriptor of its log.

    Raises:
        ServerError: it ended early or took too long.
    """
    port = port or free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = start(
            _command(str(model), port, options),
            _environment(environment or {}),
            output.fileno(),
        )
    server = Server(str(model), port, log, process)
    try:
        _wait(server, timeout, report)
        yield server
    finally:
        server.http.close()
        _stop(process)


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def picture_url(picture: Image.Image) -> str:
    """Return the picture as a base64 data URL."""
    return data_url(png(picture))


def png(picture: Image.Image) -> bytes:
    """Return the picture's PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    """Return `content`, said to be a PNG, as a base64 data URL."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def user_message(text: str, urls: Sequence[str] = ()) -> dict[str, Any]:
    """Return a user's chat message: pictures first, then the question."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def json_option(name: str, value: Mapping[str, Any]) -> list[str]:
    """Return an option whose value is an object."""
    return [name, json.dumps(value)]


def _command(model: str, port: int, options: Sequence[str]) -> list[str]:
    program = str(Path(sys.executable).with_name("vllm"))
    return [program, "serve", model, "--host", HOST, "--port", str(port), *options]


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    return inherited | ENVIRONMENT | dict(added)


def _wait(server: Server, timeout: float, report: Callable[[str], None]) -> None:
    started = reported = time.monotonic()
    stage = ""
    while not server.is_healthy():
        now = time.monotonic()
        code = server.process.poll()
        if code is not None:
            raise ServerError(_failure(server, f"ended with exit status {code}"))
        if now - started > timeout:
            raise ServerError(_failure(server, f"was not ready in {timeout:.0f} s"))
        before, stage = stage, doing(server.log.read_text(errors="replace"))
        begins = stage in IMPORTS and stage != before
        if begins or now - reported > REPORT_SECONDS:
            reported = now
            report(f"waiting for the server, {now - started:.0f} s: {stage}")
        time.sleep(POLL_SECONDS)


def doing(log: str) -> str:
    """Say what a server that starts is doing.

    Args:
        log: what it has written until now; a line of vLLM's begins with its process.
    """
    front_end, engine, worker = IMPORTS
    if "(APIServer" not in log:
        return front_end
    if "(EngineCore" not in log:
        return engine
    # Not every server has processes that do nothing but work.
    if "multiproc_executor" in log and "(Worker" not in log:
        return worker
    messages = [one for one in SAID.findall(log) if one.strip()]
    return messages[-1][:MOST_SAID] if messages else ""


def _failure(server: Server, what: str) -> str:
    return f"vllm serve {what}; the end of {server.log}:\n{server.log_tail()}"


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])


def _stop(process: Process) -> None:
    """Ask the server to stop, then end whatever is left of its process group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
