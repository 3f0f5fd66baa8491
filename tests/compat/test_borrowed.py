"""Our messages go beside what a KV connector says in the same field, and come out."""

import pytest
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import SchedulerStats

from vllm_avl.compat import facts, stats
from vllm_avl.metrics.collectors import Message
from vllm_avl.metrics.definitions import Stock


@pytest.mark.parametrize("theirs", [None, {"ExampleConnector": {"num_loads": 3}}])
def test_statistics(theirs):
    message = Message(**dict.fromkeys(Message.__dataclass_fields__, 0))
    made = SchedulerStats(kv_connector_stats=theirs)
    stats.send(made, message)
    assert (theirs or {}).items() <= made.kv_connector_stats.items()
    assert stats.receive(made) == message
    assert made.kv_connector_stats == theirs
    assert stats.receive(made) is None


@pytest.mark.parametrize("theirs", [None, {"do_remote_prefill": True}])
def test_decisions(theirs):
    output = EngineCoreOutput("one", [7], kv_transfer_params=theirs)
    facts.send(output, Stock.OFF)
    assert (theirs or {}).items() <= output.kv_transfer_params.items()
    assert facts.receive(output) is Stock.OFF
    assert output.kv_transfer_params == theirs
    assert facts.receive(output) is None
