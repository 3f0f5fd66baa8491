"""Keeps both halves of vLLM's cache of processed pictures alike.

The front end's half takes a picture in when a prompt is rendered, the engine's when it
gets the request. What is refused in between the engine never sees: the next request
with such a picture would send its hash alone, and fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

from vllm_avl.compat.platform import is_chosen

_entered: ContextVar[list[str] | None] = ContextVar("avl_entered", default=None)
"""Hashes that the front end's half took in for the prompt that is being rendered."""


def new_hashes(made: Mapping[str, Any]) -> Iterator[str]:
    """Yield the hashes that an engine's input brings along with their data."""
    for modality, hashes in made.get("mm_hashes", {}).items():
        items = made["mm_kwargs"].get(modality, ())
        for mm_hash, item in zip(hashes, items, strict=True):
            if item is not None:
                yield mm_hash


def forget(renderer: Any, hashes: Iterable[str]) -> None:
    """Take pictures out of the front end's half: their data will be sent again."""
    if renderer.mm_processor_cache is not None:
        for mm_hash in hashes:
            renderer.mm_processor_cache.invalidate(mm_hash)


def note_entry(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_and_update_item` of the front end's half."""

    @functools.wraps(original)
    def get_and_update_item(self: Any, mm_item: Any, mm_hash: str) -> Any:
        entered = _entered.get()
        if entered is not None and mm_item is not None:
            entered.append(mm_hash)
        return original(self, mm_item, mm_hash)

    return get_and_update_item


def undo_failure(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_process_multimodal`, which may fail after it entered pictures."""

    @functools.wraps(original)
    def _process_multimodal(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_chosen(self.config):
            return original(self, *args, **kwargs)
        entered: list[str] = []
        with ExitStack() as done, ExitStack() as failed:
            done.callback(_entered.reset, _entered.set(entered))
            failed.callback(forget, self, entered)
            made = original(self, *args, **kwargs)
            failed.pop_all()
        return made

    return _process_multimodal
