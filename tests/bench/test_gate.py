"""Nothing is timed where a compiled loop computes something else than eager code."""

import pytest

from benchmarks import checkpoints
from benchmarks.engines import requests, started
from benchmarks.gate import check_loops
from benchmarks.testing.models import ModelSize
from vllm_avl.worker.cpu import cache

SIZE = ModelSize(
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)
CORE = {"avl_store_ratio": 0.5, "avl_core_ratio": 0.3, "avl_refresh_interval": 2}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def engine(request, tmp_path_factory):
    model = checkpoints.build(tmp_path_factory.mktemp("gate"), SIZE, request.param)
    sizes = {
        "pool_bytes": 2000 * model.bytes_per_token,
        "block_size": 32,
        "max_num_seqs": 2,
        "max_model_len": 1000,
        "threads": 1,
    }
    with started(model, {"avl": {"settings": {}}}, **sizes) as engines:
        yield engines["avl"]


@pytest.fixture(scope="module")
def sample():
    return requests(2, 1, 6)


def test_what_is_right_is_let_through(engine, sample, capsys):
    check_loops(engine, sample, CORE)
    found = capsys.readouterr().out
    assert all(f"{loop} " in found for loop in ("attend", "refresh", "score", "rank"))
    check_loops(engine, sample)
    assert "score" in capsys.readouterr().out


def near(result, part=0.001):
    """Off by a part of its size."""
    return result + part * result.square().mean().sqrt()


def attend_off(query, kv_cache, rows, masks, output, *numbers, **form):
    arguments = query, kv_cache, rows, masks, output, *numbers
    weights = CORRECT["selected_attention"](*arguments, **form)
    # A bfloat16 is as near as this.
    output.copy_(near(output, 0.01))
    return weights


def see_off(*arguments, **form):
    weights = CORRECT["selected_attention"](*arguments, **form)
    return {row: near(seen) for row, seen in weights.items()}


def score_off(*arguments, **form):
    return near(CORRECT["attention_scores"](*arguments, **form))


def score_rows_off(*arguments, **form):
    scores = CORRECT["attention_scores"](*arguments, **form)
    arguments[-1].copy_(near(arguments[-1], 0.01))
    return scores


def rank_off(*arguments):
    return CORRECT["rank_rows"](*arguments).flip(1)


LOOPS = ("selected_attention", "attention_scores", "rank_rows")
CORRECT = {name: getattr(cache, name) for name in LOOPS}


@pytest.mark.parametrize(
    ("loop", "wrong", "said"),
    [
        ("selected_attention", attend_off, "attend: error"),
        ("selected_attention", see_off, "refresh: error"),
        ("attention_scores", score_off, "score: error"),
        ("attention_scores", score_rows_off, "scoring rows: error"),
        ("rank_rows", rank_off, "ranks differ"),
    ],
)
def test_what_is_wrong_is_not(engine, sample, monkeypatch, loop, wrong, said):
    monkeypatch.setattr(cache, loop, wrong)
    with pytest.raises(SystemExit, match=said):
        check_loops(engine, sample, CORE)


def test_what_does_not_run_is_not_checked(engine, sample):
    with pytest.raises(SystemExit, match="no score was checked"):
        check_loops(engine, sample, {"avl": 0})
