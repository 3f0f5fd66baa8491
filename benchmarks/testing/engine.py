"""A vLLM engine in this process, with its insides open to tests and benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.testing import models

POISON = 1e4
POISON_BYTE = 0x7E
"""A large number in any float: 448, the largest, in e4m3."""


@dataclass(frozen=True)
class Ask:
    """One request: pictures by seed, a question, and how to answer."""

    images: tuple[int, ...] = (0,)
    text: str = "What is it?"
    max_tokens: int = 16
    xargs: tuple[tuple[str, Any], ...] = ()
    prefix: str = ""

    def params(self, **changes: Any) -> SamplingParams:
        """Sampling parameters: greedy, and exactly `max_tokens` long."""
        settings = {"max_tokens": self.max_tokens, "temperature": 0.0} | changes
        xargs = dict(self.xargs)
        return SamplingParams(ignore_eos=True, extra_args=xargs or None, **settings)


class Engine:
    """`LLM` in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""

    def __init__(self, model: Path, name: str = "llava", **options: Any) -> None:
        """Start the engine.

        Args:
            model: checkpoint folder.
            name: its architecture in `models.MODELS`.
            options: of `LLM`; `avl` is short for the back end with these settings,
                None for vLLM's own.
        """
        avl = options.pop("avl", {})
        if avl is not None:
            options["attention_backend"] = "avl"
            options["additional_config"] = {"avl": avl}
        defaults = {
            "max_model_len": 4096,
            "max_num_seqs": 8,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
            "dtype": "float32",
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 8},
            "disable_log_stats": True,
        }
        self.name = name
        self.llm = LLM(str(model), **(defaults | options))
        self.core: Any = self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Scheduler:
        """The engine's scheduler."""
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        """The model runner of the driver's worker."""
        return self.core.model_executor.driver_worker.worker.model_runner

    def prompt(self, ask: Ask) -> dict[str, Any]:
        """Return the engine's input for `ask`."""
        pictures = [picture(seed) for seed in ask.images]
        text = models.image_prompt(self.name, len(pictures), ask.text)
        prompt: dict[str, Any] = {"prompt": ask.prefix + text}
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        return prompt

    def ask(self, asks: Sequence[Ask], **changes: Any) -> list[list[int]]:
        """Answer all of `asks` in one batch; return their tokens."""
        outputs = self.llm.generate(
            [self.prompt(ask) for ask in asks],
            [ask.params(**changes) for ask in asks],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def alone(self, ask: Ask, **changes: Any) -> list[int]:
        """Answer `ask` as a fresh server would: nobody beside it, nothing cached."""
        self.llm.reset_prefix_cache()
        return self.ask([ask], **changes)[0]

    def add(self, request_id: str, ask: Ask, **changes: Any) -> None:
        """Queue one request for `step`."""
        params = ask.params(**changes)
        self.llm.llm_engine.add_request(request_id, self.prompt(ask), params)

    def step(self) -> dict[str, list[int]]:
        """Run one scheduler step; return the tokens of what has finished."""
        return {
            output.request_id: list(output.outputs[0].token_ids)
            for output in self.llm.llm_engine.step()
            if output.finished
        }

    def abort(self, request_id: str) -> None:
        """Abort a queued or running request."""
        self.llm.llm_engine.abort_request([request_id])

    def reports(self) -> list[list[dict[str, Any]]]:
        """Return what each worker reports of each request that it remembers."""
        (names, *_) = self.llm.collective_rpc("avl_requests")
        by_name = (self.llm.collective_rpc("avl_report", args=(n,)) for n in names)
        # A report of another process comes as a dictionary.
        return [
            [one if isinstance(one, dict) else asdict(one) for one in reports]
            for reports in by_name
        ]

    def shutdown(self) -> None:
        """Stop the engine."""
        self.llm.llm_engine.engine_core.shutdown()

    def check_integrity(self, beside: Iterable[int] = ()) -> None:
        """Assert that every block is free or held, and referenced as often as held."""
        check_integrity(self.scheduler, beside)

    def poison_free_blocks(self, but: Container[int] = ()) -> None:
        """Spoil the content of every block that nobody may read.

        Free blocks that carry a prefix-cache hash keep theirs: a later request may
        still be served from them.

        Args:
            but: ids of free blocks that something else may read.
        """
        pool = self.scheduler.kv_cache_manager.block_pool
        spoiled = [
            block.block_id
            for block in pool.blocks
            if (block.ref_cnt == 0 and block.block_hash is None) or block.is_null
            if block.block_id not in but
        ]
        index = torch.tensor(spoiled)
        for cache in self.runner.kv_caches:
            # Recurrent states are several tensors a layer, some of raw bytes.
            for part in cache if isinstance(cache, list | tuple) else (cache,):
                part[index] = POISON if part.is_floating_point() else POISON_BYTE


def check_integrity(scheduler: Scheduler, beside: Iterable[int] = ()) -> None:
    """Assert that free and held blocks are all blocks, and reference counts are right.

    The null block stands in req_to_blocks for what was given back and counts as
    neither. Blocks that an adaptive request writes are its own, and in no prefix cache.

    Args:
        scheduler: the engine's.
        beside: ids of blocks that others than requests hold, as often as they do.
    """
    pool = scheduler.kv_cache_manager.block_pool
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = Counter(
        block.block_id
        for manager in managers
        for blocks in _lists_of(manager)
        for block in blocks
        if not block.is_null
    )
    held.update(beside)
    free = pool.get_num_free_blocks()
    assert free + len(held) + 1 == len(pool.blocks), f"{free} free, {len(held)} held"
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == held[block.block_id], block
    known = set(scheduler.requests)
    for manager in managers:
        assert {name for name, held in manager.req_to_blocks.items() if held} <= known
        for request_id, one in getattr(manager, "adapted", {}).items():
            assert request_id in known
            _check_adapted(request_id, one, managers, manager)


def _lists_of(manager: Any) -> Iterator[Sequence[Any]]:
    """Yield the lists of blocks that a group's manager holds."""
    yield from manager.req_to_blocks.values()
    for one in getattr(manager, "adapted", {}).values():
        yield one.private


def _check_adapted(
    request_id: str, one: Any, managers: Sequence[Any], ours: Any
) -> None:
    """Assert that an adaptive request shares nothing that has seen less than all."""
    for manager in managers:
        blocks = manager.req_to_blocks.get(request_id, [])
        written = blocks[one.plan.num_prompt_tokens // manager.block_size :]
        if manager is ours:
            written = [*one.private, *written]
            if one.plan.moves_rows:
                written += one.targets or ()
                written += blocks if one.retired else ()
        for block in written:
            shared = block.ref_cnt != 1 or block.block_hash is not None
            assert block.is_null or not shared, f"{request_id} shares {block}"


def picture(seed: int) -> Image.Image:
    """Return the picture of `seed`; its size varies with the seed."""
    return models.random_image(seed, width=336 + 56 * (seed % 3), height=336)
