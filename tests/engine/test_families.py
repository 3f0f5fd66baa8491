"""Every model family, on vLLM's own code for it: what must hold is the same for all.

Two engines a family, stock and adaptive, with a pool that several requests overfill.
"""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hand_driven import asked, finish_step, make_scheduler, walk_lengths
from vllm.v1.core.kv_cache_utils import get_group_id

from benchmarks.testing.engine import Ask, Engine
from vllm_avl.compat.platform import block_size
from vllm_avl.scheduler.scheduler import AVLScheduler


@dataclass(frozen=True)
class Family:
    """How a family's engines are started."""

    name: str
    num_blocks: int
    """Of the pool: less than eight requests want."""
    groups: tuple[str, ...] = ("AVLSpec",)
    """Kinds of its cache groups."""
    options: dict = field(default_factory=dict)
    num_growing: int = 60
    """Tokens in which an answer grows by a block at least."""


FAMILIES = [
    Family("qwen3_vl", 34),
    Family("glm4_1v", 34),
    Family("mistral3", 34),
    Family("pixtral", 60),
    Family("llava_onevision", 50),
    Family("gemma3", 86, ("SlidingWindowSpec", "SlidingWindowSpec", "AVLSpec")),
    Family(
        "gemma4",
        64,
        ("SlidingWindowSpec", "SlidingWindowSpec", "AVLSpec"),
        # A video may have more tokens than a step.
        {"limit_mm_per_prompt": {"image": 2, "video": 0}},
    ),
    Family(
        "llama4",
        100,
        ("ChunkedLocalAttentionSpec", "ChunkedLocalAttentionSpec", "AVLSpec"),
        # The first block that it needs is one of those that an ended chunk frees.
        num_growing=100,
    ),
    # vLLM's CPU kernels of recurrent states are for bf16 alone.
    Family(
        "qwen3_5",
        26,
        ("MambaSpec", "MambaSpec", "AVLSpec"),
        {"dtype": "bfloat16", "max_model_len": 1280, "max_num_batched_tokens": 1024},
        150,
    ),
]
NUM_LIKELY, NEAR = 5, 0.5
"""Of a token that bf16 may turn into another: the likeliest, and how near they are."""
ASKS = [
    Ask((1,), "What is it?", 20),
    Ask((2, 3), "Compare these.", 20),
    Ask((), "No picture.", 8),
    Ask((4,), "And this one? " * 4, 24),
    Ask((1, 3), "Which is it?", 16),
]
STORE = (("avl_store_ratio", 0.3),)
SETTINGS = {
    "store": STORE,
    "core": (("avl_store_ratio", 0.6), ("avl_core_ratio", 0.2)),
    "core-of-all": (("avl_store_ratio", 1), ("avl_core_ratio", 0.2)),
    "text": (*STORE, ("avl_core_ratio", 0.2), ("avl_text_keep_ratio", 0.3)),
    "h2o": (*STORE, ("avl_core_ratio", 0.2), ("avl_policy", "h2o")),
    "snapkv": (*STORE, ("avl_core_ratio", 0.2), ("avl_policy", "snapkv")),
    "fastv": (*STORE, ("avl_policy", "fastv")),
}
OFF = (("avl", 0),)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pair(family, checkpoints):
    options = {
        "num_gpu_blocks_override": family.num_blocks,
        "max_model_len": 1024,
        "max_num_batched_tokens": 640,
        "limit_mm_per_prompt": {"image": 2},
    }
    options |= family.options
    checkpoint = checkpoints(family.name)
    engines = [
        Engine(checkpoint, family.name, avl=avl, **options) for avl in (None, {})
    ]
    kinds = [
        type(group.kv_cache_spec).__name__
        for group in engines[1].scheduler.kv_cache_config.kv_cache_groups
    ]
    assert tuple(sorted(kinds)) == tuple(sorted(family.groups))
    yield engines
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def expected(pair):
    """Stock's answers."""
    return pair[0].ask(ASKS)


def with_xargs(xargs, asks=ASKS):
    return [replace(ask, xargs=xargs) for ask in asks]


