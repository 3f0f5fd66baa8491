"""Our messages go beside what a KV connector says in the same field, and come out."""

import pytest
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import SchedulerStats

from vllm_avl.messages import (
    Statistics,
    send_decision,
    send_statistics,
    take_decision,
    take_statistics,
)
from vllm_avl.metrics.definitions import Stock


@pytest.mark.parametrize("theirs", [None, {"ExampleConnector": {"num_loads": 3}}])
def test_statistics(theirs):
    message = Statistics(**dict.fromkeys(Statistics.__dataclass_fields__, 0))
    made = SchedulerStats(kv_connector_stats=theirs)
    send_statistics(made, message)
    assert (theirs or {}).items() <= made.kv_connector_stats.items()
    assert take_statistics(made) == message
    assert made.kv_connector_stats == theirs
    assert take_statistics(made) is None


@pytest.mark.parametrize("theirs", [None, {"do_remote_prefill": True}])
def test_decisions(theirs):
    output = EngineCoreOutput("one", [7], kv_transfer_params=theirs)
    send_decision(output, Stock.OFF)
    assert (theirs or {}).items() <= output.kv_transfer_params.items()
    assert take_decision(output) is Stock.OFF
    assert output.kv_transfer_params == theirs
    assert take_decision(output) is None
