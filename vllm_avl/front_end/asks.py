"""Follows one call of an endpoint to the engine's requests that it makes.

Clients choose the id that their answer carries, so nothing is looked up by it: what a
call rendered and what became of it hang on an `Ask`, which is the context's own.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.engine import EngineCoreRequest

from vllm_avl.compat.platform import block_size
from vllm_avl.config import AVLConfig
from vllm_avl.front_end import picture_cache
from vllm_avl.front_end.pictures import SentPicture
from vllm_avl.front_end.records import RECORDS, Part, Record, counts, facts
from vllm_avl.scheduler.admission import embedded_ranges, is_vision

Item = TypeVar("Item")


@dataclass
class Ask:
    """A call, from its messages to its answer."""

    config: AVLConfig
    block_size: int
    renderer: Any
    records: dict[str, Record] = field(default_factory=dict)
    """Of its requests, by the engine's ids."""
    _pictures: dict[tuple[str, str], SentPicture] = field(default_factory=dict)
    """By modality and hash, where the hash is the content's."""
    _unsent: set[str] = field(default_factory=set)
    """Hashes that the front end's cache took in for it, and the engine has not got."""

    @classmethod
    def of(cls, vllm_config: VllmConfig, renderer: Any, config: AVLConfig) -> Ask:
        """Begin a call to a server."""
        return cls(config, block_size(vllm_config), renderer)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Make this the call that the current task answers."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    async def stream(
        self, items: AsyncGenerator[Item, None]
    ) -> AsyncGenerator[Item, None]:
        """Pass a stream on; whatever task reads it answers this call."""
        # Not reset: a stream may be closed from another context than it was read in.
        _current.set(self)
        try:
            async with aclosing(items):
                async for item in items:
                    yield item
        finally:
            self.forget_unsent()

    def rendered(self, prompt: Mapping[str, Any], made: Mapping[str, Any]) -> None:
        """Note what became of the pictures in a prompt.

        Args:
            prompt: with `multi_modal_data`.
            made: the engine's input, with a hash for each of them.
        """
        self._unsent |= set(picture_cache.new_hashes(made))
        if self.config.show_content:
            self._pictures |= _pictures(prompt, made)

    def accepted(self, request: EngineCoreRequest) -> None:
        """Note a request that is on its way to the engine."""
        features = request.mm_features or ()
        self._unsent -= {f.mm_hash for f in features if f.data is not None}
        limit = self.config.introspection
        parts = [self._part(f) for f in features if limit and is_vision(f)]
        record = RECORDS.begin(request.request_id, parts)
        self.records[request.request_id] = record
        if self.config.show_content and parts:
            RECORDS.keep_content(request.request_id, record, limit)

    def _part(self, feature: MultiModalFeatureSpec) -> Part:
        picture = self._pictures.get((feature.modality, feature.mm_hash))
        return Part(list(embedded_ranges(feature)), picture)

    def forget_unsent(self) -> None:
        """Forget pictures that were rendered for requests that were refused."""
        picture_cache.forget(self.renderer, self._unsent)
        self._unsent.clear()

    def usage(self) -> dict[str, int] | None:
        """Return the counts of all its requests, added up."""
        total: dict[str, int] = {}
        for record in self.records.values():
            for name, number in (counts(record, self.block_size) or {}).items():
                total[name] = total.get(name, 0) + number
        return total or None

    def facts(self) -> list[dict[str, Any]]:
        """Return how each of its requests was served."""
        return [{"id": name} | facts(record) for name, record in self.records.items()]


_current: ContextVar[Ask | None] = ContextVar("avl_ask", default=None)


def current() -> Ask | None:
    """Return the call that the current task answers."""
    return _current.get()


def note_pictures(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_process_tokens_async`: a call learns of its pictures."""

    @functools.wraps(original)
    async def _process_tokens_async(
        self: Any, prompt: Any, *, skip_mm_cache: bool = False
    ) -> Any:
        ask = current()
        making = original(self, prompt, skip_mm_cache=skip_mm_cache)
        if ask is None or skip_mm_cache or not prompt.get("multi_modal_data"):
            return await making
        made = await _undone_if_left(making, self)
        ask.rendered(prompt, made)
        return made

    return _process_tokens_async


async def _undone_if_left(
    making: Coroutine[Any, Any, Mapping[str, Any]], renderer: Any
) -> Mapping[str, Any]:
    """Await an engine's input; if the client leaves, forget its pictures in the end.

    A thread makes it, and goes on.
    """
    task = asyncio.ensure_future(making)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_undo, renderer))
        raise


def _undo(renderer: Any, task: asyncio.Future[Mapping[str, Any]]) -> None:
    if not task.cancelled() and task.exception() is None:
        picture_cache.forget(renderer, picture_cache.new_hashes(task.result()))


def note_request(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `add_request`: a call learns of its requests."""

    @functools.wraps(original)
    def add_request(
        self: Any, request: EngineCoreRequest, *args: Any, **kwargs: Any
    ) -> None:
        goes_on = request.request_id in self.request_states
        original(self, request, *args, **kwargs)
        ask = current()
        if ask is not None and not goes_on:
            ask.accepted(request)

    return add_request


def _pictures(
    prompt: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[tuple[str, str], SentPicture]:
    """Find the pictures of a prompt by what their features will be called.

    One that its client named (`uuid`) is left out: the engine may have another picture
    under that name.
    """
    found = {}
    for modality, hashes in made["mm_hashes"].items():
        items = _as_list(prompt["multi_modal_data"].get(modality))
        names = _as_list((prompt.get("multi_modal_uuids") or {}).get(modality))
        if len(items) != len(hashes):
            continue
        for index, (item, mm_hash) in enumerate(zip(items, hashes, strict=True)):
            picture = SentPicture.of(item)
            is_named = index < len(names) and names[index] is not None
            if picture is not None and not is_named:
                found[modality, mm_hash] = picture
    return found


def _as_list(items: Any) -> list[Any]:
    if items is None:
        return []
    return list(items) if isinstance(items, (list, tuple)) else [items]
