"""deploy/ray/app.py on a Ray of one machine: two replicas of a small model on CPUs."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import openai
import psutil
import pytest

from benchmarks.testing import models
from deploy.prometheus import DEPLOY
from vllm_avl.demo.server import (
    HOST,
    NOT_INHERITED,
    ONE_THREAD,
    free_port,
    picture_url,
    user_message,
)

pytest.importorskip("ray.serve.llm", reason="Ray is not installed: see docs/deploy.md")
import ray
from ray import serve

# Not 5 s: on a busy machine Ray gives its proxy up, and then the application.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120"}
NUM_REPLICAS = 2
NUM_TOKENS = 24


def application(model: str):
    spec = importlib.util.spec_from_file_location("app", DEPLOY / "ray" / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    settings = app.Settings(
        model=model,
        served_name="small",
        replicas=NUM_REPLICAS,
        gpus_per_replica=0,
        cpus_per_replica=1,
        engine='{"dtype": "float32", "enforce_eager": true, "max_model_len": 2048, '
        '"kv_cache_memory_bytes": 67108864}',
    )
    return app.build(settings)


@pytest.fixture(scope="module")
def client(checkpoints, tmp_path_factory) -> Iterator[openai.OpenAI]:
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in NOT_INHERITED:
            patch.delenv(name, raising=False)
        for name, value in (ONE_THREAD | PATIENCE).items():
            patch.setenv(name, value)
        ray.init(num_cpus=8, include_dashboard=False)
        try:
            serve.start(http_options={"host": HOST, "port": port})
            serve.run(application(str(checkpoints("llava"))))
            url = f"http://{HOST}:{port}/v1"
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        finally:
            started = psutil.Process().children(recursive=True)
            serve.shutdown()
            ray.shutdown()
            end(started)


def end(processes: list[psutil.Process]) -> None:
    """Kill what is left: engines have outlived their replicas."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def answer(client: openai.OpenAI, seed: int, **arguments) -> str:
    adaptive = arguments.get("avl") == 1
    urls = [picture_url(models.random_image(seed))]
    completion = client.chat.completions.create(
        model="small",
        messages=[user_message("What is it?", urls)],
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": arguments},
    )
    assert completion.usage.completion_tokens == NUM_TOKENS
    said = completion.usage.model_extra["avl"]
    assert said["requests_adapted"] == adaptive
    assert (said["blocks_freed"] > 0) == adaptive
    return completion.choices[0].message.content


def generated_by_replica() -> dict[str, float]:
    """Tokens that each replica generated, from Ray's own metrics."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found = {}
    for line in httpx.get(url).text.splitlines():
        if line.startswith("ray_vllm_generation_tokens_total{"):
            replica = line.split('ReplicaId="')[1].split('"')[0]
            found[replica] = float(line.rsplit(" ", 1)[1])
    return found


@pytest.mark.timeout(900)
def test_every_replica_serves_adaptively(client):
    seeds = range(8)
    adaptive = [answer(client, seed, avl=1) for seed in seeds]
    again = [answer(client, seed, avl=1) for seed in seeds]
    stock = [answer(client, seed, avl=0) for seed in seeds]
    assert adaptive == again
    assert all(one != other for one, other in zip(adaptive, stock, strict=True))
    deadline = time.monotonic() + 60
    while len(generated_by_replica()) < NUM_REPLICAS and time.monotonic() < deadline:
        time.sleep(1)
    assert len(generated_by_replica()) == NUM_REPLICAS
    assert all(tokens > 0 for tokens in generated_by_replica().values())


def test_a_wrong_setting_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="avl_store_ratio"):
        answer(client, 1, avl_store_ratio=5)
