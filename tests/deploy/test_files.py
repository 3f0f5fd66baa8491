"""The files under deploy/, each read by the tool it is for or by its schema."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from deploy.prometheus import CONFIG, DASHBOARD, DEPLOY, needs_prometheus, panels

ROOT = DEPLOY.parent
COMPOSE = DEPLOY / "compose" / "compose.yaml"
GRAFANA = DEPLOY / "compose" / "grafana"
KSERVE = DEPLOY / "kubernetes" / "kserve-runtime.yaml"
VALUES = DEPLOY / "kubernetes" / "production-stack-values.yaml"
DOCKERFILES = [DEPLOY / "docker" / name for name in ("Dockerfile", "Dockerfile.cpu")]
KUBERNETES = "1.32"


def tool(name: str) -> str:
    """Return a program's path, from beside the interpreter or PATH, or skip."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    path = shutil.which(name, path=folders)
    if path is None:
        pytest.skip(f"{name} is not installed: see docs/deploy.md")
    return path


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Return what a program that has to succeed prints."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def services() -> dict:
    return yaml.safe_load(COMPOSE.read_text())["services"]


@needs_prometheus
def test_prometheus_takes_its_configuration():
    assert "5 rules found" in run(["promtool", "check", "config", CONFIG])


@needs_prometheus
def test_alerts_fire_on_what_they_are_for():
    run(["promtool", "test", "rules", Path(__file__).with_name("alerts_test.yml")])


def test_panels_do_not_overlap():
    found = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in found)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert {x for x, _ in cells} == set(range(24))


def test_panels_ask_the_chosen_source_about_the_chosen_model():
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        for target in panel["targets"]:
            assert target["expr"].count("{model_name=~") == target["expr"].count("vllm")


def test_grafana_knows_every_field_of_the_dashboard():
    """Through the classes that Grafana generates from its own schema."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    given = json.loads(DASHBOARD.read_text())
    read = dashboard.Dashboard.from_json(given)
    written = json.loads(JSONEncoder().encode(read))
    assert without_additions(written, given) == given


def without_additions(written, given):
    """Return `written` with only those keys of objects that `given` has."""
    if isinstance(given, dict) and isinstance(written, dict):
        shared = written.keys() & given.keys()
        return {key: without_additions(written[key], given[key]) for key in shared}
    if isinstance(given, list) and isinstance(written, list):
        pairs = itertools.zip_longest(written, given)
        return [without_additions(one, other) for one, other in pairs]
    return written


def test_what_is_provisioned_is_where_it_is_looked_for():
    (source,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "datasources" / "prometheus.yaml").read_text()
    )["datasources"]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert variables[0]["current"]["value"] == source["uid"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(
        (GRAFANA / "provisioning" / "dashboards" / "vllm-avl.yaml").read_text()
    )["providers"]
    mounts = [volume.split(":")[:2] for volume in services()["grafana"]["volumes"]]
    assert ["./grafana/dashboards", provider["options"]["path"]] in mounts
    home = services()["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_prometheus_scrapes_the_servers_of_compose():
    (job,) = yaml.safe_load(CONFIG.read_text())["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    for name in ("vllm", "vllm-cpu"):
        service = services()[name]
        assert service["networks"]["default"]["aliases"] == [host]
        assert service["ports"] == [f"${{VLLM_BIND:-127.0.0.1}}:8000:{port}"]


def test_what_compose_mounts_and_builds_is_there():
    for service in services().values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).is_dir()
        if build := service.get("build"):
            context = COMPOSE.parent / build["context"]
            assert (context / build["dockerfile"]).is_file()


def test_compose_reads_its_file():
    program = tool("docker-compose")
    command = [program, "-f", COMPOSE, "--profile", "gpu", "--profile", "cpu", "config"]
    config = yaml.safe_load(run(command, MODEL="a/model", GRAFANA_PASSWORD="secret"))
    assert set(config["services"]) == {"vllm", "vllm-cpu", "prometheus", "grafana"}
    assert config["services"]["vllm"]["command"][0] == "a/model"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_the_linter(dockerfile):
    run([tool("hadolint"), dockerfile])


def test_the_image_gets_a_whole_wheel(tmp_path):
    """Builds it from what the first stage copies, and from nothing else."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    first_stage = text.split("AS wheel")[1].split("\nFROM ")[0]
    copies = [line.split()[1:-1] for line in first_stage.splitlines() if "COPY" in line]
    source = tmp_path / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in itertools.chain(*copies):
        assert f"!{name}" in (DEPLOY / "docker" / "Dockerfile.dockerignore").read_text()
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run([*build, "--outdir", tmp_path, source])
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "vllm_avl").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names


def kserve_objects() -> tuple[dict, dict]:
    runtime, service = yaml.safe_load_all(KSERVE.read_text())
    return runtime, service


def test_kubernetes_knows_every_field_of_the_runtimes_pod():
    """KServe makes such a Deployment of it; its own fields are not checked here."""
    validator = pytest.importorskip("kubernetes_validate")
    runtime, service = kserve_objects()
    pod = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    pod["containers"][0]["env"] += service["spec"]["predictor"]["model"]["env"]
    labels = {"app": "llava"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "llava"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    validator.validate(deployment, KUBERNETES, strict=True)
    pod["containers"][0]["livenessProb"] = {}
    with pytest.raises(validator.ValidationError):
        validator.validate(deployment, KUBERNETES, strict=True)


def test_the_inference_service_names_the_runtime():
    runtime, service = kserve_objects()
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (model_format,) = runtime["spec"]["supportedModelFormats"]
    assert model["modelFormat"].items() <= model_format.items()


def test_helm_renders_the_values():
    """With the chart that `helm pull vllm/vllm-stack --untar` left in a folder."""
    chart = os.environ.get("PRODUCTION_STACK_CHART")
    if not chart:
        pytest.skip("PRODUCTION_STACK_CHART does not name the chart's folder")
    rendered = run([tool("helm"), "template", "test", chart, "-f", VALUES])
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    (engine,) = [
        one
        for one in objects
        if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("vllm")
    ]
    pytest.importorskip("kubernetes_validate").validate(engine, KUBERNETES, strict=True)
    (container,) = engine["spec"]["template"]["spec"]["containers"]
    assert "--attention-backend=avl" in container["command"]
    assert "--enable-prefix-caching" in container["command"]
    assert {"name": "VLLM_PLUGINS", "value": "avl"} in container["env"]
    probe = container["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] == 1800


def test_big_models_have_half_an_hour_to_start():
    values = yaml.safe_load(VALUES.read_text())["servingEngineSpec"]
    runtime, _ = kserve_objects()
    for spec in (values, runtime["spec"]["containers"][0]):
        start, live = spec["startupProbe"], spec["livenessProbe"]
        assert start["failureThreshold"] * start["periodSeconds"] == 1800
        assert live["failureThreshold"] * live["periodSeconds"] == 120
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert spec[probe]["httpGet"] == {"path": "/health", "port": 8000}


def test_scripts_parse():
    run(["bash", "-n", DEPLOY / "smoke.sh"])
