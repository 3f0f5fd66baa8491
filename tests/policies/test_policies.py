"""Policies, on token views made by hand."""

from dataclasses import replace

import pytest
import torch
from vllm_avl.kernels.cpu import rank_rows

from vllm_avl.config import AVLConfig, parse_config
from vllm_avl.policies import POLICIES, TokenView
from vllm_avl.worker.rows import LayerRows
from vllm_avl.worker.selection import Candidates, best_slots

INF = float("inf")


def view_of(num_tokens=60, num_groups=1, **changes):
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.rand(num_groups, num_tokens, generator=generator)

    view = TokenView(
        positions=torch.arange(num_tokens),
        attention=draw(),
        sums=draw(),
        held=torch.ones(num_groups, num_tokens, dtype=torch.bool),
        num_kept=torch.full((num_groups, 1), num_tokens // 2),
        num_scoring_rows=1,
        layer=1,
        num_computed=num_tokens + 3,
        memo={},
    )
    return replace(view, **changes)


def rows_of(num_groups=3, num_tokens=60, head_size=16):
    generator = torch.Generator().manual_seed(1)
    shape = 2, num_groups, num_tokens, head_size
    keys, values = torch.randn(shape, generator=generator)
    return {"keys": keys, "values": values}


def view_for(policy):
    view = view_of(num_groups=3 if policy.per_head or policy.reads_rows else 1)
    if policy.reads_rows:
        view = replace(view, **rows_of())
    return view if policy.keeps_sums else replace(view, sums=None)


each = pytest.mark.parametrize("name", POLICIES)


def test_settings_take_the_registered_names_and_no_other():
    for name in POLICIES:
        assert parse_config({"avl": {"policy": name}}).policy == name
    with pytest.raises(ValueError, match=", ".join(POLICIES)):
        parse_config({"avl": {"policy": "AVL"}})
    assert AVLConfig().policy in POLICIES


@each
def test_a_score_for_every_token_of_every_group(name):
    view = view_for(POLICIES[name])
    assert POLICIES[name].score(view).shape == view.attention.shape


@each
def test_scores_are_finite_or_protect(name):
    scores = POLICIES[name].score(view_for(POLICIES[name]))
    assert not scores.isnan().any()
    assert (scores > -INF).all()


@each
def test_equal_views_get_equal_scores(name):
    policy = POLICIES[name]
    first, second = (policy.score(view_for(policy)) for _ in range(2))
    assert torch.equal(first, second)


@each
def test_a_view_is_only_read(name):
    policy = POLICIES[name]
    view, untouched = view_for(policy), view_for(policy)
    policy.score(view)
    read = ("keys", "values") if policy.reads_rows else ()
    for field in ("positions", "attention", "held", "num_kept", *read):
        assert torch.equal(getattr(view, field), getattr(untouched, field))


@each
def test_every_policy_spends_the_same(name):
    policy = POLICIES[name]
    view = view_for(policy)
    scores = POLICIES[name].score(view)
    nothing = torch.empty(0, dtype=torch.int64)
    kept = rank_rows(scores, scores, 30, 20, view.positions, nothing).long()
    rows = LayerRows(0, kept)
    candidates = Candidates(view.positions, rows, int(view.positions[-1]) + 1)
    by_slot = candidates.by_slot(scores)
    core = best_slots(by_slot, kept, torch.ones_like(kept, dtype=torch.bool), 10)
    assert kept.shape == (len(scores), 30)
    assert (core.sum(1) == 20).all()
    # What is best is first: core is the first slots.
    assert core[:, :20].all()


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("ranks_text", {"h2o", "snapkv", "streaming"}),
        ("per_head", {"h2o", "snapkv"}),
        ("keeps_sums", {"h2o"}),
        ("reads_rows", {"keydiff", "mixkv"}),
        (
            "refreshes",
            {"avl", "full", "h2o", "keydiff", "mixkv", "random"},
        ),
        ("adapts", set(POLICIES) - {"full"}),
    ],
)
def test_what_the_papers_ask_of_the_template(requirement, expected):
    assert {n for n, p in POLICIES.items() if getattr(p, requirement)} == expected


