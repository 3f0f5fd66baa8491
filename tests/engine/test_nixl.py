"""Prompts of another process, read over NIXL, have a fresh server's answers."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import prefiller
import pytest
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.v1.request import RequestStatus

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine

ASKS = [
    Ask((1,), "What do you see?", 24),
    Ask((1, 2), "And what is the difference? " * 2, 24),
    Ask((1, 2), "Is there another?", 16, (("avl", 0),)),
    Ask((2,), "Why? " * 9, 24, (("avl_core_ratio", 0.2),)),
    Ask((3,), "And the rest of it?", 40, (("avl_text_keep_ratio", 0.3),)),
    Ask((), "No picture at all, and more than a block of text around it.", 8),
]
TESTS = Path(prefiller.__file__).parent
NUM_BLOCKS = 80
"""Of the reading server's pool, which holds two of the longest prompts."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY)


@pytest.fixture(scope="module")
def fresh(checkpoint):
    """What a server answers that computes its prompts itself."""
    engine = Engine(checkpoint, max_num_batched_tokens=4096)
    answers = {ask: engine.alone(ask) for ask in ASKS}
    stock = engine.alone(replace(ASKS[0], xargs=(("avl", 0),)))
    assert answers[ASKS[0]] != stock, "nothing was evicted"
    engine.shutdown()
    return answers


class Prefiller:
    """A process that computes prompts."""

    def __init__(self, checkpoint, *avl):
        self._process = subprocess.Popen(
            [sys.executable, prefiller.__file__, str(checkpoint), *avl],
            env=os.environ
            | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "PYTHONPATH": TESTS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _answer(self, asked):
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(prefiller.PREFIX):
                return json.loads(line.removeprefix(prefiller.PREFIX))
        raise AssertionError("the process has ended")

    def prefill(self, ask, max_tokens=1):
        return self._answer(asdict(replace(ask, max_tokens=max_tokens)))

    def num_used(self):
        return self._answer(None)

    def stop(self):
        self._process.stdin.close()
        assert self._process.wait(60) == 0


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module", params=[True, False], ids=["avl", "stock"])
def is_avl(request):
    """Whether the server that computes has the back end of the one that reads."""
    return request.param


@pytest.fixture(scope="module")
def computes(is_avl, checkpoint):
    process = Prefiller(checkpoint, *(["{}"] if is_avl else []))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def reads(is_avl, checkpoint):
    """An adaptive server; a process has one connector, which goes with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        engine = Engine(
            checkpoint,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=(NUM_BLOCKS + 1) * 32 * 512,
            max_model_len=1472,
            kv_transfer_config=prefiller.transfer_config(checks=is_avl),
        )
    yield engine
    engine.shutdown()
    ensure_kv_transfer_shutdown()


def add(engine, name, ask, prefilled):
    params = ask.params()
    where = {"kv_transfer_params": prefilled}
    params.extra_args = (params.extra_args or {}) | where
    engine.llm.llm_engine.add_request(name, engine.prompt(ask), params)


def finish(engine):
    """Step until all have answered; return their tokens, and what was computed here."""
    answers, scheduled = {}, {}
    original = engine.scheduler.schedule

    def schedule(*args, **kwargs):
        output = original(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            name = name.rpartition("-")[0]
            scheduled[name] = scheduled.get(name, 0) + count
        return output

    engine.scheduler.schedule = schedule
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.poison_free_blocks()
        answers |= engine.step()
        engine.check_integrity()
    engine.scheduler.schedule = original
    return answers, scheduled


def is_loading(engine):
    """Whether a request's blocks are on their way, which vLLM does not preempt."""
    loading = RequestStatus.WAITING_FOR_REMOTE_KVS
    return any(one.status == loading for one in engine.scheduler.requests.values())


def test_what_one_process_computes_another_reads_and_evicts(fresh, computes, reads):
    for ask in ASKS:
        reads.llm.reset_prefix_cache()
        # Two tokens would be adapted, did nobody read the prompt.
        prefilled = computes.prefill(ask, max_tokens=2)
        assert prefilled["remote_num_tokens"] > 32
        add(reads, "one", ask, prefilled)
        answers, scheduled = finish(reads)
        assert answers["one"] == fresh[ask], ask
        # The rows that score, and the answer's tokens but the last.
        assert scheduled["one"] < ask.max_tokens + 40
    assert computes.num_used() == 0


def test_in_company_aborted_and_preempted(fresh, computes, reads):
    """Over one picture in a pool that is too small for all; nothing is lost."""
    reads.llm.reset_prefix_cache()
    prefilled = [computes.prefill(ask) for ask in ASKS]
    gone = computes.prefill(ASKS[1])
    for index, (ask, one) in enumerate(zip(ASKS, prefilled, strict=True)):
        add(reads, f"{index}", ask, one)
    add(reads, "gone", ASKS[1], gone)
    reads.step()
    reads.abort("gone")
    answers = {}
    while not (running := reads.scheduler.running) or is_loading(reads):
        answers |= reads.step()
        reads.check_integrity()
    assert running
    assert reads.scheduler.reset_prefix_cache(reset_running_requests=True)
    answers |= finish(reads)[0]
    assert [answers[f"{index}"] for index in range(len(ASKS))] == [
        fresh[ask] for ask in ASKS
    ]
    pool = reads.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert computes.num_used() == 0
