"""Every metric: its name, what it means, and the values its label takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

PREFIX = "vllm_avl_"


class Stock(StrEnum):
    """Why a request is served exactly as stock."""

    POOLING = "pooling"
    ONE_TOKEN = "one_token"
    REMOTE_DECODE = "remote_decode"
    STREAMING_INPUT = "streaming_input"
    OFF = "off"
    NO_VISION = "no_vision"
    POLICY_FULL = "policy_full"
    NOTHING_TO_SAVE = "nothing_to_save"
    NO_PRESSURE = "no_pressure"
    NO_ROOM = "no_room"


class Stage(StrEnum):
    """What a worker does for adaptive requests after its attention."""

    SCORING = "scoring"
    COMPACTION = "compaction"
    REFRESH = "refresh"
    TEXT_EVICTION = "text_eviction"


@dataclass(frozen=True)
class Metric:
    """One family of /metrics, labelled by model and engine as vLLM's own are."""

    name: str
    """Behind `PREFIX`, and without a counter's `_total`."""
    help: str
    label: type[StrEnum] | None = None
    """What tells its members apart; the label is called as the class, lower-cased."""

    @property
    def label_name(self) -> str | None:
        """The label besides model and engine."""
        return LABELS[self.label] if self.label else None


LABELS: dict[type[StrEnum], str] = {Stock: "reason", Stage: "stage"}

COUNTERS = (
    Metric("requests_adapted", "Requests served adaptively."),
    Metric(
        "requests_left_alone",
        "Requests served exactly as stock. reason: pooling, one_token (max_tokens 1), "
        "remote_decode (another server reads the prompt's blocks by a KV connector), "
        "streaming_input, off (avl 0, or several answers), no_vision, policy_full, "
        "nothing_to_save (too few vision tokens for these ratios), no_pressure "
        "(engage: pressure, and the pool has room), no_room (a KV connector reads the "
        "prompt's blocks, and the pool has none beside them).",
        Stock,
    ),
    Metric(
        "vision_tokens_stored",
        "Vision tokens whose KV cache stayed stored after prefill.",
    ),
    Metric("vision_tokens_evicted", "Vision tokens evicted after prefill."),
    Metric(
        "text_tokens_stored", "Prompt text whose KV cache stayed stored after prefill."
    ),
    Metric("text_tokens_evicted", "Text tokens evicted as they aged."),
    Metric(
        "mixed_tokens_evicted",
        "Tokens evicted after prefill by policies that do not tell vision from text.",
    ),
    Metric(
        "blocks_freed_early",
        "KV blocks that went back to the pool before their request ended.",
    ),
    Metric("refreshes", "Selections of core during decoding."),
    Metric(
        "core_rows_selected", "Ranked rows that refreshes took into core, all layers."
    ),
    Metric(
        "core_rows_entered",
        "Rows among core_rows_selected that had not been in core before.",
    ),
    Metric(
        "seconds",
        "Host seconds of one worker, besides attention. stage: scoring (the "
        "prompt), compaction (ranking, copying), refresh, text_eviction.",
        Stage,
    ),
)
GAUGES = (
    Metric("requests_running", "Adaptive requests whose prompt has been computed."),
    Metric("kv_blocks_held", "KV blocks that requests hold."),
    Metric(
        "kv_blocks_private",
        "Of these, KV blocks in which adaptive requests keep rows of their prompts; "
        "nobody shares them.",
    ),
    Metric(
        "kv_blocks_stock",
        "KV blocks that these requests would hold without eviction; a prompt that "
        "several share counts once.",
    ),
    Metric("kv_bytes_held", "kv_blocks_held in bytes, on one worker."),
    Metric("kv_bytes_stock", "kv_blocks_stock in bytes, on one worker."),
    Metric(
        "engaged",
        "1 while new requests are adapted; with engage: pressure, 0 while the pool "
        "has room.",
    ),
)


def key(name: str, value: StrEnum | None = None) -> str:
    """Return what a message calls a metric, or a labelled member of it."""
    return name if value is None else f"{name}/{value}"
