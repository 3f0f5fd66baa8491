"""What a step reads of each row, and who has work after it, on requests by hand."""

import numpy as np
import pytest
import torch
from stepping import (
    BLOCK_SIZE,
    CORE,
    CUDA_KERNELS,
    NUM_FULL,
    PROMPT,
    START,
    TEXT,
    Worker,
    plan_of,
)

from vllm_avl import plan as plans
from vllm_avl.worker.request import Kernels
from vllm_avl.worker.view import make_tasks, stored_table, stored_table_on_cpu

ALL = pytest.mark.parametrize(
    "settings", [{}, CORE, CORE | TEXT], ids=["S", "SC", "SCT"]
)


@ALL
def test_before_the_prompt_ends_nothing_is_known_of_a_request(settings):
    worker = Worker()
    assert worker.begin(("r", 64, 500)) is None
    worker.give("other", **settings)
    seen = worker.take(("r", 64, 500), ("other", PROMPT, 1))
    assert seen.read(0) == (seen.own(0, 18, 0), 564)
    assert seen.tasks == []


@ALL
@pytest.mark.parametrize("computed", [0, 598])
def test_the_step_that_ends_the_prompt_reads_the_runners_table(settings, computed):
    worker = Worker()
    private = worker.give("r", **settings)
    seen = worker.take(("r", computed, PROMPT - computed))
    assert seen.read() == (seen.own(0, 19), PROMPT)
    assert not seen.rows.is_attended.any()
    (task,) = seen.tasks
    state = worker.requests.running["r"]
    assert task.state is state
    assert task.prompt.tolist() == seen.own(0, 19)
    assert task.stored.tolist() == private + seen.own(NUM_FULL, 19)
    assert task.prompt.dtype == task.stored.dtype == torch.int32
    assert task.num_private == len(private)
    assert (task.start, task.num_tokens) == (START * BLOCK_SIZE, PROMPT)
    assert (task.last, task.query_end) == (PROMPT - computed - 1, PROMPT - computed)
    assert not task.refreshes
    assert not task.attended
    assert (state.num_tokens, state.num_refreshes) == (PROMPT, 0)


@pytest.mark.parametrize("new", [99, 101])
def test_a_chunk_across_the_prompts_end_is_refused(new):
    worker = Worker()
    worker.give("r")
    with pytest.raises(RuntimeError, match="a chunk crossed its prompt's end"):
        worker.take(("r", 500, new))


def test_the_first_step_behind_the_prompt_stores_nothing_again():
    worker = Worker()
    worker.give("r", **CORE)
    assert worker.take(("r", PROMPT, 1)).tasks == []


def test_without_core_every_step_reads_what_is_stored():
    worker = Worker()
    private = worker.give("r")
    for num_computed in range(PROMPT, PROMPT + 6):
        seen = worker.take(("r", num_computed, 1))
        expected = private + seen.own(NUM_FULL, 19), num_computed + 1 - START * 32
        assert seen.read() == expected
        assert seen.tasks == []
        assert not seen.rows.is_attended.any()


def test_a_row_with_core_is_ours_to_attend_over_the_same_table():
    worker = Worker()
    private = worker.give("r", **CORE)
    for step in (1, 2, 4, 5):
        seen = worker.take(("r", PROMPT + step - 1, 1))
        expected = private + seen.own(NUM_FULL, 19), PROMPT + step - START * 32
        assert seen.read() == expected
        assert seen.tasks == []
        assert seen.rows.is_attended.tolist() == [True]
        assert not seen.step.reads_all.any()
        assert not seen.rows.refreshes.any()
        state = worker.requests.running["r"]
        assert (state.num_tokens, state.num_refreshes) == (PROMPT + step, 0)


def test_a_step_into_a_new_block_reads_it():
    worker = Worker()
    private = worker.give("r", **CORE)
    seen = worker.take(("r", 640, 1))
    assert seen.read() == (private + seen.own(NUM_FULL, 21), 641 - START * 32)


