"""With drafts the tokens are those without: whatever is accepted, shared or dropped."""

import json
import random

import pytest
import vllm
from scripted_drafts import CONFIG, Scripted
from sequences import play
from vllm.utils.import_utils import has_arctic_inference

from benchmarks.testing import models
from benchmarks.testing.engine import Ask, Engine
from benchmarks.testing.models import drafters
from vllm_avl.drafters import CACHELESS_DRAFTERS

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
FIRST_TURN = "What do you see? At length."
SETTINGS = (
    (),
    (("avl", 0),),
    (("avl_store_ratio", 0.2),),
    (("avl_store_ratio", 1),),
    (("avl_policy", "h2o"), ("avl_store_ratio", 0.3)),
    (("avl_policy", "snapkv"), ("avl_preset", "lean")),
)
QUESTIONS = [
    Ask(images, text, length, xargs, prefix)
    for images in ((), (1,), (1, 3))
    for text, length in (
        ("Why?", 3),
        (FIRST_TURN, 60),
        (FIRST_TURN + " A lot. And then, what of it?", 40),
    )
    for xargs in SETTINGS
    for prefix in ("", "A system prompt that is longer than a block of tokens. ")
]
NUM_BLOCKS = 43
"""The longest stock request takes 41 of them."""
NUM_SEQUENCES = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return models.build("llava", tmp_path_factory.mktemp("tiny") / "llava", models.TINY)


@pytest.fixture(scope="module", params=["eagle", "draft_model"])
def drafter(request, checkpoint):
    """Options of an engine with a drafter that has layers of its own."""
    method, out_dir = request.param, checkpoint.parent / request.param
    if method == "eagle":
        folder, num_layers = drafters.build(method, checkpoint, out_dir), 1
    else:
        # Its layers have the model's numbers, and are twice as large.
        folder, num_layers = drafters.build_model(checkpoint, out_dir, 2), 4
    return {
        "num_layers": models.TINY.num_layers + num_layers,
        # Of 500 for all, the second of two pictures would find no room in stock's
        # encoder cache, and wait for ever.
        "max_num_batched_tokens": 1300,
        "long_prefill_token_threshold": 500,
        "speculative_config": {
            "method": method,
            "model": str(folder),
            "num_speculative_tokens": 3,
        },
    }


@pytest.fixture(scope="module")
def start(checkpoint):
    """Start engines over one small checkpoint with so many blocks."""
    engines = []

    def start(num_blocks=60, num_layers=models.TINY.num_layers, **options):
        defaults = {
            # 256 bytes a token and layer, and the null block.
            "kv_cache_memory_bytes": (num_blocks + 1) * 32 * 256 * num_layers,
            "max_model_len": 1370,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 500,
        }
        engines.append(Engine(checkpoint, **(defaults | options)))
        return engines[-1]

    yield start
    for engine in engines:
        engine.shutdown()


@pytest.fixture(scope="module")
def expected(start):
    """What an engine without drafts answers; the scripted drafter is taught it."""
    engine = start()
    answers = {}
    for ask in QUESTIONS:
        answers[ask] = engine.alone(ask)
        Scripted.teach_to(engine, ask, answers[ask])
    return answers


@pytest.mark.parametrize("drafts", [CONFIG, NGRAM], ids=lambda c: c["method"])
def test_random_sequences(start, expected, drafts):
    engine = start(NUM_BLOCKS, speculative_config=drafts)
    num_before = Scripted.num_drafts, Scripted.num_accepted
    play_many(engine, expected)
    if drafts is CONFIG:
        num_drafts = Scripted.num_drafts - num_before[0]
        share = (Scripted.num_accepted - num_before[1]) / num_drafts
        assert num_drafts > 1000
        assert 0.2 < share < 0.8, "all drafts are right, or all are wrong"


def play_many(engine, expected, check=lambda asked: None):
    """Play random sequences: every request answers as expected, and nothing is lost.

    Args:
        engine: of few blocks.
        expected: answers by question.
        check: called after each sequence with what was asked, by request id.
    """
    preempted, original = set(), engine.scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.add(request.request_id)
        return original(request, *args, **kwargs)

    engine.scheduler._preempt_request = preempt
    num_aborted = 0
    for seed in range(NUM_SEQUENCES):
        asked, answers, dropped = play(engine, random.Random(seed), QUESTIONS)
        for request_id, tokens in answers.items():
            assert tokens == expected[asked[request_id]], (seed, asked[request_id])
        assert set(answers) | dropped == set(asked)
        num_aborted += len(dropped)
        pool = engine.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, seed
        check(asked)
    assert min(len(preempted), num_aborted) > 3, "the sequences are too tame"


