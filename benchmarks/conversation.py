"""Chats about pictures, as a client holds them: every turn repeats all before it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from benchmarks.engines import Engine, Request
from benchmarks.runs import Run
from benchmarks.testing import models

QUESTIONS = (
    "What do the pictures show?",
    "Which of the shapes is largest, and where does it lie?",
    "How does the background change from left to right?",
    "Which colours come up more than once?",
)


@dataclass
class Chat:
    """A conversation up to the question that is open; answers are the engine's own."""

    images: list[Image.Image]
    output_tokens: int
    text: str
    turn: int = 1

    @property
    def request(self) -> Request:
        """What a client asks in this turn."""
        return Request(self.text, self.images, self.output_tokens)

    def proceed(self, answer: str) -> None:
        """Take the answer in and ask the next question."""
        question = QUESTIONS[self.turn % len(QUESTIONS)]
        self.text += f"{answer}\nUSER:{question}\nASSISTANT:"
        self.turn += 1


class Pictures:
    """Pictures that nobody has seen yet: no cache is hit by accident."""

    def __init__(self, seed: int) -> None:
        self._seeds = itertools.count(seed * 10_000)

    def take(self, count: int) -> list[Image.Image]:
        """Return `count` of them."""
        return [models.random_image(next(self._seeds)) for _ in range(count)]


def begin(images: list[Image.Image], output_tokens: int) -> Chat:
    """Return a chat about `images` at its first question."""
    prompt = models.image_prompt("llava", len(images), QUESTIONS[0])
    return Chat(images, output_tokens, prompt)


def longest(num_images: int, num_turns: int, output_tokens: int) -> int:
    """Return the tokens of a chat's last prompt and its answer."""
    chat = begin(Pictures(0).take(num_images), output_tokens)
    for _ in range(num_turns - 1):
        chat.proceed("x" * output_tokens)
    return chat.request.num_tokens


def ask(
    engine: Engine, chat: Chat, xargs: dict[str, float] | None = None
) -> tuple[Run, list[int]]:
    """Have this turn answered, alone, and let the chat proceed.

    The first turn finds a cold prefix cache, the others what the engine kept.
    """
    num_tokens = chat.request.prompt_tokens
    run = engine.run([chat.request], xargs, keeps_cache=chat.turn > 1)
    (tokens,), (found,) = run.outputs.values(), run.prompt_tokens.values()
    assert found == num_tokens, f"a prompt of {num_tokens} tokens had {found}"
    chat.proceed(engine.decode(tokens))
    return run, tokens


def following(
    engine: Engine, chats: Sequence[Chat], num_turns: int
) -> Callable[[int, list[int]], Request | None]:
    """Return what `Engine.steps` asks for the next turn of the chat at a place."""

    def follow(place: int, tokens: list[int]) -> Request | None:
        chat = chats[place]
        chat.proceed(engine.decode(tokens))
        return chat.request if chat.turn <= num_turns else None

    return follow


def questions(
    images: list[Image.Image], count: int, output_tokens: int
) -> Iterator[Request]:
    """Yield requests that ask different questions about the same pictures."""
    for index in range(count):
        text = f"{index + 1}. {QUESTIONS[index % len(QUESTIONS)]}"
        prompt = models.image_prompt("llava", len(images), text)
        yield Request(prompt, images, output_tokens)
