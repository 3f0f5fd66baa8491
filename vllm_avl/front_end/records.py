"""What a front end knows of its requests: how each is served, pictures, answers.

Requests go by the engine's own ids. Clients choose the ids that answers carry, and may
give the same one to several.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan, count
from vllm_avl.policies import POLICIES

MAX_RECORDS = 4096
MAX_PICTURE_BYTES = 16 << 20
"""Of all pictures of a request; larger ones are not kept."""

Range = tuple[int, int]


class Picture(Protocol):
    """A picture that the model saw."""

    @property
    def num_bytes(self) -> int:
        """What keeping it costs."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as the model saw it, in pixels."""

    @property
    def url(self) -> str:
        """A data URL that shows what the model saw."""


@dataclass
class Part:
    """One picture or video of a prompt."""

    ranges: Sequence[Range]
    """Half-open, of positions of its vision tokens."""
    picture: Picture | None = None
    """None for a video, and where it is not kept."""


@dataclass
class Content:
    """What was answered; kept only where the server was told to."""

    answer: str | None = None
    answer_token_ids: Sequence[int] = ()


@dataclass
class Record:
    """One request."""

    parts: Sequence[Part] = ()
    """In the order of the prompt."""
    decision: Plan | Stock | None = None
    """None until its first token."""
    num_tokens: int | None = None
    """Tokens whose keys and values were computed; None until its end."""
    content: Content | None = None

    def forget_content(self) -> None:
        """Drop pictures and answer."""
        self.content = None
        for part in self.parts:
            part.picture = None


@dataclass
class Records:
    """The latest requests of a front end by the engine's ids; the oldest go.

    Those that somebody else holds on to, such as a call that is not answered yet, are
    found however old.
    """

    _all: WeakValueDictionary[str, Record] = field(default_factory=WeakValueDictionary)
    _latest: OrderedDict[str, Record] = field(default_factory=OrderedDict)
    _with_content: OrderedDict[str, Record] = field(default_factory=OrderedDict)

    def begin(self, request_id: str, parts: Sequence[Part] = ()) -> Record:
        """Begin a record, in place of one of the same id."""
        record = self._all[request_id] = self._latest[request_id] = Record(parts)
        self._latest.move_to_end(request_id)
        if len(self._latest) > MAX_RECORDS:
            self._latest.popitem(last=False)
        return record

    def keep_content(self, request_id: str, record: Record, limit: int) -> None:
        """Keep a request's pictures, and its answer later, of the last `limit`."""
        kept = [part.picture for part in record.parts if part.picture is not None]
        if sum(picture.num_bytes for picture in kept) > MAX_PICTURE_BYTES:
            record.forget_content()
        record.content = Content()
        self._with_content[request_id] = record
        if len(self._with_content) > limit:
            _, oldest = self._with_content.popitem(last=False)
            oldest.forget_content()

    def find(self, request_id: str) -> Record | None:
        """Return a request's record."""
        return self._all.get(request_id)


RECORDS = Records()
"""Of this process: it has one front end."""


def counts(record: Record, block_size: int) -> dict[str, int] | None:
    """Count what a request held at its end, None where that is not known.

    All requests have the same fields, and clients may add them up.
    """
    plan, num_tokens = record.decision, record.num_tokens
    if plan is None or num_tokens is None:
        return None
    freed = 0
    if isinstance(plan, Plan):
        freed = plan.num_freed_blocks(num_tokens)
    return {
        "requests_adapted": int(isinstance(plan, Plan)),
        "blocks_held": -(-num_tokens // block_size) - freed,
        "blocks_freed": freed,
    }


def facts(record: Record) -> dict[str, Any]:
    """Say how a request was served, in words and in what is not to be added up."""
    plan = record.decision
    if not isinstance(plan, Plan):
        return {"adapted": False, "reason": plan and plan.value}
    said = {
        "adapted": True,
        "policy": plan.config.policy,
        "block_size": plan.block_size,
        "shares_prompt": plan.shares,
        "vision_tokens": count(plan.vision_ranges),
    }
    if not POLICIES[plan.config.policy].ranks_text:
        behind = count(plan.vision_ranges) - plan.num_vision_tokens
        said |= {
            "vision_tokens_stored": plan.num_stored_vision + behind,
            "vision_tokens_core": plan.num_core_vision + behind,
        }
    return said