def shift_to_the_next_token(runner):
    """Let a drafter see, at the end of a prompt's chunk, the token that follows.

    Its padded batches have the prompt's last token there, and what is drafted behind
    depends on where chunks ended (docs/decisions.md).
    """
    drafter, execute, scheduled = runner.drafter, runner.execute_model, {}
    original = drafter.prepare_next_token_ids_padded

    def execute_model(scheduler_output, *args, **kwargs):
        scheduled.clear()
        scheduled.update(scheduler_output.num_scheduled_tokens)
        return execute(scheduler_output, *args, **kwargs)

    def prepare(sampled, requests, batch, discarded):
        tokens, num_valid = original(sampled, requests, batch, discarded)
        for row in discarded[: batch.num_reqs].nonzero().flatten().tolist():
            request_id = batch.req_ids[row]
            request = requests[request_id]
            end = request.num_computed_tokens + scheduled[request_id]
            tokens[row] = request.get_token_id(end)
        return tokens, num_valid

    runner.execute_model = execute_model
    drafter.prepare_next_token_ids_padded = prepare


class Drafted:
    """Notes what an engine has drafted behind each beginning of an answer."""

    def __init__(self, engine):
        self._engine, self._step = engine, engine.step
        self._noted = []
        engine.step = self._noting

    def _noting(self):
        finished = self._step()
        for request in self._engine.scheduler.running:
            said = tuple(request.output_token_ids)
            if said:
                name = request.request_id.rpartition("-")[0]
                self._noted.append((name, said, tuple(request.spec_token_ids)))
        return finished

    def take(self, asked):
        """Drafts by question and beginning of the answer, since they were last taken.

        Args:
            asked: questions by request id.
        """
        found = {(asked[name], said): drafts for name, said, drafts in self._noted}
        self._noted.clear()
        return found


def drafts_alone(engine, drafted, asks):
    """What is drafted for each of `asks` with nobody beside it and nothing cached."""
    drafts = {}
    for ask in asks:
        engine.llm.reset_prefix_cache()
        engine.add("one", ask)
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
        drafts |= drafted.take({"one": ask})
    engine.llm.reset_prefix_cache()
    return drafts


def check_drafts_in_company(engine, drafted, asks):
    """Assert that in one batch is drafted what is drafted for each alone."""
    wanted = drafts_alone(engine, drafted, asks)
    for index, ask in enumerate(asks):
        engine.add(f"{index}", ask)
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
    noted = drafted.take({f"{index}": ask for index, ask in enumerate(asks)})
    compared = [key for key in noted if noted[key] and wanted.get(key)]
    assert len(compared) > 20
    for key in compared:
        assert noted[key] == wanted[key], key