def test_windows_are_those_of_the_documents():
    windows = {name: policy.window for name, policy in POLICIES.items()}
    many = {"avl": 32, "h2o": 32, "mixkv": 32, "snapkv": 32}
    assert windows == dict.fromkeys(POLICIES, 1) | many


def test_avl_ranks_by_attention():
    view = view_of()
    assert torch.equal(POLICIES["avl"].score(view), view.attention)


@pytest.mark.parametrize("name", ["keydiff", "mixkv"])
def test_refreshes_rank_by_attention_where_rows_are_read(name):
    view = view_of()
    assert torch.equal(POLICIES[name].score(view), view.attention)


def test_a_key_unlike_the_others_with_a_large_value_goes_first_for_keydiff():
    keys = torch.zeros(1, 5, 4)
    keys[..., 0], keys[0, 3] = 1.0, torch.tensor([0.0, 2.0, 0.0, 0.0])
    values = torch.ones(1, 5, 4)
    values[0, 3], values[0, 4] = 2.0, 3.0
    view = view_of(5, keys=keys, values=values)
    scores = POLICIES["keydiff"].score(view)
    assert scores[0].argmax() == 3
    # Without both, nothing: a large value alone does not count.
    assert scores[0, [0, 1, 2, 4]].eq(0).all()
    turned = replace(view, attention=view.attention.flip(1), num_scoring_rows=9)
    assert torch.equal(POLICIES["keydiff"].score(turned), scores)


def test_mixkv_is_diversity_where_all_keys_are_alike():
    keys = torch.ones(1, 60, 4)
    keys[0, 7, 0] = 1.01
    view = view_of(keys=keys, values=torch.rand(1, 60, 4))
    assert POLICIES["mixkv"].score(view)[0].argmax() == 7


def test_mixkv_is_importance_where_no_two_keys_are_alike():
    keys, values = torch.eye(60).unsqueeze(0), torch.ones(1, 60, 4)
    view = view_of(keys=keys, values=values)
    scores = POLICIES["mixkv"].score(view)
    assert torch.equal(scores.argsort(), view.attention.argsort())
    values[0, 9] = 2.0
    assert POLICIES["mixkv"].score(view)[0].argmax() == 9


def test_mixkv_gives_diversity_and_norm_the_weight_of_attention():
    rows = rows_of()
    view = view_of(num_groups=3, **rows)
    unit = rows["keys"] / rows["keys"].norm(dim=2, keepdim=True)
    cosines = unit @ unit.transpose(1, 2)
    redundancy = (cosines.sum((1, 2)) - 60) / (60 * 59)
    assert (redundancy.abs() < 0.1).all()

    def scaled(numbers):
        numbers = numbers - numbers.amin(1, keepdim=True)
        mean = view.attention.mean(1, keepdim=True)
        return numbers / numbers.mean(1, keepdim=True) * mean

    weight = redundancy.clamp(min=0).unsqueeze(1)
    expected = weight * scaled(-cosines.mean(2))
    norm = scaled(rows["values"].norm(dim=2))
    expected = expected + (1 - weight) * (view.attention + norm)
    torch.testing.assert_close(POLICIES["mixkv"].score(view), expected)


def test_full_prefers_nothing():
    assert POLICIES["full"].score(view_of()).unique().numel() == 1


def test_streaming_protects_the_sinks_and_prefers_the_recent():
    scores = POLICIES["streaming"].score(view_of(8))[0]
    assert scores.isinf().tolist() == [True] * 4 + [False] * 4
    assert scores[4:].argsort().tolist() == [0, 1, 2, 3]


