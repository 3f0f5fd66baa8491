"""What of a prompt is stored and core, candidate for candidate."""

import sys

import pytest
import torch
from poisoned import DEVICE, runnable
from vllm_avl.kernels.cpu import rank_rows as rank_on_cpu
from vllm_avl.kernels.cuda import ranking, reference
from vllm_avl.kernels.cuda.rank_rows import rank_rows

MODULE = sys.modules[rank_rows.__module__]


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with runnable(MODULE, ranking):
        yield


def draw(num_rankings, num_candidates, ties):
    scores = torch.rand(num_rankings, num_candidates) ** 8
    return (scores * 4).floor() if ties else scores


def assert_equals_reference(scores, core_scores, num_stored, num_core):
    expected = reference.rank_rows(scores, core_scores, num_stored, num_core)
    device = scores.to(DEVICE), core_scores.to(DEVICE)
    found = rank_rows(*device, num_stored, num_core).cpu()
    assert torch.equal(found, expected)
    # The CPU's ranking: the same tokens are core, and the same are stored.
    candidates, fixed = torch.arange(scores.shape[1]), torch.arange(0)
    sizes = num_stored, num_core
    ours = rank_on_cpu(scores, core_scores, *sizes, candidates, fixed)
    for size in (num_core, num_stored):
        assert torch.equal(ours[:, :size].sort().values, found[:, :size].sort().values)
    return found.tolist()


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("own_core", [False, True], ids=["one-score", "two-scores"])
@pytest.mark.parametrize(
    ("num_rankings", "num_candidates", "num_stored", "num_core"),
    [
        pytest.param(1, 552, 264, 100, id="core"),
        pytest.param(1, 552, 264, 264, id="no-core"),
        pytest.param(1, 2048, 512, 128, id="one-tile"),
        pytest.param(1, 2049, 16, 1, id="a-tile-and-one-core-of-one"),
        pytest.param(3, 700, 650, 8, id="heads-most-stays"),
        pytest.param(1, 300, 300, 100, id="nothing-goes"),
        pytest.param(1, 300, 20, 0, id="core-is-text-alone"),
    ],
)
def test_equals_reference(
    num_rankings, num_candidates, num_stored, num_core, own_core, ties
):
    torch.manual_seed(0)
    scores = draw(num_rankings, num_candidates, ties)
    core_scores = draw(num_rankings, num_candidates, ties) if own_core else scores
    assert_equals_reference(scores, core_scores, num_stored, num_core)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-42])
def test_equal_scores_keep_the_lower_positions(value):
    scores = torch.full((1, 96), value)
    (found,) = assert_equals_reference(scores, scores, 48, 16)
    assert found == list(range(48))


def test_nan_is_below_every_number():
    scores = torch.zeros(1, 96)
    scores[:, :50] = float("nan")
    (found,) = assert_equals_reference(scores, scores, 48, 48)
    assert found == [0, 1, *range(50, 96)]


def test_scores_one_bit_apart_are_told_apart():
    torch.manual_seed(0)
    bits = torch.full((1, 256), 0x3B000000) + torch.randperm(256)
    scores = bits.to(torch.int32).view(torch.float32)
    assert_equals_reference(scores, scores, 128, 64)


def test_of_two_equals_at_the_border_the_first_stays():
    scores = torch.arange(96).float()[None]
    scores[0, [20, 70]] = 47.0
    scores[0, 47] = 0.0
    # 48 stay: 47 are above 47.0, so one of 20 and 70 is the last of them.
    (found,) = assert_equals_reference(scores, scores, 48, 10)
    assert 20 in found
    assert 70 not in found
