"""What a worker remembers of its requests, and what it tells of them."""

from dataclasses import replace

import pytest
import torch

from vllm_avl import plan as plans
from vllm_avl.config import AVLConfig
from vllm_avl.plan import Compaction, make_plan
from vllm_avl.worker.history import CoreHistory
from vllm_avl.worker.introspection import report, timeline
from vllm_avl.worker.request import RequestState
from vllm_avl.worker.rows import LayerRows, Mask
from vllm_avl.worker.seats import SeatTable
from vllm_avl.worker.step import WorkerRequests, current_step, executing


def told_of(**settings):
    """3 text, 16 vision, 3 text: 5 blocks of 4, of which 2 go and 1 is secondary."""
    settings = {"store_ratio": 0.5, "core_ratio": 0.25} | settings
    return compaction(make_plan(22, ((3, 19),), 4, AVLConfig(**settings)))


def compaction(plan):
    return Compaction(plan, (*range(plan.num_stored_blocks),), False, 0)


def state_of(**settings):
    return RequestState(told_of(**settings), SeatTable())


def grow(state, num_tokens, num_refreshes=0):
    """Let a request be as long as steps would have made it."""
    records = state.seats.records
    records["num_tokens"][state.seat] = num_tokens
    records["num_refreshes"][state.seat] = num_refreshes


SECONDARY = [18, 4, 9, 11]
CORE = [5, 17, 6, 8]
TEXT = [19, 0, 2, 1]


def rows_of(*heads, start=8, secondary=SECONDARY):
    """Rows of a layer, of which those named are secondary."""
    behind = [secondary] * len(heads) if isinstance(secondary[0], int) else secondary
    mask = [
        [position not in mine for position in row]
        for row, mine in zip(heads, behind, strict=True)
    ]
    return LayerRows(start, torch.tensor(heads), Mask(torch.tensor(mask)))


def answering(num_tokens=25, **settings):
    """A request whose rows are those of its last refresh, three steps ago."""
    state = state_of(**settings)
    assert state.plan.first_stored_block == 2
    grow(state, num_tokens)
    # Best first when the prompt ended; refreshes have changed which of them are core.
    state.layers["layers.1"] = rows_of([*TEXT, 18, 5, 17, 4, 6, 9, 8, 11])
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


def test_evicted_text_is_counted_but_not_told(monkeypatch):
    monkeypatch.setattr(plans, "TEXT_MIN_TOKENS", 0)
    state = answering(25, text_keep_ratio=0.5)
    state.layers["layers.1"] = rows_of([20, 1, *SECONDARY, 2, *CORE, 0, 24], start=12)
    told = report("r", state)
    # 6 text tokens behind the image, of which the window holds 3.
    assert told.num_blocks_freed == 2
    grow(state, 27)
    told = report("r", state)
    assert (told.num_blocks_freed, told.num_blocks_held) == (3, 4)
    assert told.layers[0].text == [[0, 1, 2, 20, 24, 25, 26]]
    assert told.layers[0].evicted == [[3, 7, 10, 12, 13, 14, 15, 16]]


def test_heads_that_differ_are_told_apart():
    state = answering(22, policy="h2o")
    row = SECONDARY + TEXT + CORE
    state.layers["layers.1"] = rows_of(row, row[::-1], secondary=[SECONDARY, CORE])
    (layer,) = report("r", state).layers
    assert layer.core == [sorted(TEXT + CORE), sorted(TEXT + SECONDARY)]
    assert layer.secondary == [sorted(SECONDARY), sorted(CORE)]
    assert layer.text == [[20, 21], [20, 21]]
    assert layer.evicted == [[3, 7, 10, 12, 13, 14, 15, 16]] * 2


def test_layers_are_told_in_order():
    state = answering()
    state.layers["layers.0"] = state.layers["layers.1"]
    assert [layer.layer for layer in report("r", state).layers] == [0, 1]


def test_a_drafters_layers_are_not_told():
    state = answering()
    drafted = rows_of([*TEXT, 18, 5, 17, 4, 6, 9, 8, 11])
    drafted.of_drafter = True
    state.layers["draft_model.layers.1"] = drafted
    assert [layer.layer for layer in report("r", state).layers] == [1]


def test_a_report_says_whose_it_is():
    state = answering(policy="random")
    grow(state, 25, 4)
    told = report("r", state)
    assert (told.request_id, told.policy) == ("r", "random")
    assert (told.num_tokens, told.num_prompt_tokens, told.num_refreshes) == (25, 22, 4)


