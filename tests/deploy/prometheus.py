"""A real Prometheus beside the test, and what it answers."""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from vllm_avl.demo.server import HOST, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIG = DEPLOY / "compose" / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "compose" / "grafana" / "dashboards" / "vllm-avl.json"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool (Debian: prometheus) are not installed",
)
# What Grafana puts in for its variables.
MACROS = {"$__rate_interval": "15s", "$__range": "60s", "$model": ".*"}


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels, without the rows that head them."""
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def dashboard_expressions() -> dict[str, str]:
    """Return each query as Prometheus gets it, by panel and letter."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for macro, value in MACROS.items():
                expression = expression.replace(macro, value)
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


def alert_expressions() -> dict[str, str]:
    rules = yaml.safe_load((CONFIG.parent / "alerts.yml").read_text())
    return {
        rule["alert"]: rule["expr"]
        for group in rules["groups"]
        for rule in group["rules"]
    }


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\bvllm[:_]\w+|\bup\b", expression))


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, parameters: Mapping[str, Any] | None = None) -> Any:
        """Return what the API answers, or fail with its message."""
        url = f"{self.url}/api/v1/{path}"
        answer = httpx.get(url, params=parameters, timeout=20).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def finite_values(self, expression: str, start: float, end: float) -> list[float]:
        """Return what an expression gave in a time, but for NaN."""
        parameters = {"query": expression, "start": start, "end": end, "step": "1"}
        series = self.get("query_range", parameters)["result"]
        values = [float(value) for one in series for _, value in one["values"]]
        return [value for value in values if math.isfinite(value)]


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus as deployed, every second and on `target` instead."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    shutil.copy(CONFIG.parent / "alerts.yml", folder)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={HOST}:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(port)
        _wait(process, f"{prometheus.url}/-/ready", folder / "prometheus.log")
        yield prometheus
    finally:
        process.terminate()
        process.wait(20)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"prometheus is not ready:\n{log.read_text()}")
