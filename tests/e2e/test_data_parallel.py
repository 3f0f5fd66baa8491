"""Data parallel 2: two engines behind one server, each with its own pool."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from preloaded import serve

from benchmarks.testing import models
from vllm_avl.demo.server import picture_url, user_message

OPTIONS = (
    *("--attention-backend", "avl", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(32 << 20)),
    *("--data-parallel-size", "2"),
)


@pytest.mark.timeout(600)
def test_answers_do_not_depend_on_the_engine(checkpoints, tmp_path):
    messages = [
        [user_message("What is it?", [picture_url(models.random_image(seed))])]
        for seed in range(6)
    ]
    with serve(
        checkpoints("llava"),
        OPTIONS,
        log=tmp_path / "server.log",
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as server:

        def answer(message, avl=1):
            completion = server.client().chat.completions.create(
                model=server.model,
                messages=message,
                max_tokens=24,
                temperature=0,
                extra_body={"ignore_eos": True, "vllm_xargs": {"avl": avl}},
            )
            return completion.choices[0].message.content

        alone = [answer(message) for message in messages]
        with ThreadPoolExecutor(len(messages)) as pool:
            assert list(pool.map(answer, messages)) == alone
        assert [answer(message, avl=0) for message in messages] != alone
        assert server.metric("vllm:kv_cache_usage_perc") == 0