def test_a_request_without_rows_is_told_by_its_counts():
    state = state_of(core_ratio=None)
    grow(state, 23)
    told = report("r", state)
    assert told.layers == []
    assert (told.num_blocks_freed, told.num_blocks_held) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "remembers", "sums"),
    [
        ({"core_ratio": None}, False, False),
        ({"core_ratio": None, "policy": "h2o"}, False, False),
        ({"core_ratio": None, "introspection": 1}, True, False),
        ({}, True, False),
        ({"policy": "h2o"}, True, True),
        ({"core_ratio": None, "text_keep_ratio": 0.7}, True, True),
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
    state = RequestState(compaction(plan), SeatTable())
    assert state.candidates.tolist() == expected
    assert state.num_candidates == len(expected)
    assert state.candidates_end == 24
    fixed = [0, 1, 2, 9, 10, 11]
    assert state.fixed.tolist() == fixed
    # What lies behind the full blocks is one more.
    competes = [p not in fixed for p in range(24)]
    assert state.competes.tolist() == [*competes, False]


def test_everything_in_the_full_blocks_competes_where_text_is_ranked():
    plan = make_plan(30, ((3, 9), (12, 29)), 8, AVLConfig(policy="streaming"))
    state = RequestState(compaction(plan), SeatTable())
    assert state.candidates.tolist() == list(range(24))
    assert (state.num_candidates, state.candidates_end) == (24, 24)
    assert state.fixed.tolist() == []
    assert state.competes.tolist() == [True] * 24 + [False]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("avl", [9, 10, 11, 30, 31]), ("h2o", list(range(3, 32)))],
)
def test_what_lies_behind_the_first_image_ages(policy, expected):
    config = AVLConfig(policy=policy, text_keep_ratio=0.5)
    plan = make_plan(30, ((3, 9), (12, 30)), 8, config)
    state = RequestState(compaction(plan), SeatTable())
    positions = torch.arange(32).flip(0).repeat(2, 1)
    ages = state.ages(positions)
    assert ages.shape == (2, 32)
    assert sorted(positions[0][ages[0]].tolist()) == expected


def finish(requests, *names):
    for name in names:
        requests.update((), (), {name: told_of()})
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
    requests = WorkerRequests(2, block_size=4)
    requests.update((), (), {"a": told_of(policy="h2o")})
    state = requests.running["a"]
    state.layers["layers.1"] = answering().layers["layers.1"]
    state.layers["layers.1"].sums = torch.ones(2, 12)
    requests.begin({"a": 24}, {"a": 1}, list).end()
    before = report("a", state)
    assert (before.num_tokens, before.num_refreshes) == (25, 1)
    requests.update(["a"], (), {"b": told_of()})
    assert requests.running["b"].seat == state.seat
    after = report("a", requests.find("a"))
    assert after == replace(before, running=False)
    assert state.layers["layers.1"].sums is None
    assert state.memo == {}


def test_preempted_requests_are_forgotten():
    requests = WorkerRequests(2)
    requests.update((), (), {"a": told_of()})
    requests.update((), ["a"], {})
    assert requests.find("a") is None
    assert len(requests.finished) == 0


def test_a_finished_request_that_was_never_ours_is_ignored():
    requests = WorkerRequests(2)
    requests.update(["stock"], ["another"], {})
    assert len(requests.finished) == 0


def test_a_plan_that_comes_again_starts_afresh():
    requests = WorkerRequests(2)
    requests.update((), (), {"a": told_of()})
    before = requests.find("a")
    requests.update((), ["a"], {"a": before.compaction})
    assert requests.find("a") is not before
    assert requests.find("a").layers == {}


def test_the_latest_request_of_a_name_is_found():
    requests = WorkerRequests(2)
    finish(requests, "a", "a")
    assert requests.find("a") is requests.finished[1][1]
    requests.update((), (), {"a": told_of()})
    assert requests.find("a") is requests.running["a"]


def test_a_request_is_found_by_the_id_its_answer_carries():
    requests = WorkerRequests(2)
    finish(requests, "chatcmpl-7-0a1b2c3d")
    assert requests.find("chatcmpl-7") is requests.finished[0][1]
    assert requests.find("chatcmpl") is None


def test_the_newest_come_first():
    requests = WorkerRequests(2)
    finish(requests, "a", "b")
    requests.update((), (), {name: told_of() for name in "cd"})
    assert [name for name, _ in requests.known()] == ["d", "c", "b", "a"]
    assert [state.running for _, state in requests.known()] == [True] * 2 + [False] * 2


