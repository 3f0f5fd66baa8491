"""What a worker remembers of its requests, and what it tells of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_avl.backend.history import CoreHistory
from vllm_avl.backend.introspection import report, timeline
from vllm_avl.backend.request import RequestState
from vllm_avl.backend.rows import LayerRows
from vllm_avl.backend.step import Step, WorkerRequests, current_step, executing
from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan


def state_of(**settings):
    """3 text, 16 vision, 3 text: 5 blocks of 4, of which 2 go and 1 is secondary."""
    settings = {"vision_store_ratio": 0.5, "vision_core_ratio": 0.25} | settings
    plan = make_plan(22, ((3, 19),), 4, AVLConfig(**settings))
    return RequestState(plan)


SECONDARY = [18, 4, 9, 11]
CORE = [5, 17, 6, 8]
TEXT = [19, 0, 2, 1]


def answering(num_tokens=25, **settings):
    """A request whose rows are those of its last refresh, three steps ago."""
    state = state_of(**settings)
    assert (state.plan.private_from, state.plan.first_core_block(22)) == (2, 3)
    state.num_tokens = num_tokens
    state.layers[1] = LayerRows(8, torch.tensor([SECONDARY + TEXT + CORE + [20, 21]]))
    return state


def test_a_report_sorts_positions_by_what_becomes_of_them():
    (layer,) = report("r", answering()).layers
    assert layer.layer == 1
    assert layer.core == [sorted(CORE)]
    assert layer.secondary == [sorted(SECONDARY)]
    assert layer.evicted == [[3, 7, 10, 12, 13, 14, 15, 16]]
    assert layer.text == [[0, 1, 2, 19, 20, 21, 22, 23, 24]]


def test_every_position_is_told_once():
    (layer,) = report("r", answering()).layers
    told = layer.core[0] + layer.secondary[0] + layer.evicted[0] + layer.text[0]
    assert sorted(told) == list(range(25))


def test_blocks_are_counted_as_the_plan_does():
    told = report("r", answering())
    assert told.num_blocks_freed == 2
    assert told.num_blocks_held == 7 - 2
    assert report("r", answering(28)).num_blocks_held == 7 - 2
    assert report("r", answering(29)).num_blocks_held == 8 - 2


def test_evicted_text_is_counted_but_not_told():
    state = answering(25, text_keep_ratio=0.5, text_min_tokens=0)
    state.layers[1] = LayerRows(
        12, torch.tensor([SECONDARY + CORE + [1, 2, 0, 20, 24]])
    )
    told = report("r", state)
    # 6 text tokens behind the image, of which the window holds 3.
    assert told.num_blocks_freed == 2
    state.num_tokens = 27
    told = report("r", state)
    assert (told.num_blocks_freed, told.num_blocks_held) == (3, 4)
    assert told.layers[0].text == [[0, 1, 2, 20, 24, 25, 26]]
    assert told.layers[0].evicted == [[3, 7, 10, 12, 13, 14, 15, 16]]


def test_heads_that_differ_are_told_apart():
    state = answering(22, policy="h2o")
    rows = [SECONDARY + TEXT + CORE + [20, 21], CORE + TEXT + SECONDARY + [20, 21]]
    state.layers[1] = LayerRows(8, torch.tensor(rows))
    (layer,) = report("r", state).layers
    assert layer.core == [sorted(TEXT + CORE), sorted(TEXT + SECONDARY)]
    assert layer.secondary == [sorted(SECONDARY), sorted(CORE)]
    assert layer.text == [[20, 21], [20, 21]]
    assert layer.evicted == [[3, 7, 10, 12, 13, 14, 15, 16]] * 2


def test_layers_are_told_in_order():
    state = answering()
    state.layers[0] = state.layers[1]
    assert [layer.layer for layer in report("r", state).layers] == [0, 1]


def test_a_report_says_whose_it_is():
    state = answering(policy="random")
    state.num_refreshes = 4
    told = report("r", state)
    assert (told.request_id, told.policy) == ("r", "random")
    assert (told.num_tokens, told.num_prompt_tokens, told.num_refreshes) == (25, 22, 4)


def test_a_request_without_rows_is_told_by_its_counts():
    state = state_of(vision_core_ratio=None)
    state.num_tokens = 23
    told = report("r", state)
    assert told.layers == []
    assert (told.num_blocks_freed, told.num_blocks_held) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "remembers", "sums"),
    [
        ({"vision_core_ratio": None}, False, False),
        ({"vision_core_ratio": None, "policy": "h2o"}, False, False),
        ({"vision_core_ratio": None, "introspection": 1}, True, False),
        ({}, True, False),
        ({"policy": "h2o"}, True, True),
        ({"vision_core_ratio": None, "text_keep_ratio": 0.7}, True, True),
    ],
    ids=["stored-only", "h2o", "introspection", "core", "h2o-core", "text"],
)
def test_rows_and_sums_are_kept_for_those_who_need_them(settings, remembers, sums):
    state = state_of(**settings)
    assert state.remembers_rows is remembers
    assert state.keeps_sums is sums


def test_vision_of_the_full_blocks_competes():
    plan = make_plan(30, ((3, 9), (12, 29)), 8, AVLConfig())
    expected = [*range(3, 9), *range(12, 24)]
    assert RequestState(plan).candidates.tolist() == expected


def test_everything_in_the_full_blocks_competes_where_text_is_ranked():
    plan = make_plan(30, ((3, 9), (12, 29)), 8, AVLConfig(policy="streaming"))
    assert RequestState(plan).candidates.tolist() == list(range(24))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("avl", [9, 10, 11, 30, 31]), ("h2o", list(range(3, 32)))],
)
def test_what_lies_behind_the_first_image_ages(policy, expected):
    config = AVLConfig(policy=policy, text_keep_ratio=0.5)
    state = RequestState(make_plan(30, ((3, 9), (12, 30)), 8, config))
    positions = torch.arange(32).flip(0).repeat(2, 1)
    ages = state.ages(positions)
    assert ages.shape == (2, 32)
    assert sorted(positions[0][ages[0]].tolist()) == expected


def finish(requests, *names):
    for name in names:
        requests.update((), (), {name: state_of().plan})
        requests.update([name], (), {})


def test_the_last_finished_requests_are_remembered():
    requests = WorkerRequests(2)
    finish(requests, "a", "b", "c")
    assert [name for name, _ in requests.finished] == ["b", "c"]
    assert requests.find("a") is None
    assert requests.find("b") is requests.finished[0][1]


def test_nothing_is_remembered_unless_asked_for():
    requests = WorkerRequests()
    finish(requests, "a")
    assert requests.find("a") is None
    assert requests.running == {}


def test_a_remembered_request_keeps_its_report_and_no_sums():
    requests = WorkerRequests(2)
    state = answering(policy="h2o")
    state.layers[1].sums = torch.ones(1, 14)
    requests.running["a"] = state
    before = report("a", state)
    requests.update(["a"], (), {})
    after = report("a", requests.find("a"))
    assert after == replace(before, running=False)
    assert state.layers[1].sums is None


def test_preempted_requests_are_forgotten():
    requests = WorkerRequests(2)
    requests.update((), (), {"a": state_of().plan})
    requests.update((), ["a"], {})
    assert requests.find("a") is None
    assert len(requests.finished) == 0


def test_a_finished_request_that_was_never_ours_is_ignored():
    requests = WorkerRequests(2)
    requests.update(["stock"], ["another"], {})
    assert len(requests.finished) == 0


def test_a_plan_that_comes_again_starts_afresh():
    requests = WorkerRequests(2)
    requests.update((), (), {"a": state_of().plan})
    before = requests.find("a")
    requests.update((), ["a"], {"a": before.plan})
    assert requests.find("a") is not before
    assert requests.find("a").layers == {}


def test_the_latest_request_of_a_name_is_found():
    requests = WorkerRequests(2)
    finish(requests, "a", "a")
    assert requests.find("a") is requests.finished[1][1]
    requests.update((), (), {"a": state_of().plan})
    assert requests.find("a") is requests.running["a"]


def test_a_request_is_found_by_the_id_its_answer_carries():
    requests = WorkerRequests(2)
    finish(requests, "chatcmpl-7-0a1b2c3d")
    assert requests.find("chatcmpl-7") is requests.finished[0][1]
    assert requests.find("chatcmpl") is None


def test_the_newest_come_first():
    requests = WorkerRequests(2)
    finish(requests, "a", "b")
    requests.update((), (), {name: state_of().plan for name in "cd"})
    assert [name for name, _ in requests.known()] == ["d", "c", "b", "a"]
    assert [state.running for _, state in requests.known()] == [True] * 2 + [False] * 2


def test_a_timeline_names_each_length_at_which_blocks_change():
    state = state_of()
    held = [(at.num_tokens, at.held, at.stock) for at in timeline(state.plan, 30)]
    assert held == [(22, 6, 6), (22, 4, 6), (25, 5, 7), (29, 6, 8), (30, 6, 8)]


def test_selections_are_told_in_the_order_they_were_made():
    state = answering(introspection=1)
    history = state.layers[1].history
    history.note(22, torch.tensor([[3, 4, 19, 20, 25]]), 20)
    history.note(25, torch.tensor([CORE + TEXT + [20, 21]]), 20)
    (layer,) = report("r", state).layers
    assert [(told.num_tokens, told.core) for told in layer.history] == [
        (22, [[3, 4]]),
        (25, [sorted(CORE)]),
    ]


@pytest.mark.parametrize(("num_rankings", "limit"), [(1, 64), (8, 8), (100, 2)])
def test_many_selections_are_thinned_out(num_rankings, limit):
    history = CoreHistory()
    for step in range(1000):
        history.note(step, torch.tensor([[step % 7]] * num_rankings), 7)
    told = list(history.among(torch.arange(7)))
    assert len(told) <= limit
    lengths = [num_tokens for num_tokens, _ in told]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 999)
    for length, read in told:
        assert read == [[length % 7]] * num_rankings


def test_rows_of_a_batch_are_looked_up_by_name():
    requests = WorkerRequests()
    requests.update((), (), {name: state_of().plan for name in "ac"})
    spans = [("a", 22, 23), ("stock", 5, 6), ("c", 0, 22)]
    step = Step(requests.turns(spans), lambda common: ["c", "stock", "a"])
    common = SimpleNamespace(
        block_table_tensor=torch.arange(24, dtype=torch.int32).view(3, 8),
        query_start_loc_cpu=torch.tensor([0, 22, 23, 24]),
    )
    view = step.view(common, 4, fuses_scores=True)
    assert view.first_blocks == [0, 0, 3]
    (task,) = view.tasks
    assert task.state is requests.running["c"]
    assert (task.query_start, task.query_end) == (0, 22)
    assert task.blocks.tolist() == list(range(6))
    assert step.view(None, 4, fuses_scores=True) is view


def test_a_step_knows_its_work_before_its_rows():
    requests = WorkerRequests()
    requests.update((), (), {name: state_of().plan for name in "ab"})
    for span, has_work in (
        (("a", 0, 21), False),
        (("a", 0, 22), True),
        (("a", 22, 23), False),
        (("a", 24, 25), True),
    ):
        step = Step(requests.turns([("b", 22, 23), span]), list)
        assert step.has_work == has_work


def test_a_step_is_current_while_it_executes():
    step = Step({}, lambda common: [])
    with executing(step):
        assert current_step() is step
    assert current_step() is None
