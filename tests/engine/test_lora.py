"""LoRA adapters: adaptive requests answer through theirs, in one batch with others."""

import pytest
from adapters import make_adapter
from vllm.lora.request import LoRARequest

from benchmarks.testing.engine import Ask, Engine

ASKS = [Ask((1,), "What is it?", 20), Ask((2, 3), "Compare the two.", 20)]


@pytest.fixture(scope="module")
def adapters(checkpoints, tmp_path_factory):
    made = []
    for seed in (1, 2):
        path = tmp_path_factory.mktemp("lora")
        make_adapter(checkpoints("llava"), path, seed)
        made.append(LoRARequest(f"adapter-{seed}", seed, str(path)))
    return made


def ask(engine, asks, adapters):
    outputs = engine.llm.generate(
        [engine.prompt(ask) for ask in asks],
        [ask.params() for ask in asks],
        lora_request=adapters,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture
def start(checkpoints):
    running = []

    def engine(avl):
        options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
        running.append(Engine(checkpoints("llava"), avl=avl, **options))
        return running[-1]

    yield engine
    for engine in running:
        engine.shutdown()


def test_two_adapters_in_one_batch(start, adapters):
    engine = start({"store_ratio": 0.3})
    one, two = adapters
    by_one, by_two = ask(engine, ASKS, [one, one]), ask(engine, ASKS, [two, two])
    assert by_one != by_two
    assert by_one != ask(engine, ASKS, [None, None])
    mixed = ask(engine, ASKS * 2, [one, two, two, one])
    assert mixed == [by_one[0], by_two[1], by_two[0], by_one[1]]


def test_identity(start, adapters):
    mixes = [[adapters[0], adapters[1]], [adapters[1], None], [None, None]]
    stock = start(None)
    expected = [ask(stock, ASKS, mix) for mix in mixes]
    stock.shutdown()
    ours = start({"store_ratio": 1.0})
    assert [ask(ours, ASKS, mix) for mix in mixes] == expected