def test_a_timeline_names_each_length_at_which_blocks_change():
    state = state_of()
    held = [(at.num_tokens, at.held, at.stock) for at in timeline(state.plan, 30)]
    assert held == [(22, 6, 6), (22, 4, 6), (25, 5, 7), (29, 6, 8), (30, 6, 8)]


def noted(history, num_tokens, positions, core, num_full_tokens):
    """Note a selection of one head."""
    mask = torch.tensor([[position in core for position in positions]])
    history.note(num_tokens, torch.tensor([positions]), mask, num_full_tokens)


def test_selections_are_told_in_the_order_they_were_made():
    state = answering(introspection=1)
    history = state.layers["layers.1"].history
    # Behind the full blocks nothing is ranked.
    noted(history, 22, [3, 4, 5, 19, 20, 25], [3, 4, 19, 20, 25], 20)
    noted(history, 25, SECONDARY + TEXT + CORE + [20, 21], CORE + TEXT + [20], 20)
    (layer,) = report("r", state).layers
    assert [(told.num_tokens, told.core) for told in layer.history] == [
        (22, [[3, 4]]),
        (25, [sorted(CORE)]),
    ]


def test_core_is_remembered_where_somebody_asked_for_it():
    for introspection in (0, 3):
        state = answering(introspection=introspection)
        state.note_core(25)
        (layer,) = report("r", state).layers
        expected = [(25, [sorted(CORE)])] if introspection else []
        assert [(told.num_tokens, told.core) for told in layer.history] == expected
    rows = LayerRows(8, torch.tensor([TEXT]))
    rows.note_core(25, 20)
    assert list(rows.history.among(torch.arange(20))) == []


@pytest.mark.parametrize(("num_rankings", "limit"), [(1, 64), (8, 8), (100, 2)])
def test_many_selections_are_thinned_out(num_rankings, limit):
    history = CoreHistory()
    for step in range(1000):
        positions = torch.tensor([[step % 7, 7, (step + 1) % 7]] * num_rankings)
        mask = torch.tensor([[True, True, False]] * num_rankings)
        history.note(step, positions, mask, 7)
    told = list(history.among(torch.arange(7)))
    assert len(told) <= limit
    lengths = [num_tokens for num_tokens, _ in told]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (0, 999)
    for length, read in told:
        assert read == [[length % 7]] * num_rankings


def test_the_first_tokens_of_a_step_are_looked_up_by_name():
    requests = WorkerRequests(block_size=4)
    requests.update((), (), {name: told_of() for name in "ac"})
    spans = {"a": 22, "stock": 5, "c": 0}
    asked = []

    def row_ids():
        asked.append("rows")
        return ["c", "stock", "a"]

    step = requests.begin(spans, {"a": 1, "stock": 1, "c": 22}, row_ids)
    rows = step.rows()
    assert rows.first_block.tolist() == [0, 0, 2]
    assert rows.num_private.tolist() == [0, 0, 3]
    assert rows.with_python == [(0, 1)]
    assert step.state(1) is requests.running["c"]
    assert step.rows() is rows
    assert asked == ["rows"]


def test_a_step_without_adaptive_requests_is_none():
    requests = WorkerRequests()
    assert requests.begin({"stock": 5}, {"stock": 1}, list) is None
    requests.update((), (), {"a": told_of()})
    assert requests.begin({"stock": 5}, {"stock": 1}, list) is None
    assert requests.begin({"stock": 5, "a": 22}, {"stock": 1, "a": 1}, list)


def test_refreshes_are_counted_where_core_is_chosen():
    requests = WorkerRequests(block_size=4)
    requests.update((), (), {"a": told_of(), "b": told_of(policy="fastv")})
    for step in range(6):
        both = dict.fromkeys("ab", 22 + step)
        requests.begin(both, dict.fromkeys("ab", 1), list).end()
    assert requests.counts.take() == {"refreshes": 2}
    found = [requests.find(name).num_refreshes for name in "ab"]
    assert found == [2, 0]


def test_what_a_step_counts_on_a_device_starts_anew_with_the_next():
    requests = WorkerRequests(block_size=4)
    requests.update((), (), {"a": told_of()})
    entered = torch.tensor([3], dtype=torch.int32)
    for _ in range(2):
        step = requests.begin({"a": 24}, {"a": 1}, list)
        step.num_entered = entered
        step.end()
        entered += 4
    assert requests.counts.take()["core_rows_entered"] == 3 + 4


def test_a_step_is_current_while_it_executes():
    requests = WorkerRequests()
    requests.update((), (), {"a": told_of()})
    step = requests.begin({"a": 22}, {"a": 1}, list)
    with executing(step):
        assert current_step() is step
    assert current_step() is None
