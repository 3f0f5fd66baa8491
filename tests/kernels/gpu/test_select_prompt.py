"""What of a prompt is stored, moved and listed, token for token."""

import sys

import pytest
import torch
from poisoned import DEVICE, runnable
from vllm_avl.kernels.gpu import ranking, reference
from vllm_avl.kernels.gpu.select_prompt import select_prompt

MODULE = sys.modules[select_prompt.__module__]
POISON = -77


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE, ranking):
        yield


def prompt(num_slots, num_text, block_size, ties=False):
    """Scores, what competes and shuffled blocks; text lies around the picture."""
    torch.manual_seed(0)
    scores = torch.rand(num_slots) ** 8
    if ties:
        scores = (scores * 4).floor()
    competes = torch.ones(num_slots, dtype=torch.bool)
    competes[: num_text // 2] = False
    competes[num_slots - num_text + num_text // 2 :] = False
    num_blocks = num_slots // block_size
    return scores, competes, torch.randperm(3 * num_blocks)[:num_blocks] + 1


def assert_equals_reference(given, block_size, start, num_core):
    scores, competes, blocks = given
    num_stored = int(competes.sum()) - start
    rows = (3 * len(blocks) + 1) * block_size
    answers = []
    for select, device in ((reference.select_prompt, "cpu"), (select_prompt, DEVICE)):
        buffers = [
            torch.full((rows,), POISON, dtype=torch.int32, device=device)
            for _ in range(2 if num_core else 0)
        ]
        tensors = scores.to(device), competes.to(device), blocks.int().to(device)
        source, target = select(
            *tensors, block_size, start, num_stored, num_core, *buffers
        )
        real = source >= 0
        found = [source, target[real], *buffers]
        answers.append([part.cpu().tolist() for part in found])
    assert answers[0] == answers[1]
    return answers[1]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("num_slots", "num_text", "block_size", "start", "num_core"),
    [
        pytest.param(576, 24, 32, 288, 100, id="core"),
        pytest.param(576, 24, 32, 288, 0, id="no-core"),
        pytest.param(2048, 0, 64, 512, 128, id="one-tile-all-vision"),
        pytest.param(2064, 7, 16, 16, 1, id="tile-and-a-block-core-of-one"),
        pytest.param(4608, 100, 128, 4352, 50, id="little-stays"),
        pytest.param(640, 600, 16, 32, 8, id="mostly-text"),
        pytest.param(320, 20, 32, 0, 100, id="nothing-goes"),
    ],
)
def test_equals_reference(num_slots, num_text, block_size, start, num_core, ties):
    given = prompt(num_slots, num_text, block_size, ties)
    assert_equals_reference(given, block_size, start, num_core)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-42])
def test_equal_scores_keep_the_lower_positions(value):
    scores, competes, blocks = prompt(96, 0, 16)
    scores[:] = value
    source, _, tokens, _ = assert_equals_reference(
        (scores, competes, blocks), 16, 48, 16
    )
    assert source == list(range(48))
    assert sorted(t // 2 for t in tokens if t >= 0 and t % 2) == list(range(16))


def test_nan_is_below_every_number():
    scores, competes, blocks = prompt(96, 0, 16)
    scores[:50] = float("nan")
    scores[50:] = 0.0
    source, _, _, _ = assert_equals_reference((scores, competes, blocks), 16, 48, 16)
    assert source[:2] == [0, 1]
    assert set(source[2:]) == {-1}


def test_scores_one_bit_apart_are_told_apart():
    scores, competes, blocks = prompt(256, 0, 16)
    bits = torch.full((256,), 0x3B000000) + torch.randperm(256)
    scores = bits.to(torch.int32).view(torch.float32)
    assert_equals_reference((scores, competes, blocks), 16, 128, 64)


def test_of_two_equals_at_the_border_the_first_stays():
    scores, competes, blocks = prompt(96, 0, 16)
    scores = torch.arange(96).float()
    scores[[20, 70]] = 47.0
    scores[47] = 0.0
    # 48 stay: 47 are above 47.0, so one of slots 20 and 70 is the last of them.
    source, _, _, _ = assert_equals_reference((scores, competes, blocks), 16, 48, 16)
    assert [slot for slot in source if slot >= 0] == [20]