def test_sinks_are_the_sequences_first_tokens_not_the_views():
    view = view_of(5, positions=torch.tensor([2, 3, 4, 9, 11]))
    scores = POLICIES["streaming"].score(view)
    assert scores.isinf().tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize(
    ("num_kept", "num_recent"), [(4, 3), (5, 4), (7, 5), (20, 15), (1, 1)]
)
def test_h2o_protects_three_quarters_of_its_budget(num_kept, num_recent):
    view = view_of(30, num_kept=torch.tensor([[num_kept]]))
    scores = POLICIES["h2o"].score(view)
    assert scores[0, 30 - num_recent :].isinf().all()
    assert torch.equal(scores[0, : 30 - num_recent], view.sums[0, : 30 - num_recent])


def test_h2o_counts_recent_tokens_among_the_held_of_each_head():
    held = torch.ones(2, 10, dtype=torch.bool)
    held[0, 7:9] = False
    view = view_of(10, 2, held=held, num_kept=torch.tensor([[4], [8]]))
    protected = POLICIES["h2o"].score(view).isinf() & held
    assert protected[0].nonzero().flatten().tolist() == [5, 6, 9]
    assert protected[1].nonzero().flatten().tolist() == [4, 5, 6, 7, 8, 9]


def test_snapkv_spreads_attention_to_three_neighbours_on_each_side():
    attention = torch.zeros(2, 50)
    attention[0, 10] = attention[1, 1] = 1.0
    scores = POLICIES["snapkv"].score(view_of(50, 2, attention=attention))
    tokens = [row.eq(1.0).nonzero().flatten().tolist() for row in scores]
    assert tokens == [[7, 8, 9, 10, 11, 12, 13], [0, 1, 2, 3, 4]]


def test_snapkv_protects_the_observing_tokens():
    scores = POLICIES["snapkv"].score(view_of(50, num_computed=70, num_scoring_rows=32))
    assert scores.isinf()[0].nonzero().flatten().tolist() == list(range(38, 50))


def test_snapkv_does_not_count_what_observing_tokens_pay_each_other():
    attention = torch.zeros(1, 50)
    attention[0, 45] = 1.0
    view = view_of(50, attention=attention, num_computed=50, num_scoring_rows=5)
    assert POLICIES["snapkv"].score(view)[0, :45].eq(0).all()


@pytest.mark.parametrize("layers", [range(4), (5, 11, 17, 23)], ids=["all", "hybrid"])
def test_fastv_ranks_by_the_second_adapted_layer_in_all_behind_it(layers):
    memo, own = {}, torch.rand(4, 1, 60)
    for _core in range(2):
        scores = [
            POLICIES["fastv"].score(view_of(layer=layer, attention=weights, memo=memo))
            for layer, weights in zip(layers, own, strict=True)
        ]
        for score, ranking in zip(scores, [0, 1, 1, 1], strict=True):
            assert torch.equal(score, own[ranking])


def test_fastv_requests_do_not_share_a_ranking():
    for seed in range(2):
        memo, own = {}, torch.full((1, 60), float(seed))
        POLICIES["fastv"].score(view_of(layer=0, memo=memo))
        POLICIES["fastv"].score(view_of(layer=1, attention=own, memo=memo))
        later = POLICIES["fastv"].score(view_of(layer=2, memo=memo))
        assert torch.equal(later, own)


@pytest.mark.parametrize(
    "change", [{"layer": 2}, {"num_computed": 64}], ids=["layer", "length"]
)
def test_random_draws_anew(change):
    policy = POLICIES["random"]
    assert not torch.equal(policy.score(view_of()), policy.score(view_of(**change)))


def test_random_draws_for_the_tokens_not_from_them():
    policy = POLICIES["random"]
    other = view_of(attention=torch.zeros(1, 60))
    assert torch.equal(policy.score(view_of()), policy.score(other))


def test_random_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    POLICIES["random"].score(view_of())
    assert torch.equal(torch.get_rng_state(), before)
