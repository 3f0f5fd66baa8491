"""Measures the KV blocks that a served request holds, from the server's /metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vllm_avl.demo.server import Server, ServerError, picture_url, user_message

# The prompt's blocks come free in the step after its last chunk: skip the first words.
FIRST_SAMPLE = 8
EVERY_CHUNK = {"include_usage": True, "continuous_usage_stats": True}
ENOUGH = 3
"""Samples of a run that can be compared."""
ATTEMPTS = 5
"""A busy machine samples so seldom that an answer may end before there are enough."""


@dataclass(frozen=True)
class Question:
    """What is asked: the same for both runs."""

    pictures: Sequence[Image.Image]
    text: str
    max_tokens: int

    @property
    def messages(self) -> list[Any]:
        """As the chat API takes it."""
        return [user_message(self.text, list(map(picture_url, self.pictures)))]


@dataclass
class Measurement:
    """What the server reported while one answer was streaming."""

    block_size: int
    num_prompt_tokens: int = 0
    held_blocks: dict[int, int] = field(default_factory=dict)
    """Blocks held, by the number of answer tokens that were there at that time."""

    def nth_block(self, length: int) -> int | None:
        """Block being filled at a length; None too near to its borders to say."""
        block, filled = divmod(self.num_prompt_tokens + length, self.block_size)
        return block if 2 <= filled < self.block_size - 2 else None

    @property
    def usable(self) -> dict[int, int]:
        """`held_blocks` at the lengths that can be compared."""
        return {
            length: held
            for length, held in self.held_blocks.items()
            if self.nth_block(length) is not None
        }


def ask(server: Server, question: Question, *, avl: bool) -> Measurement:
    """Stream one answer and sample the blocks held meanwhile.

    Raises:
        ServerError: the server was too busy to be sampled.
    """
    measured = Measurement(server.metrics().block_size)
    for _ in range(ATTEMPTS):
        _sample(server, question, measured, avl=avl)
        if len(measured.usable) >= ENOUGH:
            return measured
    raise ServerError(
        f"too few looks at /metrics in {ATTEMPTS} answers: raise --max-tokens"
    )


def _sample(
    server: Server, question: Question, measured: Measurement, *, avl: bool
) -> None:
    """Stream an answer and add to `measured`."""
    xargs = {} if avl else {"vllm_xargs": {"avl": 0}}
    before = settled_tokens(server)
    stream = server.client().chat.completions.create(
        model=server.model,
        messages=question.messages,
        # Past its end, until there are enough samples.
        max_tokens=4 * question.max_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "stream_options": EVERY_CHUNK, **xargs},
    )
    for number, chunk in enumerate(stream):
        if chunk.usage is not None:
            measured.num_prompt_tokens = chunk.usage.prompt_tokens
        if number >= FIRST_SAMPLE:
            metrics = server.metrics()
            length = metrics.num_generated_tokens - before
            # The answer may have ended since its chunk was sent.
            if metrics.held_blocks > 0:
                measured.held_blocks[length] = metrics.held_blocks
        if len(measured.usable) >= ENOUGH:
            break
    stream.close()


def settled_tokens(server: Server) -> int:
    """Return the tokens generated so far, once an aborted answer adds no more."""
    tokens = -1
    while tokens != (now := server.metrics().num_generated_tokens):
        tokens = now
        time.sleep(0.5)
    return tokens


def compare(avl: Measurement, stock: Measurement) -> tuple[int, int, int]:
    """Return a length of the answer, and the blocks either run held at that length.

    The runs are sampled at other lengths: the nearest are taken, and the blocks that an
    answer grows by in between are added.
    """
    _, theirs, ours = min(
        (abs(ours - theirs), theirs, ours)
        for ours in avl.usable
        for theirs in stock.usable
    )
    grown = (stock.nth_block(theirs) or 0) - (stock.nth_block(ours) or 0)
    return theirs, avl.held_blocks[ours] + grown, stock.held_blocks[theirs]


def table(server: Server, avl: Measurement, stock: Measurement) -> str:
    """Lay the two measurements side by side."""
    metrics = server.metrics()
    pool, size = metrics.num_blocks, metrics.block_size
    length, kept, whole = compare(avl, stock)
    rows = (
        ("held by stock vLLM (avl: 0)", whole),
        ("kept with --attention-backend avl", kept),
        ("freed for other requests", whole - kept),
    )
    head = (
        f"KV cache after {stock.num_prompt_tokens} prompt and {length} answer tokens, "
        "from the server's /metrics"
    )
    lines = [head, f"{'':36}{'blocks':>8}{'tokens':>8}{'of the pool':>13}"]
    for name, blocks in rows:
        share = f"{blocks / pool:.1%}"
        lines.append(f"  {name:34}{blocks:>8}{blocks * size:>8}{share:>13}")
    return "\n".join(lines)
