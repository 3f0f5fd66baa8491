"""What the endpoints answer, as OpenAPI describes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from vllm_avl.metrics.pool import Sample
from vllm_avl.reports import ANSWER, Held, LayerReport


class Answer(BaseModel):
    """Base of all answers: nothing is in them that is not described."""

    model_config = ANSWER


class Fault(Answer):
    """Why there is no answer."""

    detail: str


class Config(Answer):
    """What the server was started with."""

    version: str = Field(description="of vllm-avl")
    vllm_version: str
    model: str
    settings: dict[str, Any] = Field(
        description="additional_config.avl, defaults filled in"
    )
    block_size: int = Field(description="tokens a KV block holds")
    num_blocks: int | None = Field(description="blocks of one engine's pool")
    shows_content: bool = Field(
        description="whether pictures and answers are kept for the page"
    )
    remembers: int = Field(description="finished requests whose rows are remembered")


class Stats(Answer):
    """Totals since the start, and the pool's recent past."""

    metrics: dict[str, float] = Field(
        description="every vllm_avl_* metric; labels other than model and engine are "
        "appended as {label=value}"
    )
    num_blocks: int | None
    block_size: int
    pool: list[Sample] = Field(description="oldest first, at most one a second")


class Summary(Answer):
    """One adaptive request in the list."""

    id: str = Field(description="the engine's own: no other request has it")
    name: str = Field(
        description="the id its answer carries; clients may give several the same"
    )
    running: bool
    policy: str
    num_prompt_tokens: int
    num_tokens: int = Field(description="prompt and answer, evicted or not")
    num_vision_tokens: int
    num_refreshes: int
    num_blocks_held: int
    num_blocks_freed: int


class Requests(Answer):
    """Adaptive requests that are running or remembered."""

    requests: list[Summary] = Field(description="newest first")
    remembers: int = Field(description="finished requests that are remembered")


class Grid(Answer):
    """A rectangle of the picture whose patches are consecutive tokens, by rows."""

    start: int = Field(description="position of the upper left patch")
    rows: int
    columns: int
    box: tuple[float, float, float, float] = Field(
        description="left, upper, right, lower as fractions of the picture"
    )


class Picture(Answer):
    """One picture or video of the prompt."""

    ranges: list[tuple[int, int]] = Field(
        description="half-open ranges of positions of its vision tokens"
    )
    width: int | None = Field(
        description="pixels, as the model saw it; null where it was not kept"
    )
    height: int | None
    url: str | None = Field(
        description="data URL of what the model saw; null where it was not kept"
    )
    grids: list[Grid] = Field(
        description="where its tokens lie; empty where that is not known"
    )


@dataclass(frozen=True)
class Layer(LayerReport):
    """Original positions in one layer of one tensor-parallel rank, ascending.

    Lists have one entry where all KV heads hold the same tokens, else one a KV head.
    `core` is read by every step, `secondary` on refresh steps only, `evicted` is gone,
    and `text` is everything else that is stored.
    """

    rank: int


class Detail(Summary):
    """One adaptive request in full."""

    settings: dict[str, Any] = Field(description="the settings that hold for it")
    ranked_ranges: list[tuple[int, int]] = Field(
        description="half-open ranges of positions of the vision tokens that can be "
        "evicted; those behind are always stored"
    )
    timeline: list[Held] = Field(description="each length at which a count changes")
    pictures: list[Picture]
    layers: list[Layer]
    answer: str | None = Field(description="null where it is not shown")
    answer_tokens: list[str] | None = Field(description="as answer, token by token")
    hidden: str | None = Field(
        description="why picture and answer are not shown; null where they are"
    )
