"""/metrics, usage and /avl on a real server with an API key and kept content."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from kept_content import SETTINGS, ask, get, options, picture
from preloaded import serve
from prometheus_client.parser import text_string_to_metric_families

from vllm_avl.demo.server import ONE_THREAD
from vllm_avl.front_end import schema
from vllm_avl.metrics.definitions import COUNTERS, GAUGES, PREFIX


@pytest.fixture
def server(content_server):
    return content_server


def test_the_start_says_what_is_on(server):
    log = server.log.read_text()
    assert "adaptive attention is on: policy avl, engage always" in log


def test_blocks_held_agree_with_vllms_own_metric_under_load(server):
    looks = 0
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(ask, server, seed % 5, max_tokens=240 + 80 * (seed % 3))
            for seed in range(12)
        ]
        while not all(answer.done() for answer in answers):
            # A step may end while /metrics is being written: then look again.
            for _ in range(5):
                metrics = server.metrics()
                held = metrics.total(f"{PREFIX}kv_blocks_held")
                if held == metrics.held_blocks:
                    break
            assert held == metrics.held_blocks
            looks += held > 0
        assert all(answer.result() for answer in answers)
    assert looks > 3
    metrics = server.metrics()
    assert metrics.total(f"{PREFIX}kv_blocks_held") == metrics.held_blocks == 0
    assert metrics.total(f"{PREFIX}kv_blocks_stock") == 0


def test_every_metric_is_scraped_with_its_help(server):
    text = server.http.get(f"{server.url}/metrics").text
    found = {f.name: f.documentation for f in text_string_to_metric_families(text)}
    for metric in COUNTERS + GAUGES:
        assert found[PREFIX + metric.name] == metric.help


def test_data_is_behind_the_servers_key(server):
    for path in ("/config", "/stats", "/requests", "/requests/x"):
        for key in (None, "wrong"):
            answer = get(server, path, key)
            assert answer.status_code == 401
            assert "Authorization: Bearer" in schema.Fault(**answer.json()).detail


def test_the_page_needs_no_key_and_runs_no_foreign_script(server):
    answer = get(server, "/", None)
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    script = get(server, "/static/main.js", None)
    for file in (answer, script):
        assert file.headers["Cache-Control"] == "no-cache"
    assert get(server, "", None).next_request.url.path == "/avl/"


def test_the_configuration(server):
    config = schema.Config(**get(server, "/config").json())
    assert config.settings.items() >= SETTINGS.items()
    assert config.model == server.model
    assert (config.block_size, config.remembers) == (32, 4)
    assert config.num_blocks == server.metrics().num_blocks


def test_totals_are_what_metrics_says(server):
    ask(server, 2)
    stats = schema.Stats(**get(server, "/stats").json())
    metrics = server.metrics()
    for name in ("blocks_freed_early_total", "refreshes_total", "kv_blocks_held"):
        assert stats.metrics[PREFIX + name] == metrics.total(PREFIX + name)
    left = f"{PREFIX}requests_left_alone_total{{reason=no_vision}}"
    ask(server)
    after = schema.Stats(**get(server, "/stats").json()).metrics
    assert after[left] == stats.metrics[left] + 1
    assert stats.pool[-1].held == 0
    assert max(sample.stock - sample.held for sample in stats.pool) > 0


def test_requests_are_listed_newest_first_and_bounded(server):
    ids = [ask(server, seed).id for seed in range(6)]
    listed = schema.Requests(**get(server, "/requests").json())
    assert [request.name for request in listed.requests] == ids[:1:-1]
    assert not any(request.running for request in listed.requests)
    first = schema.Requests(**get(server, "/requests?limit=1").json())
    assert first.requests == listed.requests[:1]
    assert get(server, f"/requests/{ids[0]}").status_code == 404


def test_one_request_in_full(server):
    answer = ask(server, 3, 4)
    detail = schema.Detail(**get(server, f"/requests/{answer.id}").json())
    assert detail.answer == answer.choices[0].message.content
    assert len(detail.answer_tokens) == 24
    assert detail.num_blocks_freed == answer.usage.avl["blocks_freed"]
    assert detail.timeline[-1].held == answer.usage.avl["blocks_held"]
    assert (detail.name, detail.id) == (answer.id, answer.avl[0]["id"])
    assert detail.timeline[0].held == detail.timeline[0].stock
    assert [shown.url for shown in detail.pictures] == [picture(3), picture(4)]
    for shown in detail.pictures:
        ((start, end),) = shown.ranges
        (grid,) = shown.grids
        assert (grid.start, grid.rows * grid.columns) == (start, end - start)
    ranked = {p for a, b in detail.ranked_ranges for p in range(a, b)}
    for layer in detail.layers:
        told = [set(layer.core[0]), set(layer.secondary[0]), set(layer.evicted[0])]
        assert set.union(*told) == ranked
        assert sum(map(len, told)) == len(ranked)
        assert set(layer.history[-1].core[0]) == told[0]
        assert len(layer.history) == 1 + detail.num_refreshes


def test_a_running_request_is_listed(server):
    stream = ask(server, 1, stream=True, max_tokens=400)
    name = next(iter(stream)).id
    detail = schema.Detail(**get(server, f"/requests/{name}").json())
    assert detail.running
    assert detail.answer is None
    stream.close()


@pytest.mark.parametrize(
    ("path", "status", "part"),
    [
        ("/requests/nobody", 404, "'nobody' is not adaptive"),
        ("/requests?limit=0", 422, "limit = '0'"),
        ("/requests?limit=many", 422, "limit = 'many'"),
    ],
)
def test_what_is_wrong_is_said(server, path, status, part):
    answer = get(server, path)
    assert answer.status_code == status
    assert part in schema.Fault(**answer.json()).detail


def test_openapi_describes_the_routes(server):
    described = server.http.get(f"{server.url}/openapi.json").json()
    for path in ("/config", "/stats", "/requests", "/requests/{request_id}"):
        responses = described["paths"][f"/avl{path}"]["get"]["responses"]
        assert {"200", "401", "404", "409", "422", "503"} <= set(responses)
    assert "/avl/" not in described["paths"]


def test_two_api_servers_and_two_engines_add_up(checkpoints, tmp_path):
    more = ("--data-parallel-size", "2", "--api-server-count", "2")
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_PLUGINS": "avl"}
    with serve(
        checkpoints("llava"),
        (*options(), *more),
        log=tmp_path / "log",
        environment=environment,
    ) as server:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda seed: ask(server, seed), range(10)))
        assert all(answer.usage.avl["blocks_freed"] == 8 for answer in answers)
        total = server.metrics().total
        assert total(f"{PREFIX}requests_adapted_total") == 10
        assert total(f"{PREFIX}blocks_freed_early_total") == 80
        assert total(f"{PREFIX}kv_blocks_held") == 0
        listed = schema.Requests(**get(server, "/requests").json())
        # Each engine remembers its last four.
        assert len(listed.requests) >= 5
        newest = listed.requests[0].id
        details = [get(server, f"/requests/{newest}") for _ in range(4)]
        assert all(detail.status_code == 200 for detail in details)


def test_another_back_end_says_so(checkpoints, tmp_path):
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024")
    memory = ("--kv-cache-memory-bytes", str(32 << 20))
    with serve(
        checkpoints("llava"),
        (*options, *memory),
        log=tmp_path / "log",
        environment=ONE_THREAD | {"VLLM_PLUGINS": "avl"},
    ) as server:
        answer = httpx.get(f"{server.url}/avl/config")
        assert answer.status_code == 404
        assert "--attention-backend avl" in answer.json()["detail"]
        assert PREFIX not in server.http.get(f"{server.url}/metrics").text
        usage = ask(server, 1).usage
        assert "avl" not in json.loads(usage.model_dump_json())
