"""Lets a chat completion's usage say how its request was served."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)

from vllm_avl.compat import overrides
from vllm_avl.compat.platform import is_chosen
from vllm_avl.endpoints.records import RECORDS, usage

asked_pictures: ContextVar[Sequence[str]] = ContextVar("avl_asked_pictures", default=())
"""URLs of the pictures in the chat request that this task answers."""


def say_in_usage(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_chat_completion`: the usage of its answer has an `avl` field."""

    @functools.wraps(original)
    async def create_chat_completion(
        self: Any, request: ChatCompletionRequest, raw_request: Any = None
    ) -> Any:
        if not is_chosen(self.engine_client.vllm_config):
            return await original(self, request, raw_request)
        # Before pictures are read: a request refused later leaves the front end's cache
        # of pictures unlike the engine's.
        overrides.check(self.engine_client.vllm_config, request.vllm_xargs)
        asked_pictures.set(tuple(_picture_urls(request)))
        answer = await original(self, request, raw_request)
        if isinstance(answer, ChatCompletionResponse):
            answer.usage = _extend(answer.id, answer.usage)
        elif isinstance(answer, AsyncGenerator):
            return _extend_last(answer)
        return answer

    return create_chat_completion


def _picture_urls(request: ChatCompletionRequest) -> Iterator[str]:
    for message in request.messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                picture = part.get("image_url")
                yield picture["url"] if isinstance(picture, dict) else str(picture)


def _extend(request_id: str, counted: Any) -> Any:
    """Add what is known of a request to a `UsageInfo`, which takes extra fields."""
    said = _said(request_id, counted.prompt_tokens, counted.completion_tokens)
    return counted if said is None else counted.model_copy(update={"avl": said})


def _said(request_id: str, prompt: int, answer: int) -> dict[str, Any] | None:
    record = RECORDS.find(request_id)
    # Nobody computes keys and values of the last token.
    return None if record is None else usage(record, prompt + answer - 1)


async def _extend_last(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Pass a stream on; only the chunk that ends it has usage and no choices."""
    async with aclosing(chunks):
        async for chunk in chunks:
            if '"choices":[]' in chunk and '"usage"' in chunk:
                yield _extend_chunk(chunk)
            else:
                yield chunk


def _extend_chunk(chunk: str) -> str:
    head, _, body = chunk.partition("data: ")
    said = json.loads(body)
    counted = said["usage"]
    avl = _said(said["id"], counted["prompt_tokens"], counted["completion_tokens"])
    if avl is None:
        return chunk
    counted["avl"] = avl
    return f"{head}data: {json.dumps(said, separators=(',', ':'))}\n\n"