def test_a_drafter_with_layers_of_its_own(start, expected, drafter):
    """What it drafts tells whether its layers read what is theirs, and nothing else."""
    alone, engine = start(**drafter), start(NUM_BLOCKS, **drafter)
    for one in (alone, engine):
        shift_to_the_next_token(one.runner)
    wanted = drafts_alone(alone, Drafted(alone), QUESTIONS)
    num_compared, drafted = 0, Drafted(engine)

    def check(asked):
        nonlocal num_compared
        for key, drafts in drafted.take(asked).items():
            # None are asked for of a request that a step leaves out.
            if drafts and wanted.get(key):
                num_compared += 1
                assert drafts == wanted[key], key

    play_many(engine, expected, check)
    assert num_compared > 1000


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("eagle3", "llava"),
        ("eagle3", "qwen3_vl"),
        ("draft_model", "llava"),
        ("mtp", "glm_ocr"),
        pytest.param(
            *("suffix", "llava"),
            marks=pytest.mark.skipif(
                not has_arctic_inference(), reason="needs the package arctic-inference"
            ),
        ),
        # 0.33 has it no more.
        *([("medusa", "llava")] if vllm.__version__.startswith("0.32") else []),
    ],
)
def test_other_drafters(checkpoints, tmp_path, method, name):
    """With a preemption of all and an abort in the middle of drafts."""
    target = checkpoints(name)
    asks = [
        Ask((1,), "What is it?", 30),
        Ask((1, 2), "Why?", 20, (("avl_store_ratio", 0.2),)),
        Ask((), "And now?", 30),
        Ask((1,), "What is it? And where?", 30),
    ]
    drafts, options = {"method": method, "num_speculative_tokens": 3}, {}
    folder = tmp_path / "drafter"
    if method == "eagle3":
        drafts["model"] = str(drafters.build(method, target, folder))
    elif method == "draft_model":
        drafts["model"] = str(drafters.build_model(target, folder))
    elif method == "medusa":
        drafts["model"] = str(drafters.build_medusa(target, folder, 3))
        # VLLM 0.32 looks for it beside the settings of the language model.
        text = json.loads((target / "config.json").read_text())["text_config"]
        options["hf_overrides"] = {"vocab_size": text["vocab_size"]}
    plain = Engine(target, name)
    wanted = [plain.alone(ask) for ask in asks]
    core = {"avl_core_ratio": 0.2, "avl_refresh_interval": 1000}
    reads_less = Ask((2,), "Which?", 30, tuple(core.items()))
    read = plain.alone(reads_less)
    plain.shutdown()
    engine = Engine(target, name, speculative_config=drafts, **options)
    drafted = Drafted(engine)
    # Suffixes are those of all answers.
    if method != "suffix":
        check_drafts_in_company(engine, drafted, asks)
    assert engine.ask(asks) == wanted
    if method in CACHELESS_DRAFTERS:
        assert engine.alone(reads_less) == read
    for index, ask in enumerate(asks):
        engine.add(f"{index}", ask)
    gone = Ask((1,), "Who asks?", 30)
    engine.add("gone", gone)
    answers, num_steps = {}, 0
    while engine.llm.llm_engine.has_unfinished_requests():
        if num_steps == 6:
            engine.abort("gone")
            assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
        engine.poison_free_blocks()
        answers |= engine.step()
        engine.check_integrity()
        num_steps += 1
    assert num_steps > 10
    assert [answers[f"{index}"] for index in range(len(asks))] == wanted
    asked = {f"{index}": ask for index, ask in enumerate(asks)} | {"gone": gone}
    noted = drafted.take(asked)
    assert any(noted.values())
    engine.shutdown()


def test_everything_stored_is_stock_with_drafts(start, expected):
    asks = QUESTIONS[2 : len(QUESTIONS) : 5]
    everything = {"avl": {"store_ratio": 1}, "speculative_config": NGRAM}
    stock = start(avl=None, speculative_config=NGRAM)
    plain = [Ask(a.images, a.text, a.max_tokens, (), a.prefix) for a in asks]
    assert start(**everything).ask(plain) == stock.ask(plain)


@pytest.mark.parametrize("rest", range(4))
def test_what_is_left_of_a_hit_prompt_is_never_one_padded_token(
    start, expected, one_row, rest
):
    """VLLM pads a lone last token to 1 + k; a chunk that was cut then kills it."""
    plain, drafting = one_row
    length = prompt_length(plain, "")
    text = "w" * ((rest - length) % 32)
    ask = Ask((1,), text, 12)
    assert prompt_length(plain, text) % 32 == rest
    wanted = plain.alone(ask)
    drafting.llm.reset_prefix_cache()
    drafting.add("running", Ask((), "Something else.", 60))
    stock = Ask((1,), text, 12, (("avl", 0),))
    wanted_of_stock = plain.alone(stock)
    for index, (one, tokens) in enumerate(
        [(ask, wanted), (stock, wanted_of_stock), (ask, wanted)]
    ):
        drafting.add(f"{index}", one)
        answers = {}
        while f"{index}" not in answers:
            answers |= drafting.step()
        assert answers[f"{index}"] == tokens
        drafting.check_integrity()
    while drafting.llm.llm_engine.has_unfinished_requests():
        drafting.step()


@pytest.fixture(scope="module")
def one_row(start):
    """Engines whose prompts are scored by their last row, without and with drafts."""
    avl = {"observation_window": 1}
    return start(avl=avl), start(avl=avl, speculative_config=NGRAM)


def prompt_length(engine, text):
    (output,) = engine.llm.generate(
        [engine.prompt(Ask((1,), text))], [Ask().params(max_tokens=1)], use_tqdm=False
    )
    return len(output.prompt_token_ids)


def test_a_report_counts_no_rejected_drafts(start, expected):
    engine = start(speculative_config=CONFIG)
    ask = next(a for a in QUESTIONS if a.images and not a.xargs and a.max_tokens > 40)
    engine.add("one", ask)
    lengths = set()
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
        for request in engine.scheduler.running:
            args = (request.request_id,)
            (report,) = engine.llm.collective_rpc("avl_report", args=args)
            if report is not None:
                assert report.num_tokens == request.num_computed_tokens
                lengths.add(report.num_tokens)
    assert len(lengths) > 10
