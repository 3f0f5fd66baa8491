"""Continuous load: runs of `vllm bench serve`, each with other settings."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from vllm_avl.demo.server import ENVIRONMENT, ServerError

from .ledger import Ledger
from .target import MAX_IMAGES, XARGS

CLIENT = Path(__file__).with_name("client.py")
READY, DONE = "ready", "done"


class Load:
    """One client: a run of some requests after the other until told to stop."""

    def __init__(
        self, url: str, model: str, folder: Path, index: int, count: int
    ) -> None:
        self._url, self._model, self._folder = url, model, folder
        self._index, self._count = index, count
        self._runs = itertools.count()

    def __enter__(self) -> Load:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"load-{self._index}.log").open("wb") as log:
            self._client = subprocess.Popen(
                [sys.executable, "-P", str(CLIENT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._client.kill()
        self._client.communicate()

    def wait(self) -> None:
        """Wait until the client has started.

        Raises:
            ServerError: it could not.
        """
        if self._client.stdout.readline().strip() != READY:
            raise ServerError(f"vllm bench serve does not start: see {self._folder}")

    def __call__(self, stop: threading.Event, ledger: Ledger) -> None:
        """Ask until `stop`; every request of every run must be answered in full."""
        while not stop.is_set():
            number = next(self._runs)
            result = self._folder / f"load-{self._index}-{number}.json"
            result.unlink(missing_ok=True)
            self._client.stdin.write(json.dumps(self._arguments(number, result)) + "\n")
            self._client.stdin.flush()
            ended = self._client.stdout.readline().strip()
            facts = json.loads(result.read_text()) if result.exists() else {}
            completed = facts.get("completed", 0)
            ledger.count("load requests", completed)
            ledger.count("load tokens", facts.get("total_output_tokens", 0))
            if not ledger.check(
                (ended, completed) == (DONE, self._count),
                f"load: {completed} of {self._count} requests answered, see {result}",
            ):
                return

    def _arguments(self, number: int, result: Path) -> list[str]:
        # Clients that run side by side are at different settings.
        turn = number + len(XARGS) // 2 * self._index
        xargs = {"vllm_xargs": XARGS[turn % len(XARGS)]}
        return [
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", self._url, "--model", self._model),
            *("--num-prompts", str(self._count)),
            *("--seed", str(1000 * self._index + number)),
            *("--max-concurrency", "5", "--extra-body", json.dumps(xargs)),
            *("--dataset-name", "random-mm", "--ignore-eos", "--temperature", "0"),
            *("--random-input-len", "64", "--random-output-len", "160"),
            *("--random-range-ratio", "0.5"),
            *("--random-mm-base-items-per-request", "2"),
            *("--random-mm-num-mm-items-range-ratio", "0.5"),
            *("--random-mm-limit-mm-per-prompt", json.dumps({"image": MAX_IMAGES})),
            *("--random-mm-bucket-config", "{(336, 336, 1): 1.0}"),
            *("--save-result", "--disable-tqdm", "--result-dir", str(result.parent)),
            *("--result-filename", result.name),
        ]
