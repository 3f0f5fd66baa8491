"""Data parallel 2: two engines behind one server, each with its own pool."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import OPTIONS, Asker

from vllm_avl.testing import models
from vllm_avl.testing.server import picture_url, serve


@pytest.mark.timeout(600)
def test_answers_do_not_depend_on_the_engine(checkpoints, tmp_path):
    urls = [picture_url(models.random_image(seed)) for seed in range(6)]
    with serve(
        checkpoints("llava"),
        [*OPTIONS, "--data-parallel-size", "2"],
        log=tmp_path / "server.log",
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as server:
        asker = Asker(server)
        alone = [asker.answers(url)[0] for url in urls]
        off = [asker.answers(url, vllm_xargs={"avl": 0})[0] for url in urls]
        with ThreadPoolExecutor(len(urls)) as pool:
            together = list(pool.map(lambda url: asker.answers(url)[0], urls))
        assert together == alone
        assert alone != off
        assert server.metric("vllm:kv_cache_usage_perc") == 0
