"""Tells the front end how each request is served, with its first token.

`EngineCoreOutput` has no field for a plug-in. The message travels in the one for KV
connectors, which are refused beside us, and is taken out before anybody else looks.
"""

from __future__ import annotations

from pydantic import TypeAdapter
from vllm.v1.engine import EngineCoreOutput

from vllm_avl.metrics.definitions import Stock
from vllm_avl.plan import Plan

FIELD = "avl"
_decisions = TypeAdapter(Plan | Stock)


def send(output: EngineCoreOutput, decision: Plan | Stock) -> None:
    """Put what was decided of its request into an engine's output."""
    dumped = _decisions.dump_python(decision, mode="json")
    output.kv_transfer_params = {FIELD: dumped}


def receive(output: EngineCoreOutput) -> Plan | Stock | None:
    """Take what was decided out of an engine's output."""
    carried = output.kv_transfer_params
    if carried is None or FIELD not in carried:
        return None
    output.kv_transfer_params = None
    return _decisions.validate_python(carried[FIELD])
