"""Computes prompts in a process of its own, for a server that reads them over NIXL.

    python prefiller.py CHECKPOINT [AVL.json]

run in the folder tests, or with it on PYTHONPATH. Reads one request a line as JSON,
the fields of `Ask`, and writes a line with what to hand to the other server. null asks
how many of the pool's blocks are in use.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PREFIX = "PREFILLED "
REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}


def transfer_config(checks=True):
    """A server's connector, which may leave out vLLM's check for two equal ones."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="NixlConnector",
        kv_role="kv_both",
        kv_buffer_device="cpu",
        kv_connector_extra_config={"enforce_handshake_compat": checks},
    )


def prefill(engine, ask):
    """Compute a prompt; return where it lies."""
    params = ask.params()
    params.extra_args = (params.extra_args or {}) | {
        "kv_transfer_params": REMOTE_DECODE
    }
    engine.llm.llm_engine.add_request("prefill", engine.prompt(ask), params)
    outputs = []
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs += engine.llm.llm_engine.step()
        engine.check_integrity()
    return outputs[-1].kv_transfer_params


def num_used(engine):
    """Blocks in use; a text on its own has vLLM look at what has been read."""
    from benchmarks.testing.engine import Ask

    engine.ask([Ask((), "Is it read?", 4)])
    pool = engine.scheduler.kv_cache_manager.block_pool
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def main():
    from benchmarks.testing.engine import Ask, Engine

    checkpoint, *avl = sys.argv[1:]
    engine = Engine(
        Path(checkpoint),
        avl=json.loads(avl[0]) if avl else None,
        max_num_batched_tokens=4096,
        kv_transfer_config=transfer_config(),
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            answer = num_used(engine)
        else:
            images, xargs = asked.pop("images"), asked.pop("xargs")
            pairs = tuple(map(tuple, xargs))
            answer = prefill(engine, Ask(tuple(images), xargs=pairs, **asked))
        print(PREFIX + json.dumps(answer), flush=True)


if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_CI_ENV": "1",
        "OMP_NUM_THREADS": "1",
    }
    main()
