"""Dashboard, alerts and smoke test against a real server and a real Prometheus."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from preloaded import serve

from benchmarks.testing import models
from deploy.prometheus import (
    DEPLOY,
    Prometheus,
    alert_expressions,
    dashboard_expressions,
    metric_names,
    needs_prometheus,
    scraping,
)
from vllm_avl.demo.server import (
    ONE_THREAD,
    Server,
    json_option,
    picture_url,
    user_message,
)

KEY = "a-key-for-tests"
OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "2048", "--kv-cache-memory-bytes", str(64 << 20)),
    *json_option(
        "--additional-config",
        {"avl": {"core_ratio": 0.3, "text_keep_ratio": 0.5}},
    ),
)
SECONDS_OF_LOAD = 12


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory) -> Iterator[Server]:
    environment = {**ONE_THREAD, "VLLM_PLUGINS": "avl", "VLLM_API_KEY": KEY}
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(
        checkpoints("llava"), OPTIONS, log=log, environment=environment
    ) as running:
        yield running


def ask(server: Server, number: int) -> None:
    """Ask about a picture, and every third time about none."""
    urls = [picture_url(models.random_image(number))] if number % 3 else []
    body = {
        "model": server.model,
        "messages": [user_message("What is it?", urls)],
        "max_tokens": 100,
        "ignore_eos": True,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/chat/completions"
    server.http.post(url, json=body, headers=headers).raise_for_status()


@dataclass(frozen=True)
class Watched:
    """A Prometheus that saw the server work between two moments."""

    prometheus: Prometheus
    start: float
    end: float

    def values(self, expression: str) -> list[float]:
        return self.prometheus.finite_values(expression, self.start, self.end)


@pytest.fixture(scope="module")
def watched(server, tmp_path_factory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("prometheus")
    with scraping(server.url.removeprefix("http://"), folder) as prometheus:
        start = time.time()
        number = 0
        while time.time() - start < SECONDS_OF_LOAD:
            ask(server, number := number + 1)
        yield Watched(prometheus, start, time.time())


@needs_prometheus
def test_every_metric_named_is_scraped(watched):
    scraped = set(watched.prometheus.get("label/__name__/values"))
    expressions = {**dashboard_expressions(), **alert_expressions()}
    for where, expression in expressions.items():
        names = metric_names(expression)
        assert names, f"{where}: {expression}"
        assert names <= scraped, f"{where}: {names - scraped}"


@needs_prometheus
@pytest.mark.parametrize("panel", dashboard_expressions())
def test_a_panel_shows_something(watched, panel):
    expression = dashboard_expressions()[panel]
    assert watched.values(expression), expression


@needs_prometheus
def test_the_load_shows(watched):
    """What must be more than 0 after pictures, questions without, core and old text."""
    expressions = dashboard_expressions()
    for panel in (
        *("KV cache saved now A", "Blocks freed early A", "Requests A", "Requests B"),
        *("Tokens after prefill A", "Tokens after prefill B", "Refreshes A"),
        *("Text evicted as it aged A", "Turnover of core A", "Pictures A"),
    ):
        assert max(watched.values(expressions[panel])) > 0, panel
    assert 0.3 < max(watched.values(expressions["KV cache saved now A"])) < 1


@needs_prometheus
def test_alerts_are_silent_on_a_healthy_server(watched):
    (group,) = watched.prometheus.get("rules")["groups"]
    states = {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}
    # A machine slower than this load may find the refreshes dear, and be right.
    assert states.pop("VLLMRefreshesDear")[0] == "ok"
    others = set(alert_expressions()) - {"VLLMRefreshesDear"}
    assert states == dict.fromkeys(others, ("ok", "inactive"))


def smoke(*arguments: str, **environment: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [DEPLOY / "smoke.sh", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    return done.returncode, done.stdout.splitlines()


def test_smoke_passes(server):
    status, lines = smoke(server.url, KEY)
    assert status == 0, lines
    assert [line.split()[0] for line in lines] == ["PASS"] * 5 + ["all"]


def test_smoke_fails_without_the_key(server):
    status, lines = smoke(server.url)
    assert status == 1
    assert any(line.startswith("FAIL  /v1/models: 401") for line in lines), lines


@needs_prometheus
def test_smoke_fails_where_metrics_lack_ours(server, watched):
    status, lines = smoke(server.url, KEY, METRICS_URL=watched.prometheus.url)
    assert status == 1
    assert [line for line in lines if line.startswith("FAIL")] == [
        "FAIL  /metrics has no vllm_avl_blocks_freed_early_total: is it served with "
        "--attention-backend avl?"
    ]


def test_smoke_fails_where_nothing_listens():
    status, lines = smoke("http://127.0.0.1:9")
    assert status == 1
    assert lines[0].startswith("FAIL  /health")