def test_a_refresh_reads_all_and_is_work_for_python_where_kernels_cannot_choose():
    worker = Worker()
    private = worker.give("r", **CORE)
    state = worker.requests.running["r"]
    for number, step in enumerate((3, 6), start=1):
        seen = worker.take(("r", PROMPT + step - 1, 1))
        assert seen.read() == (
            private + seen.own(NUM_FULL, 19),
            PROMPT + step - START * 32,
        )
        assert seen.step.reads_all.all()
        (task,) = seen.tasks
        assert task.refreshes
        assert task.attended
        assert task.prompt is None
        assert task.stored.tolist() == private + seen.own(NUM_FULL, 19)
        assert (task.start, task.num_aged) == (START * BLOCK_SIZE, 0)
        assert (state.num_tokens, state.num_refreshes) == (PROMPT + step, number)


def test_kernels_that_choose_core_leave_python_nothing_to_do():
    worker = Worker(CUDA_KERNELS)
    private = worker.give("r", **CORE)
    seen = worker.take(("r", PROMPT + 2, 1))
    assert seen.read() == (private + seen.own(NUM_FULL, 19), 603 - START * 32)
    assert seen.tasks == []
    assert not seen.step.has_work
    for flags in (seen.rows.is_attended, seen.rows.refreshes, seen.rows.in_pass):
        assert flags.tolist() == [True]
    assert worker.requests.running["r"].num_refreshes == 1


@pytest.mark.parametrize("computed", [PROMPT, PROMPT + 1])
@pytest.mark.parametrize("kernels", [Kernels(attend_scored=True), CUDA_KERNELS])
def test_a_replay_reads_all_that_is_stored_and_scores_behind_vllms_kernel(
    kernels, computed
):
    worker = Worker(kernels)
    private = worker.give("r", **CORE)
    seen = worker.take(("r", computed, 20))
    assert seen.read() == (
        private + seen.own(NUM_FULL, 20),
        computed + 20 - START * 32,
    )
    assert not seen.rows.is_attended.any()
    (task,) = seen.tasks
    assert task.refreshes
    assert not task.attended
    assert task.last == 19
    assert worker.requests.running["r"].num_refreshes == 1


def test_a_replay_without_core_has_no_work():
    worker = Worker()
    worker.give("r")
    assert worker.take(("r", PROMPT, 20)).tasks == []


REFRESHES = {0: range(1, 8), 1: range(1, 8), 3: (3, 6)}


@pytest.mark.parametrize("interval", REFRESHES)
def test_refreshes_are_counted_from_the_start_of_decoding(interval):
    settings = TEXT | {"refresh_interval": interval, "core_ratio": 0.2}
    worker = Worker()
    # A length that no interval divides.
    worker.give("r", plan_of(601, **settings))
    scoring = []
    for step in range(1, 8):
        seen = worker.take(("r", 601 + step - 1, 1))
        assert seen.rows.refreshes.tolist() == seen.step.reads_all.tolist()
        assert seen.rows.refreshes.tolist() == [
            task.refreshes for task in seen.tasks
        ] or [False]
        scoring += [step] * bool(seen.rows.refreshes[0])
    assert scoring == list(REFRESHES[interval])


@pytest.mark.parametrize("interval", [0, 1])
def test_without_steps_between_refreshes_every_step_reads_all_and_none_scores(interval):
    worker = Worker()
    worker.give("r", core_ratio=0.2, refresh_interval=interval)
    for step in range(1, 8):
        seen = worker.take(("r", PROMPT + step - 1, 1))
        assert seen.step.reads_all.all()
        assert not seen.rows.is_attended.any()
        assert seen.tasks == []