def test_identity(pair, expected):
    _, ours = pair
    assert ours.ask(with_xargs(OFF)) == expected
    assert ours.ask(with_xargs((("avl_store_ratio", 1),))) == expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_batch_is_what_each_is_alone(pair, expected, setting):
    _, ours = pair
    asks = with_xargs(SETTINGS[setting])
    alone = [ours.alone(ask) for ask in asks]
    assert alone[2] == expected[2], "a text is served as stock"
    assert alone != expected
    ours.llm.reset_prefix_cache()
    # Replays of core and text are defined otherwise: test_replay.py has them.
    together = asks if setting == "store" else asks[:3]
    answers, num_preempted = play(ours, together)
    check_equal(ours, together, answers, alone)
    assert num_preempted == 0 or setting == "store"


def test_preempted_requests_give_what_they_give_alone(family, pair):
    _, ours = pair
    asks = [
        Ask((image,), f"Number {image}?", family.num_growing, STORE)
        for image in range(8)
    ]
    alone = [ours.alone(ask) for ask in asks]
    ours.llm.reset_prefix_cache()
    answers, num_preempted = play(ours, asks, is_squeezed=True)
    check_equal(ours, asks, answers, alone)
    assert num_preempted > 0


def test_blocks_come_free(pair):
    _, ours = pair
    num_held = {}
    for xargs in (OFF, STORE):
        ours.llm.reset_prefix_cache()
        ours.add("x", replace(ASKS[1], xargs=xargs))
        held = []
        while not ours.step():
            pool = ours.scheduler.kv_cache_manager.block_pool
            held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        num_held[xargs] = held[-1]
        ours.check_integrity()
    assert num_held[STORE] < num_held[OFF]


def test_prefix_orders(pair):
    """Whoever comes first over a common prefix, each gets what a fresh server gives."""
    _, ours = pair
    one, other = replace(ASKS[1], max_tokens=50), replace(ASKS[1], text="Why so?")
    asks = [*with_xargs(STORE, [one, other]), *with_xargs(OFF, [one, other])]
    alone = [ours.alone(ask) for ask in asks]
    for order in ((0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 1, 3, 0)):
        ours.llm.reset_prefix_cache()
        for index in order:
            ours.poison_free_blocks()
            answers = ours.ask([asks[index]])
            check_equal(ours, [asks[index]], answers, [alone[index]])
            ours.check_integrity()
    ours.llm.reset_prefix_cache()
    answers, _ = play(ours, asks)
    check_equal(ours, asks, answers, alone)


def test_second_turn(pair):
    _, ours = pair
    tokenizer = ours.llm.get_tokenizer()
    first = replace(ASKS[1], text="Compare these, please. " * 6, xargs=STORE)
    answer = tokenizer.decode(ours.alone(first))
    text = f"{first.text}\nASSISTANT:{answer}\nUSER:And what is that?"
    second = replace(first, text=text)
    alone = ours.alone(second)
    ours.alone(first)
    (output,) = ours.llm.generate(ours.prompt(second), second.params(), use_tqdm=False)
    check_equal(ours, [second], [list(output.outputs[0].token_ids)], [alone])
    assert output.num_cached_tokens > 0


def test_the_front_end_counts_blocks_of_the_adapted_layers(pair):
    """Other groups' blocks may hold more or fewer tokens."""
    _, ours = pair
    expected = ours.scheduler._avl_manager.block_size
    assert block_size(ours.llm.llm_engine.vllm_config) == expected


