"""The soak: its checks notice what they are for, and its short form holds."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import preloaded
import pytest

from soak import faults, ledger, probes, stock
from vllm_avl.demo.server import Server

ROOT = Path(__file__).parents[2]
SOONER = """
import sys
import preloaded
from benchmarks.harness import main
from soak import __main__ as soak
soak.target.serve = preloaded.serve
main(soak.BENCHMARK, sys.argv[1:])
"""


@pytest.fixture
def answering():
    """Start an HTTP server that gives one answer to everything."""
    started = []

    def start(status: int, content: object) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                answer = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return Server("model", server.server_port, Path("log"), process=None)

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def tokens(*ids):
    return {"choices": [{"token_ids": list(ids)}]}


@pytest.mark.parametrize(
    ("status", "text", "violations", "suspects"),
    [
        (400, "max_tokens is wrong", 0, 0),
        (400, "no", 1, 0),
        (200, "max_tokens is fine", 1, 0),
        (500, "max_tokens is wrong", 0, 1),
        (500, "Internal error", 1, 1),
    ],
)
def test_a_fault_needs_a_4xx_with_the_reason(
    answering, status, text, violations, suspects
):
    found = ledger.Ledger()
    fault = faults.Fault("a fault", b"{}", "max_tokens")
    fault.send(answering(status, text), found)
    assert (len(found.violations), len(found.suspects)) == (violations, suspects)


@pytest.mark.parametrize(
    ("status", "content", "violations"),
    [(200, tokens(1, 2), 0), (200, tokens(1, 3), 1), (500, tokens(1, 2), 1)],
)
def test_another_answer_and_none_are_violations(answering, status, content, violations):
    found, probe = ledger.Ledger(), probes.Probe("a probe")
    server = answering(status, content)
    probes.compare(server, probe, {probe: [1, 2]}, found)
    assert len(found.violations) == violations


@pytest.mark.parametrize(("status", "violations"), [(500, 0), (200, 1)])
def test_a_5xx_is_excused_only_by_stocks_own(answering, status, violations):
    found = ledger.Ledger()
    suspect = ledger.Suspect("one", "POST", "/", (), b"{}", 500, "why")
    same = stock.compare(answering(status, ""), [suspect], found)
    assert (len(found.violations), len(same)) == (violations, 1 - violations)


def test_it_runs_as_the_documents_say():
    command = [sys.executable, "-m", "tests.soak", "--help"]
    said = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    assert "--minutes" in said.stdout


def test_says_what_to_install(tmp_path):
    command = [sys.executable, "-m", "soak", "--schemathesis", tmp_path / "st"]
    result = preloaded.run(command, 100)
    assert result.returncode == 2
    assert "pip install schemathesis==" in result.stderr


@pytest.mark.timeout(1500)
def test_quick(tmp_path):
    folders = [
        word
        for name in ("results", "checkpoints", "logs")
        for word in (f"--{name}", str(tmp_path / name))
    ]
    command = [sys.executable, "-c", SOONER, "--quick", "--no-fuzz", *folders]
    result = preloaded.run(command, 1400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "all conditions hold" in result.stdout
