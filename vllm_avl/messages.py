"""All that travels between processes: each message has a sender and a receiver here.

| from | to | message | in |
| --- | --- | --- | --- |
| scheduler | workers | compactions | the step's `SchedulerOutput` |
| worker | scheduler | a step's counts | its `ModelRunnerOutput` |
| scheduler | front end | how a request is served | its first `EngineCoreOutput` |
| scheduler | front end | sums and levels | `SchedulerStats` |

The first two are objects of Python, and take an attribute more. The others are structs
that have no field for a plug-in: a message borrows the one for KV connectors, lies
beside what a connector says there, and is taken out before anybody else looks. What a
front end asks workers for, by a call of their methods, is in `reports.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Compaction, Plan

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput

FIELD = "avl"

_decisions = TypeAdapter(Plan | Stock)


@dataclass(frozen=True)
class Statistics:
    """What an engine has to say after a step."""

    counts: Mapping[str, float]
    """What was added since the last message, by `metrics.definitions.key`."""
    levels: Mapping[str, float]
    """What holds now."""


def send_compactions(
    output: SchedulerOutput, compactions: dict[str, Compaction]
) -> None:
    """Let them travel to every worker with the step that ends the prompts."""
    output.avl_compactions = compactions  # type: ignore[attr-defined]


def received_compactions(output: SchedulerOutput) -> dict[str, Compaction]:
    """What came with a step, by request id."""
    return getattr(output, "avl_compactions", {})


def send_counts(output: ModelRunnerOutput, counts: Mapping[str, float]) -> None:
    """Let a worker's counts travel with the output of its step, which has ended."""
    output.avl_counts = {  # type: ignore[attr-defined]
        name: float(number) for name, number in counts.items()
    }


def received_counts(output: ModelRunnerOutput) -> Mapping[str, float]:
    """Counts that came with a worker's output."""
    return getattr(output, "avl_counts", {})


def send_decision(output: EngineCoreOutput, decision: Plan | Stock) -> None:
    """Put what was decided of its request into an engine's output."""
    dumped = _decisions.dump_python(decision, mode="json")
    output.kv_transfer_params = _beside(output.kv_transfer_params, dumped)


def take_decision(output: EngineCoreOutput) -> Plan | Stock | None:
    """Take what was decided out of an engine's output."""
    ours, output.kv_transfer_params = _apart(output.kv_transfer_params)
    return None if ours is None else _decisions.validate_python(ours)


def send_statistics(stats: SchedulerStats, statistics: Statistics) -> None:
    """Put ours into an engine's statistics."""
    stats.kv_connector_stats = _beside(stats.kv_connector_stats, vars(statistics))


def take_statistics(stats: SchedulerStats) -> Statistics | None:
    """Take ours out of an engine's statistics."""
    ours, stats.kv_connector_stats = _apart(stats.kv_connector_stats)
    return None if ours is None else Statistics(**ours)


def _beside(theirs: dict[str, Any] | None, ours: Any) -> dict[str, Any]:
    return (theirs or {}) | {FIELD: ours}


def _apart(field: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Return our message, None where there is none, and the field as it was."""
    if field is None or FIELD not in field:
        return None, field
    theirs = {name: value for name, value in field.items() if name != FIELD}
    return field[FIELD], theirs or None
