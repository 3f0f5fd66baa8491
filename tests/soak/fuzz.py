"""schemathesis against the server's own description of its API."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_avl.demo.server import Server

from .ledger import Ledger, Suspect

REQUIREMENT = "schemathesis==4.32.5"
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/v1/models",
    "/health",
)
LIMIT_SECONDS = 60
# With all of vLLM's fields almost every request is refused before it reaches an engine.
FIELDS: Mapping[str, Any] = {
    "messages": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "role": {"enum": ["system", "user", "assistant"]},
                "content": {"type": "string"},
            },
            "required": ["role", "content"],
        },
    },
    "prompt": {"type": "string", "minLength": 1},
    "n": {"type": "integer", "minimum": 1, "maximum": 2},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 16},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0.1, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0, "maximum": 99},
    "stream": {"type": "boolean"},
    "ignore_eos": {"type": "boolean"},
    "priority": {"type": "integer", "minimum": -9, "maximum": 9},
    "vllm_xargs": {
        "type": "object",
        "properties": {
            "avl": {"enum": [0, 1]},
            "avl_store_ratio": {"type": "number", "minimum": 0.1, "maximum": 1},
            "avl_core_ratio": {"type": "number", "minimum": 0.01, "maximum": 0.1},
            "avl_refresh_interval": {"type": "integer", "minimum": 0, "maximum": 9},
            "avl_text_keep_ratio": {"type": "number", "minimum": 0.1, "maximum": 1},
            "avl_policy": {"enum": ["avl", "fastv", "h2o", "snapkv", "full"]},
        },
        "additionalProperties": False,
    },
}
NARROWED = ("ChatCompletionRequest", "CompletionRequest")


class Fuzz:
    """One run of schemathesis: requests that fit the schema, and some that do not."""

    def __init__(
        self, server: Server, program: Path, folder: Path, examples: int, seconds: int
    ) -> None:
        self._server, self._program, self._folder = server, program, folder
        self._examples, self._seconds = examples, seconds

    def __call__(self, stop: threading.Event, ledger: Ledger) -> None:
        """Run to the end; keep each answer of 500 or more for a comparison."""
        self._folder.mkdir(parents=True, exist_ok=True)
        schema, report = self._folder / "openapi.json", self._folder / "requests.har"
        report.unlink(missing_ok=True)
        schema.write_text(json.dumps(self._schema()))
        with (self._folder / "schemathesis.log").open("wb") as log:
            done = subprocess.run(
                self._command(schema, report),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                timeout=self._seconds + 10 * LIMIT_SECONDS,
                check=False,
            )
        # 1 is a failed check, which is looked at below.
        if not ledger.check(
            done.returncode in (0, 1) and report.exists(),
            f"schemathesis runs: exit status {done.returncode}, see {log.name}",
        ):
            return
        entries = json.loads(report.read_text())["log"]["entries"]
        ledger.check(len(entries) > 0, f"schemathesis asks: see {log.name}")
        ledger.count("faults", len(entries))
        for entry in entries:
            self._judge(entry, ledger)

    def _schema(self) -> dict[str, Any]:
        """Return the server's schema, narrowed so that much reaches the engine."""
        answer = self._server.http.get(f"{self._server.url}/openapi.json")
        schema = answer.raise_for_status().json()
        model = {"const": self._server.model}
        for name, part in schema["components"]["schemas"].items():
            fields = part.get("properties", {})
            if name in NARROWED:
                fields = {k: v for k, v in FIELDS.items() if k in fields}
                needed = "messages" if "messages" in fields else "prompt"
                part["required"] = ["model", needed]
            if name in NARROWED or "model" in fields:
                part["properties"] = fields | {"model": model}
        return schema

    def _command(self, schema: Path, report: Path) -> list[str]:
        paths: Sequence[str] = [
            word for path in PATHS for word in ("--include-path", path)
        ]
        return [
            *(str(self._program), "run", str(schema), "--url", self._server.url),
            *paths,
            *("--checks", "not_a_server_error", "--continue-on-failure"),
            *("--max-examples", str(self._examples), "--no-shrink", "--seed", "1"),
            *("--max-time", str(self._seconds)),
            *("--request-timeout", str(LIMIT_SECONDS)),
            *("--report-har-path", str(report)),
        ]

    def _judge(self, entry: Mapping[str, Any], ledger: Ledger) -> None:
        request, status = entry["request"], entry["response"]["status"]
        path = urlsplit(request["url"]).path
        what = f"schemathesis, {request['method']} {path}"
        # HAR has 0 where no answer came.
        ledger.check(status >= 200, f"{what}: there is an answer")
        ledger.count(f"status {status // 100}xx")
        if status >= 500:
            message = entry["response"]["content"].get("text", "")
            kinds = ("content-type", "accept")
            headers = tuple(
                (header["name"], header["value"])
                for header in request["headers"]
                if header["name"].lower() in kinds
            )
            content = request.get("postData", {}).get("text", "").encode()
            ledger.suspect(
                Suspect(
                    f"{what}: {_first_words(message)}",
                    request["method"],
                    path,
                    headers,
                    content,
                    status,
                    message,
                )
            )


def _first_words(message: str) -> str:
    """Return the beginning of an error's message: what tells one kind from another."""
    try:
        text = json.loads(message)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = message
    return " ".join(str(text).split()[:6])
