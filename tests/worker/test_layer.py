"""One request in one layer: what is stored, which of it is core, what steps read.

Every step's attention is compared with an oracle by positions, see `served`.
"""

from unittest.mock import patch

import pytest
import torch
from served import (
    BLOCK_SIZE,
    MODULES,
    NUM_FULL,
    NUM_HEADS,
    NUM_KV_HEADS,
    PROMPT,
    VISION,
    OnCPU,
    OnTriton,
    Served,
    probabilities,
    two_ranks,
)

from benchmarks.testing.interpreted import interpreted
from vllm_avl import plan as plans
from vllm_avl.worker.cuda import listed_rows
from vllm_avl.worker.introspection import report

CORE = {
    "observation_window": 4,
    "store_ratio": 0.5,
    "core_ratio": 0.2,
    "refresh_interval": 2,
}
TEXT = {"text_keep_ratio": 0.1}
DEVICES = pytest.mark.parametrize(
    "device", [OnCPU, OnTriton], ids=["cpu", "interpreted"]
)
FULL = NUM_FULL * BLOCK_SIZE
RANKED = [p for start, end in VISION for p in range(start, end)]
FIXED = sorted(set(range(FULL)) - set(RANKED))


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    # Programs run one after the other here.
    with interpreted(*MODULES), patch.object(listed_rows, "PROGRAMS_PER_DEVICE", 4):
        yield


def serve(device, *lengths, **settings):
    """Serve a prompt and further steps; yield the request after each."""
    request = Served(device, **settings)
    request.end_prompt()
    yield request
    for num_new in lengths:
        request.step(num_new)
        yield request


def served(device, *lengths, **settings):
    *_, last = serve(device, *lengths, **settings)
    return last


def told(request):
    """Core, secondary, evicted and text."""
    layer = request.report()
    return layer.core, layer.secondary, layer.evicted, layer.text


@pytest.fixture(autouse=True)
def _short_window(monkeypatch):
    monkeypatch.setattr(plans, "TEXT_MIN_TOKENS", 4)


SETTINGS = {
    "core": {},
    "one-row": {"observation_window": 1},
    "all-stored": {"store_ratio": 1.0},
    "max": {"head_reduction": "max"},
    "max-h2o": {"head_reduction": "max", "policy": "h2o"},
    "max-text": {"head_reduction": "max"} | TEXT,
    "all-ranks": {"refresh_all_ranks": True},
    "two-ranks": {"refresh_all_ranks": True, "ranks": two_ranks()},
    "two-ranks-max": {
        "refresh_all_ranks": True,
        "ranks": two_ranks(),
        "head_reduction": "max",
    },
    "every-step": {"refresh_interval": 1} | TEXT,
    "h2o": {"policy": "h2o"},
    "h2o-in-graph": {"policy": "h2o", "num_lists": 2},
    "random": {"policy": "random"},
    "fastv": {"policy": "fastv"},
    "snapkv": {"policy": "snapkv"},
    "keydiff": {"policy": "keydiff"},
    "mixkv": {"policy": "mixkv"},
    "mixkv-max": {"policy": "mixkv", "head_reduction": "max"},
    "mixkv-text": TEXT | {"policy": "mixkv"},
    "mixkv-two-ranks": {"policy": "mixkv", "ranks": two_ranks()},
    "streaming": {"policy": "streaming"},
    "text": TEXT,
    "text-in-graph": TEXT | {"num_lists": 2},
    "text-all-stored": TEXT | {"store_ratio": 1.0},
    "text-without-core": TEXT | {"core_ratio": None},
    "h2o-text": TEXT | {"policy": "h2o"},
}
STEPS = 1, 1, 1, 30, 1, 1
"""Ordinary steps and refreshes, then a replay, in which text leaves, and so on."""


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_both_devices_store_and_read_the_same_tokens(settings):
    settings = CORE | settings
    pairs = zip(
        serve(OnCPU, *STEPS, **settings),
        serve(OnTriton, *STEPS, **settings),
        strict=True,
    )
    for one, other in pairs:
        assert told(one) == told(other)
        assert one.cores() == other.cores()
        for request in (one, other):
            request.check_rows()
        if one.rows.sums is not None:
            # Rows lie in another order within core, and behind it.
            by_slot = [
                (request.rows.positions.expand(NUM_KV_HEADS, -1))
                for request in (one, other)
            ]
            sums = [
                request.rows.sums.gather(1, positions.argsort(1))
                for request, positions in zip((one, other), by_slot, strict=True)
            ]
            torch.testing.assert_close(*sums, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_shared_prompt_is_read_as_private_copies_of_it_are(settings):
    settings = CORE | settings
    pairs = zip(
        serve(OnCPU, *STEPS, **settings),
        serve(OnCPU, *STEPS, shares=True, **settings),
        strict=True,
    )
    for one, other in pairs:
        assert told(one) == told(other)
        assert one.cores() == other.cores()
        other.check_rows()
        assert other.rows.start == 0


@pytest.mark.parametrize("settings", [{}, TEXT], ids=["vision", "text"])
def test_a_shared_prompt_without_core_is_read_by_what_stays(settings):
    settings = {"observation_window": 4, "store_ratio": 0.3} | settings
    for request in serve(OnCPU, *STEPS, shares=True, **settings):
        plan, kept = request.plan, request.rows.stays()
        num_evicted = FULL - plan.num_stored_rows
        num_evicted += BLOCK_SIZE * plan.num_evicted_text_blocks(request.length)
        assert (~kept).sum(1).tolist() == [num_evicted] * len(kept)


@DEVICES
@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "random"}, {"policy": "h2o"}, {"head_reduction": "max"}, TEXT],
    ids=["avl", "random", "h2o", "max", "text"],
)
def test_core_changes_in_refreshes_alone(device, settings):
    cores = [
        request.cores() for request in serve(device, 1, 1, 1, 1, 5, **CORE | settings)
    ]
    ranked = set(range(FULL)) if settings.get("policy") == "h2o" else set(RANKED)
    chosen = [[set(core) & ranked for core in heads] for heads in cores]
    assert chosen[0] == chosen[1] != chosen[2] == chosen[3] != chosen[4] != chosen[5]


