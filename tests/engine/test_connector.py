"""What a KV connector brings or takes away is what the model computed."""

from contextlib import contextmanager

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine

ASKS = [
    Ask((1,), "What do you see?", 24),
    Ask((1, 2), "And what is the difference? " * 2, 24),
    Ask((2,), "Why? " * 9, 24, (("avl_core_ratio", 0.2),)),
    Ask((3,), "And the rest of it?", 40, (("avl_text_keep_ratio", 0.3),)),
    Ask((), "No picture at all, and more than a block of text around it.", 8),
]
AVL, STOCK = {}, None
NAMES = {"avl": AVL, "stock": STOCK}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY)


@contextmanager
def serving(checkpoint, **options):
    """An engine; a process has one connector, which goes with it."""
    engine = Engine(checkpoint, **{"max_num_batched_tokens": 4096} | options)
    try:
        yield engine
    finally:
        engine.shutdown()
        ensure_kv_transfer_shutdown()


def connected(checkpoint, store, avl, **options):
    transfer = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(store)},
    )
    return serving(checkpoint, avl=avl, kv_transfer_config=transfer, **options)


@pytest.fixture(scope="module")
def fresh(checkpoint):
    """What servers without a connector answer."""
    answers = {}
    for name, avl in NAMES.items():
        with serving(checkpoint, avl=avl) as engine:
            answers[name] = [engine.alone(ask) for ask in ASKS]
    return answers


def answer(engine, ask):
    """Return an answer, and how much of the prompt was there."""
    engine.llm.reset_prefix_cache()
    engine.add("one", ask)
    outputs = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.poison_free_blocks()
        outputs += engine.llm.llm_engine.step()
        engine.check_integrity()
    (completion,) = outputs[-1].outputs
    return list(completion.token_ids), outputs[-1].num_cached_tokens


@pytest.mark.parametrize(
    ("saves", "loads"), [("avl", ("avl", "stock")), ("stock", ("avl",))]
)
def test_what_one_server_saves_another_loads(checkpoint, fresh, tmp_path, saves, loads):
    # Without a prefix cache kept rows would go where the connector saves from.
    with connected(
        checkpoint, tmp_path, NAMES[saves], enable_prefix_caching=False
    ) as engine:
        for ask, expected in zip(ASKS, fresh[saves], strict=True):
            tokens, num_cached = answer(engine, ask)
            assert (tokens, num_cached) == (expected, 0)
    for name in loads:
        with connected(checkpoint, tmp_path, NAMES[name]) as engine:
            for ask, expected in zip(ASKS, fresh[name], strict=True):
                tokens, num_cached = answer(engine, ask)
                assert tokens == expected, (name, ask)
                assert num_cached >= 32


def test_a_pool_without_room_for_copies_serves_all_the_same(
    checkpoint, fresh, tmp_path
):
    ask = ASKS[1]
    with connected(
        checkpoint,
        tmp_path,
        AVL,
        # 512 bytes a token; the prompt and its answer, and the null block.
        kv_cache_memory_bytes=48 * 32 * 512,
        max_model_len=1472,
    ) as engine:
        tokens, _ = answer(engine, ask)
        assert tokens == fresh["avl"][1] != fresh["stock"][1]
