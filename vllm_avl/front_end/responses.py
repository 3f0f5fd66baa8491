"""Lets answers say how their requests were served.

Usage gets counts alone, which clients add up; the rest stands beside it, in a field of
the answer's own.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any

from vllm.entrypoints.anthropic.protocol import (
    AnthropicMessagesResponse,
    AnthropicUsage,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_avl.compat.platform import is_chosen
from vllm_avl.front_end import asks, request_settings
from vllm_avl.front_end.asks import Ask

FIELD = "avl"


def follow_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an endpoint's `create_...`: its answer says how it was served."""

    @functools.wraps(original)
    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        vllm_config = self.engine_client.vllm_config
        if not is_chosen(vllm_config):
            return await original(self, request, raw_request)
        # Before pictures are read: that is cheaper than to forget them.
        config = request_settings.check(
            vllm_config, getattr(request, "vllm_xargs", None)
        )
        ask = Ask.of(vllm_config, self.renderer, config)
        answer = await _followed(ask, original(self, request, raw_request))
        # A beam search is many requests of one token each.
        says = not getattr(request, "use_beam_search", False)
        if isinstance(answer, ChatCompletionResponse) and says:
            _extend(answer, ask)
        elif isinstance(answer, AsyncGenerator):
            return ask.stream(_extend_last(answer, ask) if says else answer)
        return answer

    return create


async def _followed(ask: Ask, call: Awaitable[Any]) -> Any:
    """Await an answer; if it is a refusal, forget the call's pictures."""
    with ExitStack() as refused:
        refused.callback(ask.forget_unsent)
        with ask.answering():
            answer = await call
        if not isinstance(answer, ErrorResponse):
            refused.pop_all()
    return answer


def say_in_response(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `responses_full_generator`, which makes all answers of /v1/responses."""

    @functools.wraps(original)
    async def responses_full_generator(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await original(self, *args, **kwargs)
        ask = asks.current()
        if ask is not None and isinstance(answer, ResponsesResponse):
            _extend(answer, ask)
        return answer

    return responses_full_generator


def _extend(answer: Any, ask: Ask) -> None:
    """Add what is known of a call to its answer, whose models take extra fields."""
    counted = ask.usage()
    if counted is not None and answer.usage is not None:
        setattr(answer.usage, FIELD, counted)
        setattr(answer, FIELD, ask.facts())


async def _extend_last(
    chunks: AsyncGenerator[Any, None], ask: Ask
) -> AsyncGenerator[Any, None]:
    """Pass a stream on; the chunk that ends a chat's has usage and no choices."""
    async with aclosing(chunks):
        async for chunk in chunks:
            yield _extend_chunk(chunk, ask) if _is_last(chunk) else chunk


def _is_last(chunk: Any) -> bool:
    return isinstance(chunk, str) and '"choices":[]' in chunk and '"usage"' in chunk


def _extend_chunk(chunk: str, ask: Ask) -> str:
    said = _read(chunk)
    counted = ask.usage()
    if counted is None or not said["usage"]:
        return chunk
    said["usage"][FIELD] = counted
    return _written(chunk, said | {FIELD: ask.facts()})


class _MessageUsage(AnthropicUsage):
    avl: dict[str, int]


class _Message(AnthropicMessagesResponse):
    """An answer of /v1/messages, whose models take no extra fields."""

    usage: _MessageUsage
    avl: list[dict[str, Any]]


def say_in_message(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `messages_full_converter`: keep what the chat completion says."""

    @functools.wraps(original)
    def messages_full_converter(self: Any, generator: ChatCompletionResponse) -> Any:
        made = original(self, generator)
        said = (generator.model_extra or {}).get(FIELD)
        if said is None:
            return made
        counted = dict(made.usage) | {FIELD: getattr(generator.usage, FIELD)}
        return _Message(**(dict(made) | {"usage": counted, FIELD: said}))

    return messages_full_converter


def say_in_messages(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `message_stream_converter`: keep what the chat's last chunk says."""

    @functools.wraps(original)
    async def message_stream_converter(
        self: Any, generator: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        last: dict[str, Any] = {}

        async def overheard() -> AsyncGenerator[str, None]:
            async with aclosing(generator):
                async for chunk in generator:
                    if _is_last(chunk):
                        last.update(_read(chunk))
                    yield chunk

        async with aclosing(original(self, overheard())) as events:
            async for event in events:
                if FIELD in last and event.startswith("event: message_delta\n"):
                    said = _read(event)
                    said["usage"][FIELD] = last["usage"][FIELD]
                    yield _written(event, said | {FIELD: last[FIELD]})
                else:
                    yield event

    return message_stream_converter


def _read(event: str) -> dict[str, Any]:
    return json.loads(event.partition("data: ")[2])


def _written(event: str, said: dict[str, Any]) -> str:
    head, _, _ = event.partition("data: ")
    return f"{head}data: {json.dumps(said, separators=(',', ':'))}\n\n"