def best(scores, among, count):
    """The `count` best of some positions; of equals the lowest."""
    return set(sorted(among, key=lambda p: (-float(scores[p]), p))[:count])


def row_of(request):
    """The query of the step just taken."""
    torch.manual_seed(request.length)
    return torch.randn(1, NUM_HEADS, 16)[0]


@DEVICES
def test_what_the_last_rows_look_at_is_stored_and_the_most_of_it_core(device):
    request = served(device, **CORE | {"observation_window": 3})
    torch.manual_seed(PROMPT)
    query = torch.randn(PROMPT, NUM_HEADS, 16)
    scores = torch.zeros(PROMPT)
    for row in range(PROMPT - 3, PROMPT):
        scores[: row + 1] += probabilities(query[row], request.keys[: row + 1]).sum(0)
    plan = request.plan
    stored = best(scores, RANKED, plan.num_stored_vision)
    core = best(scores, stored, plan.num_core_vision)
    assert told(request)[:3] == (
        [sorted(core)],
        [sorted(stored - core)],
        [sorted(set(RANKED) - stored)],
    )


@DEVICES
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_a_refresh_takes_what_its_row_looks_at(device, reduction):
    request = served(device, 1, 1, head_reduction=reduction, **CORE)
    stored = request.rows.positions[0].tolist() + list(range(FULL, PROMPT + 2))
    seen = torch.zeros(NUM_HEADS, PROMPT + 2)
    seen[:, stored] = probabilities(row_of(request), request.keys[stored])
    scores = seen.sum(0) if reduction == "mean" else seen.amax(0)
    ranked = set(RANKED) & set(stored)
    core = best(scores, ranked, request.plan.num_core_vision)
    assert request.report().core == [sorted(core)]


# Where rows lie.


@DEVICES
@pytest.mark.parametrize("policy", ["avl", "h2o", "snapkv", "random"])
def test_core_is_the_first_slots_at_the_prompts_end(device, policy):
    request = served(device, policy=policy, **CORE)
    plan, rows = request.plan, request.rows
    mask = rows.mask()
    assert mask[:, : plan.num_core_rows].all()
    assert not mask[:, plan.num_core_rows :].any()
    assert rows.num_slots == plan.num_stored_rows
    if policy in ("avl", "random"):
        assert rows.positions[0, : len(FIXED)].tolist() == FIXED


@DEVICES
@pytest.mark.parametrize("settings", [{}, TEXT, {"policy": "random"}], ids=str)
def test_without_core_rows_keep_the_order_of_the_prompt(device, settings):
    settings = {"store_ratio": 0.5, "introspection": 1} | settings
    request = Served(device, **settings)
    request.end_prompt()
    request.check_rows()
    for num_new in (1, 1, 4):
        request.step(num_new)
    if settings.get("text_keep_ratio"):
        # Survivors of the first block fill holes behind it.
        assert request.rows.start > request.plan.first_stored_block * BLOCK_SIZE
        return
    ranked = request.rows.positions[0, len(FIXED) :]
    assert len(ranked) == request.plan.num_stored_vision
    assert (ranked.diff() > 0).all()
    assert request.tasks == []


def test_on_a_cpu_rows_lie_best_first():
    request = served(OnCPU, **CORE | {"observation_window": 1})
    torch.manual_seed(PROMPT)
    query = torch.randn(PROMPT, NUM_HEADS, 16)[-1]
    scores = probabilities(query, request.keys[:PROMPT]).sum(0)
    ranked = request.rows.positions[0, len(FIXED) :].tolist()
    assert ranked == sorted(ranked, key=lambda p: (-float(scores[p]), p))