def test_a_policy_that_never_refreshes_reads_all_at_the_interval_without_work():
    worker = Worker()
    private = worker.give("r", policy="fastv", **CORE)
    reading = []
    for step in range(1, 8):
        seen = worker.take(("r", PROMPT + step - 1, 1))
        assert seen.read()[0] == private + seen.own(NUM_FULL, 19)
        assert seen.rows.is_attended.all()
        assert not seen.rows.refreshes.any()
        assert seen.tasks == []
        reading += [step] * bool(seen.step.reads_all[0])
    assert reading == [3, 6]
    assert worker.requests.running["r"].num_refreshes == 0


def test_refreshes_go_by_the_request_and_not_by_the_batch():
    worker = Worker()
    for name in "ab":
        worker.give(name, **CORE)
    seen = worker.take(("a", PROMPT, 1), ("b", PROMPT + 2, 1))
    assert seen.rows.refreshes.tolist() == [False, True]
    seen = worker.take(("b", PROMPT + 3, 1), ("a", PROMPT + 2, 1))
    assert seen.rows.refreshes.tolist() == [False, True]


@pytest.mark.parametrize("settings", [{}, CORE], ids=["stored", "core"])
def test_text_leaves_behind_the_step_and_the_next_one_reads_a_block_less(settings):
    # At 645 tokens a block's worth of text is outside of the window.
    settings = settings | TEXT | {"refresh_interval": 2}
    worker = Worker()
    private = worker.give("r", **settings)
    seen = worker.take(("r", 643, 1))
    assert [task.num_aged for task in seen.tasks] == [0]
    seen = worker.take(("r", 644, 1))
    assert seen.read() == (private + seen.own(NUM_FULL, 21), 645 - START * 32)
    (task,) = seen.tasks
    assert (task.num_aged, task.refreshes) == (BLOCK_SIZE, False)
    assert task.stored.tolist() == private + seen.own(NUM_FULL, 21)
    assert task.start == START * BLOCK_SIZE
    seen = worker.take(("r", 645, 1))
    expected = private[1:] + seen.own(NUM_FULL, 21), 646 - (START + 1) * 32
    assert seen.read() == expected
    (task,) = seen.tasks
    assert (task.num_aged, task.refreshes) == (0, True)
    assert task.stored.tolist() == expected[0]
    assert task.start == (START + 1) * BLOCK_SIZE
    seen = worker.take(("r", 646, 1))
    assert seen.read()[0] == expected[0]
    assert seen.tasks == []


def test_text_may_leave_in_a_step_that_scores():
    worker = Worker()
    worker.give("r", **CORE, **TEXT)
    (task,) = worker.take(("r", 644, 1)).tasks
    assert (task.num_aged, task.refreshes) == (BLOCK_SIZE, True)


@pytest.fixture
def short_window(monkeypatch):
    monkeypatch.setattr(plans, "TEXT_MIN_TOKENS", 4)


