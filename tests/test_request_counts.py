"""What usage says of a request's blocks."""

from dataclasses import replace

from vllm_avl.config import AVLConfig
from vllm_avl.front_end.records import Record, counts
from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import make_plan

PLAN = make_plan(600, [(5, 581)], 32, AVLConfig())
NUM_TOKENS = 640


def test_freed_blocks_are_not_held():
    found = counts(Record(decision=PLAN, num_tokens=NUM_TOKENS), block_size=32)
    freed = PLAN.num_freed_blocks(NUM_TOKENS)
    assert freed > 0
    assert found == {
        "requests_adapted": 1,
        "blocks_held": 20 - freed,
        "blocks_freed": freed,
    }


def test_a_shared_prompt_gives_nothing_back():
    plan = replace(PLAN, shares=True)
    found = counts(Record(decision=plan, num_tokens=NUM_TOKENS), block_size=32)
    assert (found["blocks_held"], found["blocks_freed"]) == (20, 0)


def test_a_stock_request_holds_the_servers_blocks():
    found = counts(Record(decision=Stock.OFF, num_tokens=NUM_TOKENS), block_size=64)
    assert found == {"requests_adapted": 0, "blocks_held": 10, "blocks_freed": 0}
