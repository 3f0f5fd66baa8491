"""A call of an endpoint, followed to its requests."""

import ast
import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

import vllm_avl
from vllm_avl.config import AVLConfig
from vllm_avl.front_end import asks, picture_cache, records
from vllm_avl.front_end.asks import Ask
from vllm_avl.front_end.records import Part, Records


class Cache:
    """The front end's half, as far as it is asked to forget."""

    def __init__(self):
        self.forgotten = []

    def invalidate(self, mm_hash):
        self.forgotten.append(mm_hash)


@pytest.fixture
def ask():
    renderer = SimpleNamespace(mm_processor_cache=Cache())
    return Ask(AVLConfig(introspection=4), 32, renderer)


def made(**items):
    """An engine's input: hashes by modality, with data where there is some."""
    return {
        "mm_hashes": {name: list(of) for name, of in items.items()},
        "mm_kwargs": {name: list(of.values()) for name, of in items.items()},
    }


def request(name, **data):
    features = [
        MultiModalFeatureSpec(
            data=item,
            modality="image",
            identifier=mm_hash,
            mm_position=PlaceholderRange(offset=5 * index, length=5),
            mm_hash=mm_hash,
        )
        for index, (mm_hash, item) in enumerate(data.items())
    ]
    return SimpleNamespace(request_id=name, mm_features=features)


def forgotten(ask):
    return sorted(ask.renderer.mm_processor_cache.forgotten)


def test_what_was_entered_and_not_sent_is_forgotten(ask):
    ask.rendered({}, made(image={"new": 1, "known": None, "sent": 1}, audio={"a": 1}))
    ask.accepted(request("one", sent=1, known=None))
    ask.forget_unsent()
    assert forgotten(ask) == ["a", "new"]
    ask.forget_unsent()
    assert forgotten(ask) == ["a", "new"]


def test_the_data_must_be_sent_and_not_the_hash_alone(ask):
    ask.rendered({}, made(image={"new": 1}))
    ask.accepted(request("second", new=None))
    ask.forget_unsent()
    assert forgotten(ask) == ["new"]


def test_a_stream_that_is_closed_midway_forgets(ask):
    async def items():
        assert asks.current() is ask
        yield 1
        yield 2

    async def read():
        ask.rendered({}, made(image={"new": 1}))
        stream = ask.stream(items())
        assert await anext(stream) == 1
        await stream.aclose()

    asyncio.run(read())
    assert forgotten(ask) == ["new"]


@pytest.mark.parametrize("leaves", [False, True])
def test_pictures_of_a_client_that_leaves_while_they_are_read_are_forgotten(
    ask, leaves
):
    async def render(renderer, prompt, *, skip_mm_cache):
        await asyncio.sleep(0.1)
        return made(image={"new": 1, "known": None})

    async def call():
        prompt = {"multi_modal_data": {"image": ["a", "b"]}}
        with ask.answering():
            return await asks.note_pictures(render)(ask.renderer, prompt)

    async def client():
        task = asyncio.create_task(call())
        await asyncio.sleep(0.01)
        if leaves:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.sleep(0.2)

    asyncio.run(client())
    assert forgotten(ask) == (["new"] if leaves else [])


def test_only_the_call_that_is_answered_is_told(ask):
    assert asks.current() is None
    with ask.answering():
        assert asks.current() is ask
    assert asks.current() is None


def test_a_prompt_that_fails_after_its_pictures_were_entered_forgets_them(
    ask, monkeypatch
):
    monkeypatch.setattr(picture_cache, "is_chosen", lambda config: True)
    enter = picture_cache.note_entry(lambda self, item, mm_hash: None)

    def fail(renderer):
        enter(None, ("item", ()), "new")
        enter(None, None, "known")
        raise ValueError("no place for it")

    renderer = SimpleNamespace(mm_processor_cache=Cache(), config=None)
    with pytest.raises(ValueError, match="no place"):
        picture_cache.undo_failure(fail)(renderer)
    assert renderer.mm_processor_cache.forgotten == ["new"]
    enter(None, ("item", ()), "of another")
    assert renderer.mm_processor_cache.forgotten == ["new"]


def test_a_record_that_a_call_holds_is_found_however_old(monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORDS", 3)
    kept = Records()
    held = kept.begin("held")
    for name in "abcd":
        kept.begin(name)
    gc.collect()
    assert kept.find("held") is held
    assert kept.find("a") is None
    assert kept.find("d") is not None


def test_an_id_that_is_used_again_has_nothing_of_the_first(ask):
    kept = Records()
    first = kept.begin("same", [Part([(0, 5)])])
    second = kept.begin("same")
    assert kept.find("same") is second is not first
    assert second.parts == ()


def test_pictures_of_all_but_the_latest_are_dropped():
    kept = Records()
    picture = SimpleNamespace(num_bytes=1)
    large = SimpleNamespace(num_bytes=records.MAX_PICTURE_BYTES)
    made = {
        name: kept.begin(name, [Part([], one), Part([], picture)])
        for name, one in (("first", picture), ("large", large), ("last", picture))
    }
    for name, record in made.items():
        kept.keep_content(name, record, 2)
    shown = {name: [p.picture for p in one.parts] for name, one in made.items()}
    assert shown["first"] == shown["large"] == [None, None]
    assert shown["last"] == [picture, picture]
    assert made["first"].content is None
    assert made["large"].content is not None


def test_no_check_of_the_front_end_goes_with_python_o():
    root = Path(vllm_avl.__file__).parent
    files = [*(root / "front_end").glob("*.py"), root / "compat" / "endpoint.py"]
    assert len(files) > 10
    for file in files:
        found = [
            n for n in ast.walk(ast.parse(file.read_text())) if type(n) is ast.Assert
        ]
        assert found == [], file