@pytest.mark.usefixtures("short_window")
def test_text_leaves_private_blocks_first_and_those_of_the_answer_behind_them():
    worker = Worker()
    plan = plan_of(130, ((5, 100),), text_keep_ratio=0.3)
    # 128 full rows, 33 of text, 48 of 95 vision tokens: 3 of 4 blocks.
    private = worker.give("r", plan)
    assert len(private) == 3
    length, gone = 130, plan.num_evicted_text_blocks(130)
    assert gone == 0
    worker.take(("r", 0, 130))
    read = []
    while gone < 5:
        seen = worker.take(("r", length, 1))
        blocks, num_keys = seen.read()
        held = private + seen.own(4, 64)
        assert num_keys == length + 1 - (1 + gone) * BLOCK_SIZE
        assert blocks == held[gone : gone + -(-num_keys // BLOCK_SIZE)]
        length += 1
        if plan.num_evicted_text_blocks(length) > gone:
            assert seen.tasks[0].num_aged == BLOCK_SIZE
            gone += 1
            read.append(len(set(blocks) & set(private)))
    assert read == [3, 2, 1, 0, 0]
    told = worker.requests.running["r"]
    assert told.seats.records["num_private"][told.seat] == 0


@pytest.mark.usefixtures("short_window")
def test_a_replay_may_leave_several_blocks_of_text_at_once():
    worker = Worker()
    plan = plan_of(130, ((5, 100),), text_keep_ratio=0.3)
    private = worker.give("r", plan)
    worker.take(("r", 0, 130))
    (task,) = worker.take(("r", 130, 150)).tasks
    gone = plan.num_evicted_text_blocks(280)
    assert gone == 3
    assert task.num_aged == gone * BLOCK_SIZE
    seen = worker.take(("r", 280, 1))
    held = private + seen.own(4, 64)
    assert seen.read() == (held[gone:8], 281 - (1 + gone) * 32)


def test_text_without_core_is_scored_at_the_interval():
    worker = Worker()
    private = worker.give("r", **TEXT)
    seen = worker.take(("r", PROMPT + 1, 1))
    assert not seen.rows.is_attended.any()
    assert seen.tasks == []
    seen = worker.take(("r", PROMPT + 2, 1))
    assert seen.read() == (private + seen.own(NUM_FULL, 19), 603 - START * 32)
    assert seen.rows.is_attended.all()
    assert seen.tasks[0].attended


def test_kernels_that_do_not_attend_all_that_scores_leave_it_to_vllms():
    worker = Worker(CUDA_KERNELS)
    worker.give("r", **TEXT)
    seen = worker.take(("r", PROMPT + 2, 1))
    assert not seen.rows.is_attended.any()
    (task,) = seen.tasks
    assert task.refreshes
    assert not task.attended


def test_a_long_question_ages_when_the_prompt_ends():
    worker = Worker()
    plan = plan_of(700, ((5, 50),), text_keep_ratio=0.5)
    private = worker.give("r", plan)
    # 650 text tokens behind the image: 325 are too many, 10 blocks.
    (task,) = worker.take(("r", 600, 100)).tasks
    assert task.num_aged == 10 * BLOCK_SIZE
    seen = worker.take(("r", 700, 1))
    assert seen.tasks == []
    first = plan.first_stored_block + 10
    assert seen.read() == (private[10:] + seen.own(21, 22), 701 - first * 32)


def test_the_kernels_blocks_may_be_smaller():
    worker = Worker(per_block=2)
    private = worker.give("r", **CORE)
    assert len(private) == 20
    (task,) = worker.take(("r", 0, PROMPT)).tasks
    assert (task.num_private, task.start) == (20, START * BLOCK_SIZE)
    seen = worker.take(("r", PROMPT, 1))
    assert seen.read() == (private + seen.own(36, 38), 601 - START * 32)
    seen = worker.take(("r", PROMPT + 2, 1))
    assert seen.tasks[0].stored.tolist() == private + seen.own(36, 38)


def test_smaller_blocks_of_aged_text_go_together():
    worker = Worker(per_block=2)
    private = worker.give("r", **TEXT)
    worker.take(("r", 644, 1))
    seen = worker.take(("r", 645, 1))
    assert seen.read() == (private[2:] + seen.own(36, 41), 646 - (START + 1) * 32)


def test_rows_behind_the_steps_are_padding():
    worker = Worker()
    private = worker.give("r", **CORE)
    seen = worker.take(("r", PROMPT, 1), num_padded=3)
    assert seen.read()[0] == private + seen.own(NUM_FULL, 19)
    assert torch.equal(seen.stored[1:], seen.table[1:])


def test_tables_go_into_given_buffers():
    worker = Worker()
    worker.give("r", **CORE)
    seen = worker.take(("r", PROMPT, 1), num_padded=1)
    out = torch.full_like(seen.table, -1)
    stored = stored_table(seen.rows, seen.table, BLOCK_SIZE, out)
    assert stored.data_ptr() == out.data_ptr()
    assert torch.equal(out, seen.stored)


def test_a_table_may_be_narrower_than_somebodys_private_blocks():
    worker = Worker()
    worker.give("wide", plan_of(2000, ((5, 1990),)))
    private = worker.give("r", plan_of(130, ((5, 100),)))
    step = worker.begin(("r", 130, 1))
    table = torch.arange(5, dtype=torch.int32).unsqueeze(0)
    stored = stored_table(step.rows(), table, BLOCK_SIZE)
    sizes = BLOCK_SIZE, table.shape[1]
    assert torch.equal(stored_table_on_cpu(step.rows(), table, *sizes), stored)
    assert stored[0, :4].tolist() == [*private, 4]


def test_what_lies_behind_a_table_is_not_looked_up():
    worker = Worker()
    private = worker.give("r")
    step = worker.begin(("r", PROMPT, 1))
    table = torch.arange(19, dtype=torch.int32).unsqueeze(0)
    stored = stored_table(step.rows(), table, BLOCK_SIZE)
    sizes = BLOCK_SIZE, table.shape[1]
    assert torch.equal(stored_table_on_cpu(step.rows(), table, *sizes), stored)
    assert stored.shape == table.shape
    assert stored[0].tolist() == [*private, *[18] * 9]


def test_requests_of_a_batch_keep_to_their_own_settings():
    worker = Worker()
    private = {
        name: worker.give(name, **settings)
        for name, settings in {
            "refreshes": CORE,
            "stored": {},
            "ends": CORE,
            "ordinary": CORE | {"refresh_interval": 2},
        }.items()
    }
    seen = worker.take(
        ("refreshes", PROMPT + 2, 1),
        ("stock", 700, 1),
        ("stored", PROMPT + 2, 1),
        ("ends", 100, 500),
        ("ordinary", PROMPT + 2, 1),
    )
    for row, name in ((0, "refreshes"), (2, "stored"), (4, "ordinary")):
        expected = private[name] + seen.own(NUM_FULL, 19, row)
        assert seen.read(row) == (expected, 603 - START * 32)
    assert seen.read(1) == (seen.own(0, 22, 1), 701)
    assert seen.read(3) == (seen.own(0, 19, 3), PROMPT)
    assert seen.rows.is_attended.tolist() == [True, False, False, False, True]
    assert seen.rows.refreshes.tolist() == [True, False, False, False, False]
    refresh, ends = seen.tasks
    running = worker.requests.running
    assert refresh.state is running["refreshes"]
    assert (refresh.last, refresh.query_end) == (0, 1)
    assert ends.state is running["ends"]
    assert (ends.last, ends.query_end, ends.num_tokens) == (502, 503, PROMPT)
    assert ends.prompt.tolist() == seen.own(0, 19, 3)


def test_rows_may_come_in_any_order_of_names():
    worker = Worker()
    private = {name: worker.give(name) for name in "abc"}
    step = worker.begin(("a", PROMPT, 1), ("b", PROMPT, 1), ("c", PROMPT, 1))
    step.row_ids = lambda: ["c", "stock", "a", "b"]
    rows = step.rows()
    table = torch.arange(100, dtype=torch.int32).view(4, 25)
    stored = stored_table(rows, table, BLOCK_SIZE)
    narrow = stored_table_on_cpu(rows, table, BLOCK_SIZE, 20)
    assert torch.equal(narrow, stored[:, :20])
    for row, name in ((0, "c"), (2, "a"), (3, "b")):
        assert stored[row, :10].tolist() == private[name]
    assert torch.equal(stored[1], table[1])
    assert rows.index.tolist() == [2, -1, 0, 1]


def test_more_requests_than_there_were_seats_for():
    worker = Worker()
    private = {f"{i}": worker.give(f"{i}", **CORE) for i in range(21)}
    spans = [(name, PROMPT + int(name), 1) for name in private]
    for step in range(3):
        seen = worker.take(*((name, old + step, 1) for name, old, _ in spans))
        for row, name in enumerate(private):
            blocks, _ = seen.read(row)
            assert blocks[:10] == private[name]
            last = -(-(PROMPT + row + step + 1) // BLOCK_SIZE)
            assert blocks[10:] == seen.own(NUM_FULL, last, row)
            assert seen.rows.refreshes[row] == ((row + step + 1) % 3 == 0)


def test_masks_stay_where_they_are_when_seats_are_added():
    worker = Worker()
    worker.give("first", **CORE)
    state = worker.requests.running["first"]
    state.seats.set_mask("l.3", state.seat, 1234)
    for i in range(20):
        worker.give(f"{i}", **CORE)
    seats = [one.seat for one in worker.requests.running.values()]
    assert len(set(seats)) == 21
    state.seats.set_mask("l.3", state.seat, 5678, of_kept=True)
    of_kept = np.zeros(21, np.intp)
    seats = np.array(seats)
    assert state.seats.masks("l.3", seats, of_kept).tolist() == [1234, *[0] * 20]
    assert state.seats.masks("l.3", seats, of_kept + 1).tolist() == [
        5678,
        *[0] * 20,
    ]


@pytest.mark.parametrize("by", ["finished", "preempted", "told again"])
def test_nothing_of_a_request_is_left_to_who_takes_its_seat(by):
    worker = Worker(CUDA_KERNELS)
    worker.give("a", plan_of(2000, ((5, 1990),), **CORE, **TEXT))
    old = worker.requests.running["a"]
    old.masks(1900)
    worker.take(("a", 2000, 300))
    if by == "told again":
        worker.give("a")
        name = "a"
    else:
        ids = (["a"], ()) if by == "finished" else ((), ["a"])
        worker.requests.update(*ids, {})
        worker.give("b")
        name = "b"
    state = worker.requests.running[name]
    assert state.seat == old.seat
    fresh = Worker(CUDA_KERNELS)
    fresh.give(name)
    other = fresh.requests.running[name]
    records = state.seats.records[state.seat], other.seats.records[other.seat]
    assert records[0] == records[1]
    assert (state.num_tokens, state.num_refreshes) == (0, 0)
    seen = worker.take((name, PROMPT, 1))
    private = worker.expanded(state.compaction.block_ids)
    assert seen.read() == (private + seen.own(NUM_FULL, 19), 601 - START * 32)
    assert seen.tasks == []


def test_a_request_that_ends_before_any_step_says_nothing_of_its_seats_next():
    worker = Worker(num_remembered=2)
    worker.give("a")
    worker.requests.update(["a"], (), {})
    worker.give("b")
    worker.take(("b", PROMPT, 1))
    assert worker.requests.find("a").num_tokens == 0
    assert worker.requests.find("b").num_tokens == PROMPT + 1


def test_has_work_is_known_before_the_rows_are():
    worker = Worker(CUDA_KERNELS)
    for name, settings in (("core", CORE), ("text", TEXT), ("h2o", CORE)):
        policy = {"policy": "h2o"} if name == "h2o" else {}
        worker.give(name, **settings, **policy)
    for span, has_work in (
        (("core", 0, PROMPT), True),
        (("core", PROMPT, 1), False),
        (("core", PROMPT + 2, 1), False),
        (("core", PROMPT + 2, 2), True),
        (("text", PROMPT, 1), False),
        (("text", PROMPT + 2, 1), True),
        (("text", 644, 1), True),
        # One list for all heads: a graph cannot read one for each.
        (("h2o", PROMPT, 1), True),
    ):
        step = worker.begin(("core", PROMPT + 3, 1), ("stock", 5, 1), span)
        assert step.has_work == has_work, span


def test_tasks_are_made_without_a_number_of_tokens_where_there_is_no_work():
    worker = Worker()
    worker.give("r", **CORE)
    step = worker.begin(("r", PROMPT, 1))
    table = torch.zeros(1, 30, dtype=torch.int32)
    assert make_tasks(step.rows(), table, table, (), BLOCK_SIZE) == []
