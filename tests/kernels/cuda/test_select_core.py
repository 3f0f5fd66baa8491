"""Which rows a refresh lists, request by request, and what it leaves alone."""

import sys

import pytest
import torch
from poisoned import DEVICE, runnable
from vllm_avl.kernels.cuda import ranking, reference
from vllm_avl.kernels.cuda.select_core import select_core

MODULE = sys.modules[select_core.__module__]
NUM_BLOCKS = 200


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE, ranking):
        yield


def step(requests, block_size, num_heads, ties=False, num_lists=1):
    """Buffers of a step; a request is how many slots compete, texts and list."""
    torch.manual_seed(0)
    rows = NUM_BLOCKS * block_size
    scores = torch.full((num_heads, rows), float("nan"))
    tokens = torch.full((rows,), -(2**31), dtype=torch.int32)
    order = (torch.randperm(NUM_BLOCKS - 1) + 1).tolist()
    width = max(stop // block_size for stop, _, _ in requests)
    table = torch.zeros(len(requests), width, dtype=torch.int32)
    for index, (stop, num_text, _) in enumerate(requests):
        blocks = torch.tensor([order.pop() for _ in range(stop // block_size)])
        table[index, : len(blocks)] = blocks
        slots = torch.arange(stop)
        mine = blocks[slots // block_size] * block_size + slots % block_size
        # Multiples of a power of two: sums do not depend on their order.
        drawn = torch.randint(0, 3 if ties else 1 << 18, (num_heads, len(mine)))
        scores[:, mine] = drawn / (1 << 18)
        # After compaction positions are in no order.
        positions = torch.randperm(2 * stop)[: len(mine)]
        in_core = torch.randint(0, 2, positions.shape)
        is_text = torch.randperm(len(mine)) < num_text
        tokens[mine] = torch.where(is_text, ~positions, 2 * positions + in_core).int()
    ends = torch.tensor(requests, dtype=torch.int32).T.contiguous()
    core_list = torch.full((num_lists, rows), -77, dtype=torch.int32)
    return scores, tokens, core_list, table, ends[0], ends[2]


def assert_equals_reference(requests, block_size, num_heads, ties=False, num_lists=1):
    given = step(requests, block_size, num_heads, ties, num_lists)
    answers = []
    for select, device in ((reference.select_core, "cpu"), (select_core, DEVICE)):
        scores, tokens, core_list, table, *ends = (
            part.clone().to(device) for part in given
        )
        entered = torch.full((1,), 5, dtype=torch.int32, device=device)
        select(scores, tokens, core_list, entered, table, block_size, *ends)
        found = tokens, core_list, entered, scores[1:].nan_to_num(-1.0)
        answers.append([part.cpu().tolist() for part in found])
    assert answers[0] == answers[1]
    return answers[1]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("requests", "block_size", "num_heads"),
    [
        pytest.param([(288, 24, 96)], 32, 4, id="one"),
        pytest.param([(2336, 40, 400), (96, 10, 32)], 16, 1, id="two-tiles"),
        pytest.param(
            [(64, 0, 0), (512, 30, 64), (64, 1, 64), (64, 0, 0)],
            64,
            2,
            id="some-do-not-ask",
        ),
        pytest.param([(128, 60, 61)], 128, 3, id="core-of-one"),
    ],
)
def test_equals_reference(requests, block_size, num_heads, ties):
    assert_equals_reference(requests, block_size, num_heads, ties)


def test_who_does_not_ask_is_left_alone():
    requests = [(64, 3, 0), (64, 3, 0)]
    given = step(requests, 32, 2)
    tokens, core_list, entered, _ = assert_equals_reference(requests, 32, 2)
    assert tokens == given[1].tolist()
    assert set(core_list[0]) == {-77}
    assert entered == [5]


def test_lists_of_all_heads_are_alike():
    _, lists, _, _ = assert_equals_reference([(288, 24, 96)], 32, 4, num_lists=4)
    assert len(lists) == 4
    assert lists.count(lists[0]) == 4
