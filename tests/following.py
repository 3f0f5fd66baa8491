"""Serves requests step by step, and follows them with the oracle."""

from dataclasses import dataclass

import pytest
import torch
from oracle import Settings

from benchmarks.testing.engine import Ask, picture
from vllm_avl import plan as plans

NUM_STEPS = 64
BUDGET = 2e-4
"""Log-probabilities: what fp32 leaves between two implementations of four layers."""
IMAGES = {"one": (1,), "two": (2, 3), "three": (4, 5, 6)}
TEXT = {
    "one": "What is it?",
    "two": "Compare the two pictures in a long and winding question, " * 3,
    "three": "?",
}
PREFIX = {"one": "", "two": "", "three": "A system prompt before everything. "}


def ask(which, **xargs):
    named = {f"avl_{name}": value for name, value in xargs.items()}
    return Ask(
        IMAGES[which], TEXT[which], NUM_STEPS, tuple(named.items()), PREFIX[which]
    )


class Watched:
    def __init__(self):
        self.reports, self.tokens, self.logprobs, self.plan = {}, [], [], None


@dataclass(frozen=True)
class Followed:
    """What the oracle said of an answer, and whose it was."""

    tokens: list
    rows: dict
    expected: list
    num_ties: int


def watch(engine, asks, turn, before_step=lambda answers: None):
    """Serve `asks` in one batch; report every request after every step."""
    answers = [Watched() for _ in asks]
    for index, one in enumerate(asks):
        engine.add(f"{turn}.{index}", one, logprobs=5)
    worker = engine.core.model_executor.driver_worker.worker
    manager = engine.scheduler._avl_manager
    while engine.llm.llm_engine.has_unfinished_requests():
        before_step(answers)
        plans = {name: known.plan for name, known in manager.adapted.items()}
        outputs = engine.llm.llm_engine.step()
        engine.check_integrity()
        for name in worker.avl_requests():
            if not name.startswith(turn):
                continue
            report, answer = worker.avl_report(name), answers[index_of(name, turn)]
            answer.plan = plans.get(name, answer.plan)
            if report.layers:
                answer.reports[report.num_tokens - report.num_prompt_tokens] = report
        for output in outputs:
            if output.finished:
                completion = output.outputs[0]
                answer = answers[index_of(output.request_id, turn)]
                answer.tokens = list(completion.token_ids)
                answer.logprobs = completion.logprobs
    return answers


def index_of(name, turn):
    return int(name.removeprefix(turn + ".").split("-")[0])


def compare(engine, oracle, one, answer, replayed=1, sizes=None):
    """Follow the product with the oracle; return how many ties were taken over."""
    plan = answer.plan
    if plan is None:
        assert dict(one.xargs)["avl_policy"] == "full"
        return 0
    config = plan.config
    settings = Settings(
        policy=config.policy,
        interval=config.refresh_interval,
        text_keep=config.text_keep_ratio,
        text_heavy=plans.TEXT_HEAVY_RATIO,
        text_min=plans.TEXT_MIN_TOKENS,
        reduction=config.head_reduction,
        window=plan.num_scoring_rows,
        block_size=plan.block_size,
        num_full_tokens=plan.num_full_tokens,
        num_stored_rows=plan.num_stored_rows,
        num_core_rows=plan.num_core_rows,
    )
    rows = {t: by_layer_and_head(r, oracle) for t, r in answer.reports.items()}
    assert len(answer.tokens) == one.max_tokens
    oracle.num_ties = 0
    key = repr((one, settings, replayed, sizes))
    followed = oracle.followed.get(key)
    if followed and (followed.tokens, followed.rows) == (answer.tokens, rows):
        # The oracle would do over again what it has done.
        for step, expected in followed.expected:
            check_logprobs(one, answer, step, expected)
        return followed.num_ties
    steps = oracle.follow(
        engine.prompt(one)["prompt"],
        [picture(seed) for seed in one.images],
        settings,
        answer.tokens,
        lambda step, layer, head: rows[step][layer][head],
        draw,
        replayed,
        sizes,
    )
    said = []
    for step, expected in steps:
        check_logprobs(one, answer, step, expected)
        if step == oracle.step:
            check_memories(oracle, rows[step], step)
        said.append((step, expected))
    oracle.followed[key] = Followed(answer.tokens, rows, said, oracle.num_ties)
    return oracle.num_ties


def check_logprobs(one, answer, step, expected):
    for token, logprob in answer.logprobs[step].items():
        assert logprob.logprob == pytest.approx(expected[token].item(), abs=BUDGET), (
            step,
            one.xargs,
        )
    assert expected[answer.tokens[step]] >= expected.max() - BUDGET


def by_layer_and_head(report, oracle):
    """(stored, read) positions of every layer and KV head of a report."""
    result = []
    for layer in report.layers:
        heads = [
            (set(core) | set(secondary) | set(text), set(core) | set(text))
            for core, secondary, text in zip(
                layer.core, layer.secondary, layer.text, strict=True
            )
        ]
        repeats = oracle.num_kv_heads // len(heads)
        result.append([head for head in heads for _ in range(repeats)])
    return result


def check_memories(oracle, rows, step):
    """0 disagreements: ties have been taken over, everything else is equal."""
    for layer, heads in enumerate(oracle.memories):
        for head, memory in enumerate(heads):
            stored, read = rows[layer][head]
            assert memory.stored == stored, (step, layer, head)
            assert memory.core == read, (step, layer, head)


def draw(layer, length, ranked):
    """The draw of the product's `random` policy, by position."""
    generator = torch.Generator().manual_seed(length * 1009 + layer)
    values = torch.rand(len(ranked), generator=generator).tolist()
    return dict(zip(ranked, values, strict=True))