def test_on_a_gpu_positions_ascend_in_core_and_behind_it():
    request = served(OnTriton, **CORE)
    plan, positions = request.plan, request.rows.positions[0]
    for part in (
        positions[len(FIXED) : plan.num_core_rows],
        positions[plan.num_core_rows :],
    ):
        assert (part.diff() > 0).all()


@DEVICES
@pytest.mark.parametrize("settings", [{}, TEXT, {"policy": "h2o"}], ids=str)
def test_a_refresh_moves_no_row(device, settings):
    request = served(device, **CORE | settings)
    positions = request.rows.positions
    request.step()
    before = request.device.kv_cache.clone()
    request.step()
    assert request.rows.num_slots >= positions.shape[1]
    assert torch.equal(request.rows.positions[:, : positions.shape[1]], positions)
    # The step's own row is the runner's to write.
    block = request.table[(request.length - 1) // BLOCK_SIZE]
    for cache in (before, request.device.kv_cache):
        cache[block] = 0
    assert torch.equal(before.nan_to_num(), request.device.kv_cache.nan_to_num())


ALL_STORED = CORE | {"store_ratio": 1.0}


def prompt_bits(request):
    """What lies in the prompt's full blocks, and in those that kept rows go to."""
    blocks = [*request.table[:NUM_FULL].tolist(), *request.told.block_ids]
    return request.device.kv_cache[blocks].clone()


@DEVICES
@pytest.mark.parametrize("policy", ["avl", "h2o"])
def test_where_all_is_stored_rows_stay_and_nothing_is_written(device, policy):
    request = Served(device, range(NUM_FULL), policy=policy, **ALL_STORED)
    before = prompt_bits(request)
    request.end_prompt()
    assert torch.equal(prompt_bits(request), before)
    for num_new in (1, 1, 1, 6, 1):
        request.step(num_new)
        request.check_rows()
    assert torch.equal(prompt_bits(request), before)
    assert torch.equal(request.rows.positions[0], torch.arange(FULL))
    private = served(device, 1, 1, 1, 6, 1, policy=policy, **ALL_STORED)
    assert told(request) == told(private)


@DEVICES
def test_where_all_is_stored_blocks_that_must_not_be_shared_are_copied(device):
    targets = [None if index in (0, 1, 5) else index for index in range(NUM_FULL)]
    request = Served(device, targets, **ALL_STORED)
    writes = request.device.kv_cache[request.table[:NUM_FULL].long()].clone()
    request.end_prompt()
    kept = [index for index in range(NUM_FULL) if targets[index] is not None]
    ids = request.table[kept].long()
    assert torch.equal(request.device.kv_cache[ids], writes[kept])
    request.check_rows()
    private = list(request.told.block_ids)
    assert torch.equal(request.device.kv_cache[private], writes)
    request.step(1)
    request.step(1)
    assert told(request) == told(served(device, 1, 1, **ALL_STORED))


IN_PLACE = {
    "last": [2, 3, 4, 5],
    "last-first": [5, 4, 3, 2],
    "mixed": [None, 5, None, 0],
    "any-order": [4, 0, 5, 1],
}


@DEVICES
@pytest.mark.parametrize("targets", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(
    "settings",
    [CORE, CORE | TEXT, CORE | {"policy": "h2o"}],
    ids=["avl", "text", "h2o"],
)
def test_rows_in_place_are_those_in_private_blocks(device, targets, settings):
    private, ours = Served(device, **settings), Served(device, targets, **settings)
    assert ours.told.in_place
    assert not private.told.in_place
    private.end_prompt()
    ours.end_prompt()
    for num_new in (1, 1, 1):
        assert torch.equal(ours.rows.positions, private.rows.positions)
        assert ours.cores() == private.cores()
        ours.check_rows()
        assert torch.equal(ours.step(num_new), private.step(num_new))


# Text.


@DEVICES
@pytest.mark.parametrize("policy", ["avl", "h2o"])
@pytest.mark.parametrize("scores", [True, False], ids=["with-scores", "alone"])
def test_core_goes_along_where_text_leaves(device, scores, policy):
    settings = {"policy": policy, "refresh_interval": 2 if scores else 1000}
    request = served(device, **CORE | TEXT | settings)
    evicted = request.plan.num_evicted_text_blocks
    leaving = next(n for n in range(PROMPT, PROMPT + 60) if evicted(n) > 1)
    # Replays, which score; the rest one by one.
    request.step(leaving - 3 - PROMPT + (leaving - PROMPT) % 2)
    while request.length < leaving - 1:
        request.step()
    before = [set(core) for core in request.cores()]
    stored = [set(request.positions(head, core=False).tolist()) for head in (0, 1)]
    request.step()
    assert [task.num_aged for task in request.tasks] == [BLOCK_SIZE]
    assert request.tasks[0].refreshes == (scores and (leaving - PROMPT) % 2 == 0)
    request.check_rows()
    for head in (0, 1):
        now = set(request.positions(head, core=False).tolist())
        gone = stored[head] - now
        assert len(gone) == BLOCK_SIZE
        assert gone <= before[head], "what only refreshes read is no text in a window"
        assert policy == "h2o" or not gone & set(RANKED)
        assert min(gone) >= VISION[0][0]
        if not request.tasks[0].refreshes:
            core = set(request.cores()[head])
            assert core - {request.length - 1} == before[head] - gone
    for _ in range(3):
        request.step()


@DEVICES
def test_text_that_leaves_at_the_prompts_end_is_in_nobodys_core(device):
    request = served(device, **CORE | TEXT)
    assert request.tasks[0].num_aged == BLOCK_SIZE
    rows, plan = request.rows, request.plan
    assert rows.start == (plan.first_stored_block + 1) * BLOCK_SIZE
    size = plan.num_stored_rows + PROMPT - FULL - BLOCK_SIZE
    assert rows.positions.shape == (NUM_KV_HEADS, size)
    assert rows.mask().sum(1).tolist() == [size - plan.num_secondary_rows] * 2
    request.check_rows()


@DEVICES
def test_what_appended_text_has_not_been_scored_is_not_a_number(device):
    request = served(device, 1, **TEXT | CORE)
    assert not request.rows.sums.isnan().any()
    request.step()
    assert not request.rows.sums.isnan().any()
    assert request.rows.sums.shape == request.rows.positions.shape


# Who looks.


@pytest.mark.parametrize("device", [OnCPU, OnTriton], ids=["cpu", "interpreted"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"policy": "h2o"}, TEXT, {"head_reduction": "max"}],
    ids=["avl", "h2o", "text", "max"],
)
def test_introspection_changes_no_bit_and_no_path(device, settings):
    ours = Served(device, **CORE | settings)
    seen = Served(device, introspection=2, **CORE | settings)
    assert torch.equal(ours.end_prompt(), seen.end_prompt())
    assert ours.state.core_in_pass == seen.state.core_in_pass
    assert seen.state.core_in_pass == (device is OnTriton and settings == {})
    selections = [(PROMPT, seen.report().core)]
    for num_new in STEPS:
        assert torch.equal(ours.step(num_new), seen.step(num_new))
        assert len(ours.tasks) == len(seen.tasks)
        if num_new > 1 or (seen.length - PROMPT) % 2 == 0:
            selections.append((seen.length, seen.report().core))
    for one in (ours.rows, seen.rows):
        one.extend(ours.length)
    assert torch.equal(ours.rows.positions, seen.rows.positions)
    assert torch.equal(ours.rows.mask(), seen.rows.mask())
    caches = (each.device.kv_cache.nan_to_num() for each in (ours, seen))
    assert torch.equal(*caches)
    history = seen.report().history
    if settings != TEXT:
        assert [(at.num_tokens, at.core) for at in history] == selections
    lengths = [at.num_tokens for at in history]
    assert sorted(set(lengths)) == [length for length, _ in selections]
    assert ours.report().history == []


def test_a_pass_that_chooses_core_leaves_python_nothing_to_do():
    in_pass, by_python = [], []
    for request in serve(OnTriton, 1, 1, 1, 1, **CORE):
        in_pass.append(len(request.tasks))
    for request in serve(OnTriton, 1, 1, 1, 1, policy="h2o", **CORE):
        by_python.append(len(request.tasks))
    assert in_pass == [1, 0, 0, 0, 0]
    assert by_python == [1, 0, 1, 0, 1]


@DEVICES
def test_rows_that_enter_core_are_counted(device):
    request = served(device, 1, **CORE)
    before = set(request.report().core[0])
    request.requests.counts.take()
    request.step()
    entered = set(request.report().core[0]) - before
    counts = request.requests.counts.take()
    assert counts["core_rows_entered"] == len(entered) > 0
    assert counts["refreshes"] == 1
    if device is OnCPU:
        # In kernels the metadata builder knows of all layers.
        assert counts["core_rows_selected"] == request.plan.num_core_vision


@DEVICES
def test_a_request_that_is_remembered_tells_what_it_told(device):
    request = served(device, 1, 1, 1, **CORE)
    before, state = told(request), request.state
    request.requests.update(["r"], (), {})
    request.device.kv_cache.fill_(torch.nan)
    if device is OnTriton:
        request.device.in_graph.row_tokens["layer"].zero_()
    (layer,) = report("r", state).layers
    assert (layer.core, layer.secondary, layer.evicted, layer.text) == before
