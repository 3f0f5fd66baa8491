"""Prompts whose blocks lie on the host by now are as good as cached ones."""

import random
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import pytest
from late_copies import LateCopies, install
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine

SIZE = models.ModelSize(
    hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_size=32
)
BYTES_A_BLOCK = 32 * 512
ASKS = [
    Ask((1,), "What do you see?", 24),
    Ask((1, 2), "And what is the difference? " * 2, 24),
    Ask((1, 2), "Is there another?", 16, (("avl", 0),)),
    Ask((2,), "Why? " * 9, 24, (("avl_core_ratio", 0.2),)),
    Ask((3,), "And the rest of it?", 40, (("avl_text_keep_ratio", 0.3),)),
    Ask((1,), "What do you see?", 24, (("avl_store_ratio", 0.2),)),
    Ask((1, 2), "All of it?", 16, (("avl_store_ratio", 1), ("avl_core_ratio", 0.2))),
    Ask((), "No picture at all, and more than a block of text around it.", 8),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", SIZE)


@contextmanager
def serving(checkpoint, num_host_blocks=None, name="llava", **options):
    """An engine; a process has one connector, which goes with it."""
    if num_host_blocks:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector="SimpleCPUOffloadConnector",
            kv_role="kv_both",
            kv_connector_extra_config={
                "cpu_bytes_to_use": num_host_blocks * BYTES_A_BLOCK
            },
        )
    engine = Engine(checkpoint, name, **{"max_num_batched_tokens": 4096} | options)
    try:
        yield engine
    finally:
        engine.shutdown()
        ensure_kv_transfer_shutdown()


@pytest.fixture(scope="module")
def fresh(checkpoint):
    """What a server without offloading answers to each alone."""
    with serving(checkpoint) as engine:
        return [engine.alone(ask) for ask in ASKS]


def in_flight(engine):
    """Blocks of the pool that copies to and from the host hold."""
    manager = engine.scheduler.connector.scheduler_manager
    transfers = chain(
        manager._store_event_to_blocks.values(),
        manager._abandoned_store_event_to_blocks.values(),
        manager._pending_finished_stores,
        (
            load.transfer_meta
            for loads in (manager._reqs_to_load, manager._abandoned_reqs_to_load)
            for load in loads.values()
        ),
    )
    return chain.from_iterable(transfer.gpu_block_ids for transfer in transfers)


def step(engine):
    engine.poison_free_blocks()
    finished = {
        output.request_id: output
        for output in engine.llm.llm_engine.step()
        if output.finished
    }
    engine.check_integrity(in_flight(engine))
    return finished


def settle(engine):
    """Wait for all copies, then forget what lies on the device."""
    for _ in range(100):
        if not list(in_flight(engine)):
            break
        engine.core.step()
    assert engine.llm.reset_prefix_cache()


def serve(engine, asks):
    for index, ask in enumerate(asks):
        engine.add(str(index), ask)
    finished = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        finished |= step(engine)
    return [finished[str(index)] for index in range(len(asks))]


def tokens_of(output):
    return list(output.outputs[0].token_ids)


def test_what_was_given_back_comes_from_the_host(checkpoint, fresh, monkeypatch):
    install(monkeypatch)
    with serving(checkpoint, num_host_blocks=400) as engine:
        for ask, expected in zip(ASKS, fresh, strict=True):
            engine.llm.reset_prefix_cache(reset_connector=True)
            (first,) = serve(engine, [ask])
            assert tokens_of(first) == expected
            settle(engine)
            (again,) = serve(engine, [ask])
            assert tokens_of(again) == expected
            # All that stock would find but the rows that score.
            most = (len(first.prompt_token_ids) - 1) // 32 * 32
            assert most - 32 <= again.num_cached_tokens <= most, ask
            assert again.num_cached_tokens >= 32
            settle(engine)
    assert LateCopies.num_blocks[False] > 40


def test_beside_sliding_windows(tmp_path, monkeypatch):
    checkpoint = models.build(
        "gemma3", tmp_path / "gemma3", replace(SIZE, num_layers=3)
    )
    xargs = (("avl_store_ratio", 0.2),), (("avl", 0),)
    asks = [replace(ASKS[1], xargs=each) for each in xargs]
    with serving(checkpoint, name="gemma3") as engine:
        alone = [engine.alone(ask) for ask in asks]
    install(monkeypatch)
    options = {"name": "gemma3", "avl": {"introspection": 1}}
    with serving(checkpoint, num_host_blocks=400, **options) as engine:
        for first, second in ((0, 1), (1, 0), (0, 0)):
            engine.llm.reset_prefix_cache(reset_connector=True)
            (output,) = serve(engine, [asks[first]])
            assert tokens_of(output) == alone[first]
            settle(engine)
            (output,) = serve(engine, [asks[second]])
            assert tokens_of(output) == alone[second]
            # The prompt's 11 whole blocks, but for those that score.
            assert output.num_cached_tokens == (320 if second == 0 else 352)
            settle(engine)
        worker = engine.core.model_executor.driver_worker.worker
        assert worker.avl_report(worker.avl_requests()[-1]).num_blocks_freed > 0


@pytest.mark.parametrize("copies_shared", [False, True], ids=["cpu", "as-on-cuda"])
@pytest.mark.parametrize("seed", range(4))
def test_random_company_in_a_short_pool(
    checkpoint, fresh, monkeypatch, seed, copies_shared
):
    install(monkeypatch)
    choose = random.Random(seed)
    monkeypatch.setattr(LateCopies, "random", choose)
    # Where a prompt and its copies find no room, it is served as stock.
    num_blocks = [70, 110] if copies_shared else [50, 90]
    with serving(
        checkpoint,
        num_host_blocks=choose.choice([100, 400]),
        kv_cache_memory_bytes=choose.choice(num_blocks) * BYTES_A_BLOCK,
        max_model_len=1472,
        # A prompt's blocks are copied while it goes on.
        long_prefill_token_threshold=choose.choice([0, 320]),
    ) as engine:
        engine.scheduler._avl_manager.copies_shared = copies_shared
        waiting, running = [], {}
        for turn in range(60):
            if turn < 40 and choose.random() < 0.4:
                index = choose.randrange(len(ASKS))
                engine.add(name := f"{turn}", ASKS[index])
                running[name] = index
            if running and choose.random() < 0.05:
                engine.abort(name := choose.choice(list(running)))
                del running[name]
            waiting += step(engine).items()
        while engine.llm.llm_engine.has_unfinished_requests():
            waiting += step(engine).items()
        for name, output in waiting:
            if name in running:
                assert tokens_of(output) == fresh[running[name]], ASKS[running[name]]
        assert len(waiting) >= 8
        settle(engine)
    assert all(LateCopies.num_blocks.values())