def test_no_length_hangs(pair):
    """Prompts that end around block borders, and around those of the scoring rows."""
    _, ours = pair
    size = ours.scheduler._avl_manager.block_size
    base = num_prompt_tokens(ours, Ask((1,), "x"))
    asks = []
    for border in (size, size // 2, 64 % size):
        first = (border - base) % size
        for offset in range(-3, 4) if border == size else (-1, 0, 1):
            length = (first + offset) % size
            asks.append(Ask((1,), "x" + "y" * length, 3, STORE))
    answers, _ = play(ours, asks)
    assert all(len(answer) == 3 for answer in answers)


@pytest.mark.parametrize("num_batched", [300, 4096])
@pytest.mark.parametrize("behind", [(1, 2), (31, 32, 33), (200,)])
def test_every_length_ends(pair, num_batched, behind):
    """On the scheduler alone, with this family's cache groups."""
    scheduler = start_scheduler(pair[1], num_batched)
    # A picture of four blocks frees some.
    size = 4 * scheduler._avl_manager.block_size
    lengths = range(1, 1201)
    num_adapted = walk_lengths(scheduler, lengths, behind, size)
    assert num_adapted > len(lengths) / 4


@pytest.mark.parametrize("adapted", [True, False])
def test_an_answer_is_in_no_prefix_cache(pair, adapted):
    """Of no group: all its layers have seen less than all. A stock answer's is."""
    # Not only what another turn may hit, vLLM's default.
    scheduler = start_scheduler(pair[1], 4096, retention_interval=None)
    groups = scheduler.kv_cache_manager.coordinator.single_type_managers
    largest = max(group.block_size for group in groups)
    one = asked(
        "x",
        5,
        [("picture", 4 * largest, 40)],
        4 * largest,
        hash_block_size=scheduler.hash_block_size,
        avl=int(adapted),
    )
    scheduler.add_request(one)
    of_prompt = set()
    while scheduler.has_unfinished_requests():
        finish_step(scheduler, scheduler.schedule())
        if one.num_output_tokens == 1:
            of_prompt = hashes(scheduler)
    num_more = Counter(get_group_id(each) for each in hashes(scheduler) - of_prompt)
    assert of_prompt
    found = [num_more[index] > 0 for index in range(len(groups))]
    assert found == [not adapted] * len(groups)


def hashes(scheduler):
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    return {block.block_hash for block in blocks if block.block_hash is not None}


def start_scheduler(engine, num_batched, **options):
    return make_scheduler(
        AVLScheduler,
        engine.core,
        3000,
        {"store_ratio": 0.3},
        max_num_seqs=64,
        max_num_batched_tokens=num_batched,
        **options,
    )


def check_equal(engine, asks, answers, alone):
    """Assert equal tokens; in bf16, that the first other one is nearly as likely.

    Sums in bf16 depend on who else is in the batch, on stock, too.
    """
    for ask, got, expected in zip(asks, answers, alone, strict=False):
        if got == expected:
            continue
        assert "bfloat16" in str(engine.llm.llm_engine.model_config.dtype), ask
        first = next(i for i, token in enumerate(got) if token != expected[i])
        engine.llm.reset_prefix_cache()
        params = ask.params(logprobs=NUM_LIKELY)
        (output,) = engine.llm.generate(engine.prompt(ask), params, use_tqdm=False)
        likely = output.outputs[0].logprobs[first]
        assert got[first] in likely, (ask, first)
        gap = likely[expected[first]].logprob - likely[got[first]].logprob
        assert gap < NEAR, (ask, first, gap)


def num_prompt_tokens(engine, ask):
    engine.add("length", ask)
    engine.step()
    (request,) = engine.scheduler.requests.values()
    length = request.num_prompt_tokens
    while not engine.step():
        pass
    return length


def play(engine, asks, is_squeezed=False):
    """Answer `asks` at once, poisoning what nobody may read; count preemptions.

    Args:
        engine: to ask.
        asks: the requests.
        is_squeezed: once two of them answer, take all free blocks of the pool until
            one is preempted.
    """
    for index, ask in enumerate(asks):
        engine.add(str(index), ask)
    scheduler = engine.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    answers, num_steps, preempted, withheld = {}, 0, set(), []
    original = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.add(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    while len(answers) < len(asks):
        engine.poison_free_blocks()
        answers |= engine.step()
        num_answering = sum(one.num_output_tokens > 0 for one in scheduler.running)
        if is_squeezed and not preempted and num_answering > 1:
            withheld += pool.get_new_blocks(pool.get_num_free_blocks())
        elif withheld:
            pool.free_blocks(withheld)
            withheld = []
        engine.check_integrity(block.block_id for block in withheld)
        num_steps += 1
        assert num_steps < 100 * len(asks), "nobody progresses"
    scheduler._preempt_request = original
    return [answers[str(index)] for index in range(len(asks))], len(preempted)
