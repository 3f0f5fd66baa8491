"""Requests that must be refused, each with a status and a reason that says what."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.testing import models
from vllm_avl.demo.server import (
    Server,
    data_url,
    free_port,
    picture_url,
    user_message,
)

from . import pictures
from .ledger import Ledger, Suspect
from .target import MAX_IMAGES, MAX_MODEL_LEN, body

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
JSON = "application/json"
PAUSE_SECONDS = 0.2
LIMIT_SECONDS = 300
RATIO = r"must be a number in \(0, 1\]"
BAD_XARGS: Sequence[tuple[Any, str]] = (
    ({"avl_store_ratio": 0}, rf"vllm_xargs\.avl_store_ratio = 0: {RATIO}"),
    ({"avl_store_ratio": "half"}, rf"vllm_xargs\.avl_store_ratio = 'half': {RATIO}"),
    ({"avl_core_ratio": 0.9}, r"vllm_xargs\.avl_core_ratio = 0\.9: .*store ratio"),
    ({"avl_refresh_interval": 1.5}, r"vllm_xargs\.avl_refresh_interval = 1\.5: "),
    ({"avl_text_keep_ratio": 2}, rf"vllm_xargs\.avl_text_keep_ratio = 2: {RATIO}"),
    ({"avl_policy": "best"}, r"vllm_xargs\.avl_policy = 'best': must be one of avl"),
    ({"avl": 2}, r"vllm_xargs\.avl = 2: must be 0 or 1"),
    ({"avl_unknown": 1}, r"vllm_xargs\.avl_unknown: unknown setting; known are avl"),
    ({"avl_store_ratio": {"a": 1}}, r"body\.vllm_xargs\.avl_store_ratio"),
    ([0.5], r"body\.vllm_xargs"),
)


@dataclass(frozen=True)
class Fault:
    """A request, and what its refusal must say."""

    name: str
    content: bytes
    reason: str
    """A regular expression."""
    path: str = CHAT
    method: str = "POST"
    content_type: str = JSON
    in_stream: bool = False
    """Whether vLLM has sent its 200 before it looks at what is wrong."""

    def send(self, server: Server, ledger: Ledger) -> None:
        """Send it; anything but a 4xx with the reason is a violation.

        A 5xx is left to the comparison with stock, if its reason is clear.
        """
        ledger.count("faults")
        headers = {"Content-Type": self.content_type}
        url = server.url + self.path
        try:
            answer = server.http.request(
                self.method,
                url,
                content=self.content,
                headers=headers,
                timeout=LIMIT_SECONDS,
            )
        except httpx.HTTPError as error:
            ledger.check(False, f"{self.name}: is refused, not {error!r}")
            return
        status, text = answer.status_code, _unescaped(answer.text)
        what = f"{self.name}: {status} {text[:300]}"
        if ledger.check(re.search(self.reason, text) is not None, f"{what}: says why"):
            ledger.count("refused with the reason")
        if status >= 500:
            ledger.suspect(
                Suspect(
                    self.name,
                    self.method,
                    self.path,
                    tuple(headers.items()),
                    self.content,
                    status,
                    text,
                )
            )
        elif not self.in_stream:
            ledger.check(400 <= status < 500, f"{what}: is a 4xx")


class Faults:
    """Sends all of its faults, in random order, again and again until told to stop."""

    def __init__(self, server: Server, faults: Sequence[Fault], seed: int) -> None:
        self._server, self._faults = server, list(faults)
        self._rng = random.Random(seed)

    def __call__(self, stop: threading.Event, ledger: Ledger) -> None:
        """Send each at least once, then go on until `stop`."""
        while True:
            self._rng.shuffle(self._faults)
            for fault in self._faults:
                fault.send(self._server, ledger)
                stop.wait(PAUSE_SECONDS)
            if stop.is_set():
                return


def bad_requests(server: Server) -> Iterator[Fault]:
    """Yield requests whose JSON, fields or lengths are wrong."""
    for number, (xargs, reason) in enumerate(BAD_XARGS):
        question = body(server, [number % 3], vllm_xargs=xargs)
        yield _fault(f"vllm_xargs {xargs}", question, reason)
        if isinstance(xargs, dict) and not reason.startswith("body"):
            stream = question | {"stream": True}
            yield _fault(f"streamed {xargs}", stream, reason, in_stream=True)
    for name, (changes, reason) in _wrong_fields().items():
        yield _fault(name, body(server, [], **changes), reason)
    too_many = body(server, [0] * (MAX_IMAGES + 1))
    yield _fault("too many pictures", too_many, rf"At most {MAX_IMAGES} image\(s\)")
    for name, prompt, reason in (
        ("token out of range", [10**6], "out of vocabulary"),
        ("negative token", [-1], "greater than or equal to 0"),
        ("no prompt", [], "at least one prompt"),
    ):
        question = {"model": server.model, "prompt": prompt}
        yield _fault(name, question, reason, path=COMPLETIONS)
    yield from _malformed(body(server, []))
    yield from refused_late(server)
    yield from _page()


def refused_late(server: Server) -> Iterator[Fault]:
    """Yield requests that are refused when their pictures have been read.

    Each has a picture of its own: the engine must not be taken to know it.
    """
    late = (
        ("min_tokens 100", {"min_tokens": 100}, "min_tokens must be less than"),
        ("logit_bias of no token", {"logit_bias": {"99999999": 1}}, "logit_bias"),
        (
            "a grammar that is none",
            {"structured_outputs": {"grammar": "root ::= none"}},
            "[Gg]rammar",
        ),
        ("a cut picture", {"truncate_prompt_tokens": 100}, "truncate_prompt_tokens"),
    )
    for seed, (name, changes, reason) in enumerate(late, 1000):
        question = body(server, [seed], **changes)
        yield _fault(name, question, reason)
        if name != "a cut picture":
            stream = question | {"stream": True}
            yield _fault(f"streamed, {name}", stream, reason, in_stream=True)
    url = picture_url(models.random_image(1010))
    part = {"type": "input_image", "image_url": url, "detail": "auto"}
    question = {
        "model": server.model,
        "input": [{"role": "user", "content": [part]}],
        "max_output_tokens": 24,
        "logit_bias": {"99999999": 1},
    }
    yield _fault("a response", question, "logit_bias", path=RESPONSES)
    source = {"type": "base64", "media_type": "image/png", "data": "@@@@"}
    message = {"role": "user", "content": [{"type": "image", "source": source}]}
    question = {"model": server.model, "max_tokens": 24, "messages": [message]}
    yield _fault("a message", question, "base64", path=MESSAGES)


def _page() -> Iterator[Fault]:
    for path, reason in (
        ("/avl/requests/nobody", "'nobody' is not adaptive"),
        ("/avl/requests?limit=0", "limit = '0'"),
        ("/avl/static/none.js", "Not Found"),
        ("/avl/static/..%2froutes.py", "Not Found"),
    ):
        yield Fault(f"GET {path}", b"", reason, path=path, method="GET")


def _wrong_fields() -> Mapping[str, tuple[dict[str, Any], str]]:
    return {
        "prompt too long": ({"text": "x" * 2 * MAX_MODEL_LEN}, "maximum context len"),
        "prompt of 4 MB": ({"text": "x" * 4_000_000}, "maximum context length"),
        "unknown model": ({"model": "none"}, "model `none` does not exist"),
        "max_tokens -1": ({"max_tokens": -1}, "max_tokens must be at least 1"),
        "max_tokens 10^9": ({"max_tokens": 10**9}, "cannot be greater than max_model"),
        "temperature -1": ({"temperature": -1}, "temperature must be non-negative"),
        "top_p 7": ({"top_p": 7}, "top_p must be in"),
        "n 0": ({"n": 0}, "n must be at least 1"),
        "n 10^6": ({"n": 10**6}, "n must be at most"),
        "no messages": ({"messages": []}, "empty conversation"),
        "role 5": ({"messages": [{"role": 5, "content": "x"}]}, "body.messages.0"),
        "stop of 100": ({"stop": ["a"] * 100}, "body.stop"),
        "logprobs 10^6": ({"logprobs": True, "top_logprobs": 10**6}, "max allowed"),
    }


def _malformed(good: dict[str, Any]) -> Iterator[Fault]:
    whole = json.dumps(good).encode()
    media_type = "Only 'application/json' is allowed"
    parsing = "error parsing the body"
    yield Fault("half of the JSON", whole[: len(whole) // 2], "JSON decode error")
    yield Fault("an array", b"[]", "Input should be a valid dictionary")
    yield Fault("an empty body", b"", "Field required")
    yield Fault("no text at all", b"\xff\xfe\x00", parsing)
    yield Fault("100000 brackets", b"[" * 100_000 + b"]" * 100_000, parsing)
    yield Fault("text/plain", whole, media_type, content_type="text/plain")
    yield Fault("application/xml", b"<a/>", media_type, content_type="application/xml")
    multipart = "multipart/form-data; boundary=x"
    yield Fault("multipart", b"--x\r\n", media_type, content_type=multipart)
    yield Fault("GET", b"", "Method Not Allowed", method="GET")
    yield Fault("unknown path", b"{}", "Not Found", path="/v1/none")


def bad_pictures(server: Server) -> Iterator[Fault]:
    """Yield requests whose pictures cannot be had or read."""
    for name, (content, reason) in pictures.broken().items():
        # The second picture is whole: nothing of it may stay behind.
        question = body(server, [7])
        question["messages"].insert(0, user_message("And?", [data_url(content)]))
        yield _fault(name, question, reason)
    for name, url, reason in (
        ("bad base64", "data:image/png;base64,@@@@", "[Nn]on-base64|base64"),
        ("no comma", "data:image/png;base64", "missing ',' separator"),
        ("no base64", "data:text/html,<b>", "Only base64 data URLs"),
        ("ftp", "ftp://127.0.0.1/x.png", "must be either a HTTP, data or file URL"),
        ("file", "file:///etc/hostname", "without `--allowed-local-media-path`"),
        ("unreachable", f"http://127.0.0.1:{free_port()}/x.png", "Cannot connect to"),
    ):
        question = body(server, [], messages=[user_message("What?", [url])])
        yield _fault(name, question, reason)


def _fault(name: str, question: dict[str, Any], reason: str, **how: Any) -> Fault:
    return Fault(name, json.dumps(question).encode(), reason, **how)


def _unescaped(text: str) -> str:
    return text.replace('\\"', '"')
