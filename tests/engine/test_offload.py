"""Prompts whose blocks lie on the host by now are as good as cached ones."""

import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import (
    OffloadingConnector,
)

from benchmarks.testing import late_copies, models
from benchmarks.testing.engine import Ask, Engine
from vllm_avl.support import OFFLOADING, SIMPLE_OFFLOADING

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


@pytest.fixture(params=[SIMPLE_OFFLOADING, OFFLOADING])
def connector(request):
    return request.param


@pytest.fixture
def device(monkeypatch):
    """What copies are made on, up to four steps late."""
    device = late_copies.install(partial(monkeypatch.setattr, raising=False))
    device.most_polls = 4
    return device


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY)


@contextmanager
def serving(
    checkpoint, connector=None, num_host_blocks=400, name="llava", extra=(), **options
):
    """An engine; a process has one connector, which goes with it."""
    if connector:
        num_bytes = num_host_blocks * BYTES_A_BLOCK
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector=connector,
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": num_bytes} | dict(extra),
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


def is_busy(engine):
    """Whether copies are to be made."""
    connector = engine.scheduler.connector
    if isinstance(connector, OffloadingConnector):
        return bool(connector.scheduler._jobs)
    return bool(list(held_by_copies(engine)))


def held_by_copies(engine):
    """Blocks of the pool that copies to and from the host hold."""
    connector = engine.scheduler.connector
    if isinstance(connector, OffloadingConnector):
        return ()
    manager = connector.scheduler_manager
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


def read_by_copies(engine):
    """Free blocks that copies still read; who gets one waits for them."""
    connector = engine.scheduler.connector
    if isinstance(connector, OffloadingConnector):
        return connector.scheduler._block_id_to_pending_jobs
    return ()


def step(engine):
    engine.poison_free_blocks(but=read_by_copies(engine))
    finished = {
        output.request_id: output
        for output in engine.llm.llm_engine.step()
        if output.finished
    }
    engine.check_integrity(held_by_copies(engine))
    return finished


def settle(engine):
    """Wait for all copies, then forget what lies on the device."""
    for _ in range(100):
        if not is_busy(engine):
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


def test_what_was_given_back_comes_from_the_host(checkpoint, fresh, device, connector):
    with serving(checkpoint, connector) as engine:
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
    assert device.num_copies[False] > 40


NATIVE_ONES = [
    Ask((seed,), "What do you see?", 40, (("avl_store_ratio", 0.3),))
    for seed in range(10, 16)
]


def check_host(engine, asks, alone):
    """Assert that what the host has of these prompts is theirs."""
    for ask, expected in zip(asks, alone, strict=True):
        settle(engine)
        (output,) = serve(engine, [ask])
        assert output.num_cached_tokens > 0
        assert tokens_of(output) == expected


# In the larger one a prompt gets none of the blocks that the one before gave back, and
# its kept rows do.
@pytest.mark.parametrize("num_blocks", [36, 72])
def test_who_gets_a_block_waits_for_its_copy(checkpoint, device, num_blocks):
    """The device ends no copy by itself; others get what a prompt gave back."""
    with serving(checkpoint) as engine:
        alone = [engine.alone(ask) for ask in NATIVE_ONES]
    with serving(
        checkpoint,
        OFFLOADING,
        kv_cache_memory_bytes=num_blocks * BYTES_A_BLOCK,
        max_model_len=1024,
    ) as engine:
        device.waits = True
        finished = {}
        for index, ask in enumerate(NATIVE_ONES):
            engine.add(str(index), ask)
            for _ in range(4):
                finished |= step(engine)
        while engine.llm.llm_engine.has_unfinished_requests():
            finished |= step(engine)
        device.waits = False
        assert [tokens_of(finished[str(i)]) for i in range(len(alone))] == alone
        check_host(engine, NATIVE_ONES, alone)


