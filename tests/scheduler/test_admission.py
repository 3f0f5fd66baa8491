"""Which requests are adaptive, and where their vision tokens are."""

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_avl.config import AVLConfig
from vllm_avl.metrics.definitions import Stock
from vllm_avl.scheduler.admission import plan_request, vision_ranges


def feature(offset, length, modality="image", is_embed=None):
    position = PlaceholderRange(offset=offset, length=length, is_embed=is_embed)
    return MultiModalFeatureSpec(None, modality, "id", position, mm_hash="id")


def request(features, params=None, pooling=None, **options):
    if pooling is None:
        params = params or SamplingParams(max_tokens=8)
    return Request("r", [1] * 700, params, pooling, mm_features=features, **options)


def plan(*args, **kwargs):
    return plan_request(request(*args, **kwargs), AVLConfig(), 32)


IMAGE = [feature(5, 576)]


def asking(**xargs):
    return {"params": SamplingParams(max_tokens=8, extra_args=xargs)}


def test_a_picture_is_adaptive():
    assert plan(IMAGE).first_stored_block > 0
    assert plan([feature(5, 576, "video")]) == plan(IMAGE)


@pytest.mark.parametrize(
    ("unit", "num_rows"), [(None, 32), (160, 32), (690, 10), (698, 2), (350, 32)]
)
def test_rows_that_score_lie_behind_the_last_border_of_chunks(unit, num_rows):
    planned = plan_request(request(IMAGE), AVLConfig(), 32, unit)
    assert planned.num_scoring_rows == num_rows


def test_a_lone_token_behind_the_last_border_of_chunks_is_stock():
    alone = plan_request(request(IMAGE), AVLConfig(), 32, 699)
    assert alone is Stock.NOTHING_TO_SAVE


READ_ELSEWHERE = {
    "params": SamplingParams(
        max_tokens=8, extra_args={"kv_transfer_params": {"do_remote_decode": True}}
    )
}


@pytest.mark.parametrize(
    ("features", "options", "reason"),
    [
        ([], {}, Stock.NO_VISION),
        ([feature(5, 576, "audio")], {}, Stock.NO_VISION),
        ([feature(5, 4)], {}, Stock.NOTHING_TO_SAVE),
        (IMAGE, {"params": SamplingParams(max_tokens=1)}, Stock.ONE_TOKEN),
        (IMAGE, READ_ELSEWHERE, Stock.REMOTE_DECODE),
        (IMAGE, asking(avl=0), Stock.OFF),
        (IMAGE, asking(avl_policy="full"), Stock.POLICY_FULL),
        (IMAGE, asking(avl_store_ratio=1), Stock.NOTHING_TO_SAVE),
        (IMAGE, {"pooling": PoolingParams(task="embed")}, Stock.POOLING),
        (IMAGE, {"resumable": True}, Stock.STREAMING_INPUT),
    ],
    ids=[
        "text",
        "audio",
        "nothing-to-free",
        "one-token",
        "read-elsewhere",
        "off",
        "full",
        "all-stored",
        "pooling",
        "streaming-session",
    ],
)
def test_served_as_stock(features, options, reason):
    assert plan(features, **options) is reason


def test_a_ratio_of_the_requests_own():
    params = SamplingParams(max_tokens=8, extra_args={"avl_store_ratio": 0.1})
    assert plan(IMAGE, params).num_stored_blocks < plan(IMAGE).num_stored_blocks


def test_ranges_leave_out_what_is_not_embedded():
    mask = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.bool)
    both = [feature(20, 6, is_embed=mask), feature(3, 4)]
    assert vision_ranges(request(both)) == [(3, 7), (21, 23), (24, 25)]


def test_the_window_reaches_back_to_the_last_pictures_first_placeholder():
    mask = torch.ones(400, dtype=torch.bool)
    mask[::20] = False
    params = SamplingParams(max_tokens=8)
    config = AVLConfig(policy="snapkv", observation_window=256)
    rows = [feature(5, 200), feature(290, 400, is_embed=mask)]
    made = plan_request(request(rows, params), config, 32)
    assert made.num_scoring_rows == 256
    short = plan_request(request([feature(5, 575, is_embed=None)]), config, 32)
    assert short.num_scoring_rows == 256
    late = [feature(5, 400), feature(650, 40)]
    assert plan_request(request(late), config, 32).num_scoring_rows == 50


def test_no_row_of_a_picture_scores_where_chunks_may_not_end_in_one():
    config = AVLConfig(policy="snapkv", observation_window=256)
    whole = {"whole_pictures": True}
    late = request([feature(5, 400), feature(450, 200)])
    assert plan_request(late, config, 32).num_scoring_rows == 250
    assert plan_request(late, config, 32, **whole).num_scoring_rows == 50
    lone = request([feature(5, 400), feature(499, 200)])
    assert plan_request(lone, config, 32).num_scoring_rows == 201
    assert plan_request(lone, config, 32, **whole) is Stock.NOTHING_TO_SAVE
