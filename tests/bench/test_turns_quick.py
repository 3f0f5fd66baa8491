"""Turns of chats: the short form measures all four parts, and the gate is one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
from printed_tables import printed_tables

from benchmarks import conversation, runs, short_pool, turns
from benchmarks.testing.models.tokens import make_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "turns.py"


def run(*options, timeout=100):
    command = [sys.executable, str(SCRIPT), *options]
    return preloaded.run(command, timeout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder that the short form wrote to, and what it printed."""
    folder = tmp_path_factory.mktemp("turns")
    folders = ["--results", str(folder), "--checkpoints", str(folder / "models")]
    result = run("--quick", *folders, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout


def test_tokens_were_compared_before_the_clock_started(measured):
    _, printed = measured
    for part in ("3 turns", "chats", "questions"):
        checked = f"checked: `avl: 0` gives stock's tokens in {part}"
        assert checked in printed
        heading = {"3 turns": "A turn of a chat"}.get(part, f"short pool: {part}")
        assert printed.index(checked) < printed.index(heading)


def test_the_settings_in_force_are_printed(measured):
    _, printed = measured
    stock, avl = printed.split("\navl: ", 1)
    for line in (stock.splitlines()[-1], avl.splitlines()[0]):
        assert "dtype bfloat16, block_size 32" in line
        assert "prefix_caching True" in line
    assert "stock: backend CPU_ATTN" in stock
    assert "store_ratio 0.5" in avl


@pytest.mark.parametrize(("table", "part"), enumerate(("turns", "offloaded")))
def test_later_turns_find_the_chat(measured, table, part):
    folder, printed = measured
    rows = printed_tables(printed)[table]
    assert [(row["pictures"], row["turn"]) for row in rows] == [
        ("1", "1"),
        ("1", "2"),
        ("1", "3"),
    ]
    assert (rows[0]["stock_hits"], rows[0]["avl_hits"]) == ("0", "0")
    lengths = [float(row["prompt_tokens"]) for row in rows]
    assert lengths == sorted(set(lengths))
    for row in rows[1:]:
        for name in ("stock", "avl"):
            assert 0 < float(row[f"{name}_hits"]) < float(row["prompt_tokens"])
        # Stock has to compute the last block of the turn before, and the new text.
        assert float(row["stock_hits"]) > 576
    assert {"ratio", "ratio_p10", "ratio_p90", "steps_ratio", "answer_ratio"} < set(row)
    assert all(float(row["avl_blocks"]) < float(row["stock_blocks"]) for row in rows)
    assert (folder / f"{part}-quick.png").stat().st_size > 5_000
    assert not list(folder.glob("*.csv"))


def test_a_short_pool_serves_chats_and_questions(measured):
    _, printed = measured
    _, _, chats, questions = printed_tables(printed)
    for rows in (chats, questions):
        assert [row["variant"] for row in rows] == ["stock", "avl"]
        assert {"peak_running", "mean_running", "preemptions", "ratio"} < set(rows[0])
        assert all(0 < float(row["hit_rate"]) < 1 for row in rows)
    assert int(chats[0]["peak_running"]) < 3


def test_a_ratio_that_keeps_all_is_refused():
    result = run("--store-ratio", "1")
    assert result.returncode == 2
    assert "--store-ratio 1 must be below 1" in result.stderr


def test_a_chat_is_what_its_template_makes_of_it():
    chat = conversation.begin(conversation.Pictures(0).take(2), 4)
    chat.proceed("Yes!")
    first, second = conversation.QUESTIONS[:2]
    picture = {"type": "image"}
    text = {"type": "text", "text": first}
    messages = [
        {"role": "user", "content": [picture, picture, text]},
        {"role": "assistant", "content": "Yes!"},
        {"role": "user", "content": second},
    ]
    tokenizer = make_tokenizer("llava", ["<image>"])
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert chat.text == rendered
    assert conversation.longest(2, 2, 4) == chat.request.num_tokens


def test_pictures_are_taken_once():
    pictures = conversation.Pictures(seed=1)
    taken = [image.tobytes() for image in pictures.take(2) + pictures.take(2)]
    assert len(set(taken)) == 4


def fake_engine(tokens, pool_use, tokens_when_off=None, num_hits=1):
    """Return an engine whose every answer is `tokens`."""

    def run(workload, xargs=None, **options):
        answer = (tokens_when_off if xargs else None) or tokens
        names = [str(index) for index, _ in enumerate(workload)]
        lengths = [request.prompt_tokens for request in workload]
        return runs.Run(
            outputs=dict.fromkeys(names, answer),
            prompt_tokens=dict(zip(names, lengths, strict=True)),
            cached_tokens=dict.fromkeys(names, num_hits),
            pool_use=[pool_use],
        )

    return SimpleNamespace(
        run=run, decode=lambda tokens: "x" * len(tokens), flush=lambda: None
    )


ARGS = SimpleNamespace(turns=2, output_tokens=2)


@pytest.mark.parametrize(
    ("pool_use", "when_off", "reason"),
    [
        (0.1, [1, 3], "turn 1 with 1 pictures: .* different tokens"),
        (0.2, [1, 2], "turn 1 with 1 pictures: avl holds as many blocks"),
    ],
)
def test_nothing_is_timed_unless_avl_0_is_stock(pool_use, when_off, reason):
    stock = fake_engine([1, 2], 0.2)
    avl = fake_engine([1, 4], pool_use, when_off)
    with pytest.raises(SystemExit, match=reason):
        check(stock, avl)
    check(stock, fake_engine([1, 4], 0.1, [1, 2]))
    with pytest.raises(SystemExit, match="turn 2 .* found nowhere"):
        check(stock, fake_engine([1, 4], 0.1, [1, 2], num_hits=0))


def check(stock, avl):
    engines = {"stock": stock, "avl": avl}
    turns.check(engines, conversation.Pictures(0), [1], forgets=True, args=ARGS)


@pytest.mark.parametrize("part", ["chats", "questions"])
def test_no_pool_is_timed_unless_avl_0_is_stock(part):
    load = short_pool.Load(part, 2, 1, 2, 2)
    stock, avl = (fake_engine([1, last], 0.1) for last in (2, 3))
    pictures = conversation.Pictures(0)
    with pytest.raises(SystemExit, match=f"{part}: .* different tokens"):
        short_pool.check(load, {"stock": stock, "avl": avl}, pictures)
