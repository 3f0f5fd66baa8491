"""What a front end knows of its requests: how each is served, pictures, answers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan, count
from vllm_avl.policies import POLICIES

MAX_RECORDS = 4096
MAX_PICTURE_CHARACTERS = 16 << 20
"""Of all pictures of a request, as data URLs; larger ones are not kept."""

Range = tuple[int, int]


@dataclass
class Content:
    """What was asked and answered; kept only where the server was told to."""

    pictures: Sequence[str]
    """URLs, in the order of the prompt."""
    answer: str | None = None
    answer_token_ids: Sequence[int] = ()


@dataclass
class Record:
    """One request, by the id its answer carries."""

    picture_ranges: Sequence[Sequence[Range]] = ()
    """For each picture, half-open ranges of positions of its vision tokens."""
    decision: Plan | Stock | None = None
    """None until its first token."""
    content: Content | None = None


@dataclass
class Records:
    """The latest requests of a front end; the oldest go."""

    _records: OrderedDict[str, Record] = field(default_factory=OrderedDict)
    _with_content: OrderedDict[str, Record] = field(default_factory=OrderedDict)

    def add(self, request_id: str) -> Record:
        """Begin a record, or return the one there is."""
        record = self._records.setdefault(request_id, Record())
        if len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        return record

    def keep_content(self, request_id: str, urls: Sequence[str], limit: int) -> None:
        """Keep a request's pictures, and its answer later, of the last `limit`."""
        if sum(map(len, urls)) > MAX_PICTURE_CHARACTERS:
            urls = ()
        record = self.add(request_id)
        record.content = Content(urls)
        self._with_content[request_id] = record
        if len(self._with_content) > limit:
            _, oldest = self._with_content.popitem(last=False)
            oldest.content = None

    def find(self, request_id: str) -> Record | None:
        """Return a request's record."""
        return self._records.get(request_id)


RECORDS = Records()
"""Of this process: it has one front end."""


def usage(record: Record, num_tokens: int) -> dict[str, Any] | None:
    """Return what a response says of how its request was served.

    Args:
        record: of the request.
        num_tokens: tokens whose keys and values were computed.
    """
    plan = record.decision
    if plan is None:
        return None
    if isinstance(plan, Stock):
        return {"adapted": False, "reason": plan.value}
    freed = plan.num_freed_blocks(num_tokens)
    num_blocks = -(-num_tokens // plan.block_size)
    said = {
        "adapted": True,
        "policy": plan.config.policy,
        "block_size": plan.block_size,
        "blocks_held": num_blocks - freed,
        "blocks_freed": freed,
    }
    if not POLICIES[plan.config.policy].ranks_text:
        behind = count(plan.vision_ranges) - plan.num_vision_tokens
        said |= {
            "vision_tokens": count(plan.vision_ranges),
            "vision_tokens_stored": plan.num_stored_vision + behind,
            "vision_tokens_core": plan.num_core_vision + behind,
        }
    return said