def test_what_was_given_back_is_not_stored_again(checkpoint, device):
    """Everything is to be stored anew while others have a prompt's blocks."""
    one, other = NATIVE_ONES[:2]
    with serving(checkpoint) as engine:
        alone = [engine.alone(ask) for ask in (one, other)]
    with serving(
        checkpoint,
        OFFLOADING,
        kv_cache_memory_bytes=36 * BYTES_A_BLOCK,
        max_model_len=1024,
    ) as engine:
        engine.add("one", one)
        for _ in range(4):
            step(engine)
        engine.add("other", other)
        for _ in range(4):
            step(engine)
        engine.scheduler.reset_connector_cache()
        while engine.llm.llm_engine.has_unfinished_requests():
            step(engine)
        settle(engine)
        for ask, expected in zip((one, other), alone, strict=True):
            (output,) = serve(engine, [ask])
            assert tokens_of(output) == expected
            settle(engine)


def test_an_answer_is_not_stored(checkpoint, device, connector):
    first = replace(ASKS[0], max_tokens=70, xargs=(("avl_store_ratio", 0.2),))
    with serving(checkpoint) as engine:
        tokenizer = engine.llm.get_tokenizer()
        answer = tokenizer.decode(engine.alone(first))
        second = replace(first, text=f"{first.text}\nASSISTANT:{answer}\nUSER:Why?")
        alone = engine.alone(second)
    with serving(checkpoint, connector) as engine:
        (output,) = serve(engine, [first])
        settle(engine)
        (again,) = serve(engine, [second])
        assert tokens_of(again) == alone
        prompt, longer = output.prompt_token_ids, again.prompt_token_ids
        assert longer[: len(prompt)] == prompt
        assert len(longer) - len(prompt) > 70
        assert again.num_cached_tokens == len(prompt) // 32 * 32


def test_beside_sliding_windows(tmp_path, device, connector):
    checkpoint = models.build(
        "gemma3", tmp_path / "gemma3", replace(models.TINY, num_layers=3)
    )
    xargs = (("avl_store_ratio", 0.2),), (("avl", 0),)
    asks = [replace(ASKS[1], xargs=each) for each in xargs]
    with serving(checkpoint, name="gemma3") as engine:
        alone = [engine.alone(ask) for ask in asks]
    options = {"name": "gemma3", "avl": {"introspection": 1}}
    with serving(checkpoint, connector, **options) as engine:
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
    checkpoint, fresh, device, connector, seed, copies_shared
):
    choose, device.random = random.Random(seed), random.Random(seed + 100)
    device.most_polls = (4, 60)[seed % 2]
    # Where a prompt and its copies find no room, it is served as stock.
    num_blocks = [70, 110] if copies_shared else [50, 90]
    with serving(
        checkpoint,
        connector,
        # In the first, stores find no room, and are not to be tried too late.
        num_host_blocks=choose.choice([20, 100, 400]),
        kv_cache_memory_bytes=choose.choice(num_blocks) * BYTES_A_BLOCK,
        max_model_len=1472,
        # A prompt's blocks are copied while it goes on.
        long_prefill_token_threshold=choose.choice([0, 320]),
    ) as engine:
        engine.scheduler._avl_manager.copies_shared = copies_shared
        waiting, running = [], {}
        for turn in range(70):
            if turn < 50 and choose.random() < 0.4:
                index = choose.randrange(len(ASKS))
                engine.add(name := f"{turn}", ASKS[index])
                running[name] = index
            if running and choose.random() < 0.05:
                engine.abort(name := choose.choice(list(running)))
                del running[name]
            if choose.random() < 0.1:
                engine.scheduler.reset_connector_cache()
            waiting += step(engine).items()
        while engine.llm.llm_engine.has_unfinished_requests():
            waiting += step(engine).items()
        for name, output in waiting:
            if name in running:
                assert tokens_of(output) == fresh[running[name]], ASKS[running[name]]
        assert len(waiting) >= 8
        # What lies on the host by now is right, whoever stored it, and when.
        for ask, expected in zip(ASKS, fresh, strict=True):
            settle(engine)
            assert [tokens_of(output) for output in serve(engine, [ask])] == [expected]
        settle(engine)
    assert all(device.num_copies.values())
