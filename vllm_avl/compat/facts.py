"""Tells the front end how each request is served, with its first token.

`EngineCoreOutput` has no field for a plug-in. The message travels in the one for KV
connectors, beside what a connector says, and is taken out before anybody else looks.
"""

from __future__ import annotations

from pydantic import TypeAdapter
from vllm.v1.engine import EngineCoreOutput

from vllm_avl.compat.borrowed import put_into, take_from
from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan

_decisions = TypeAdapter(Plan | Stock)


def send(output: EngineCoreOutput, decision: Plan | Stock) -> None:
    """Put what was decided of its request into an engine's output."""
    dumped = _decisions.dump_python(decision, mode="json")
    output.kv_transfer_params = put_into(output.kv_transfer_params, dumped)


def receive(output: EngineCoreOutput) -> Plan | Stock | None:
    """Take what was decided out of an engine's output."""
    ours, output.kv_transfer_params = take_from(output.kv_transfer_params)
    return None if ours is None else _decisions.validate_python(ours)
