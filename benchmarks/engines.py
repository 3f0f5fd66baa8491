"""Runs stock and adaptive engines in this process, one step at a time."""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from benchmarks.checkpoints import VISION_TOKENS_PER_IMAGE, Model
from benchmarks.runs import Run
from benchmarks.testing import models
from benchmarks.testing.models.tokens import BOS
from vllm_avl.config import AVLConfig, parse_config, settings_of_request

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Lets `Engine` say how many threads compute.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


STOCK, AVL = "stock", "avl"
STOCK_AND_AVL: Mapping[str, Mapping[str, Any]] = {
    STOCK: {"settings": None},
    AVL: {"settings": {}},
}
"""Options of two engines; requests say how they are adapted."""


@dataclass(frozen=True)
class Request:
    """A prompt with images, and how much to generate for it."""

    prompt: str
    images: list[Image.Image]
    output_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt: a token a byte, but for BOS and the images."""
        text = self.prompt.replace(BOS, " ").replace("<image>", "")
        return len(text) + len(self.images) * VISION_TOKENS_PER_IMAGE

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output."""
        return self.prompt_tokens + self.output_tokens


def requests(
    count: int, num_images: int, output_tokens: int, seed: int = 0
) -> list[Request]:
    """Make `count` requests whose images all differ, so that no prefix is shared."""
    prompt = models.image_prompt("llava", num_images, "What do the pictures show?")
    first = seed * 10_000
    return [
        Request(
            prompt,
            [
                models.random_image(first + index * num_images + image)
                for image in range(num_images)
            ],
            output_tokens,
        )
        for index in range(count)
    ]


def store(ratio: float | None) -> dict[str, float] | None:
    """Return a request's arguments for a store ratio, None for a stock engine."""
    return None if ratio is None else {"avl_store_ratio": ratio}


class Engine:
    """One in-process vLLM engine; `avl` engines take their settings by request."""

    def __init__(
        self,
        model: Model,
        *,
        settings: Mapping[str, Any] | None,
        pool_bytes: int,
        block_size: int | None,
        max_num_seqs: int,
        max_model_len: int,
        threads: int,
        max_num_batched_tokens: int = 4096,
        collects_stats: bool = False,
        host_bytes: int = 0,
    ) -> None:
        """Start it; `settings` are the plug-in's, None is stock.

        `host_bytes` are for blocks that are copied to the host, where vLLM's own
        offloading finds them when the pool has others in their place.
        """
        from benchmarks.testing import engine

        torch.set_num_threads(threads)
        self._inside = engine.Engine(
            model.path,
            avl=None if settings is None else dict(settings),
            dtype=model.dtype,
            kv_cache_memory_bytes=pool_bytes,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            disable_log_stats=not collects_stats,
            kv_transfer_config=_offloading(host_bytes) if host_bytes else None,
        )
        # A process has one connector for its worker: each engine's in turn.
        self._connector = _connect(None)
        self._engine = self._inside.llm.llm_engine
        self._count = 0

    @property
    def pool_tokens(self) -> int:
        """Tokens the pool holds; one block of it is the null block."""
        pool = self._inside.scheduler.kv_cache_manager.block_pool
        return (len(pool.blocks) - 1) * self.block_size

    @property
    def block_size(self) -> int:
        """Tokens a block holds."""
        coordinator = self._inside.scheduler.kv_cache_manager.coordinator
        return coordinator.single_type_managers[0].block_size

    @property
    def worker(self) -> Any:
        """The worker, which holds the model runner."""
        return self._inside.core.model_executor.driver_worker.worker

    @property
    def in_force(self) -> dict[str, object]:
        """What the running engine says of itself, whatever it was asked for."""
        config = self._engine.vllm_config
        ours = "avl" in config.additional_config
        (groups,) = self.worker.model_runner.attn_groups
        (group,) = groups
        return {
            "backend": group.backend.get_name(),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "block_size": self.block_size,
            "pool_tokens": self.pool_tokens,
            "prefix_caching": config.cache_config.enable_prefix_caching,
            **(parse_config(config.additional_config).model_dump() if ours else {}),
        }

    def settings(self, xargs: Mapping[str, Any] | None) -> AVLConfig:
        """Return what is in force for requests with `xargs`, of an adaptive engine."""
        own = parse_config(self._engine.vllm_config.additional_config)
        return settings_of_request(xargs, own) or own

    def describe(self) -> str:
        """Return `in_force` in a line."""
        return ", ".join(f"{name} {value}" for name, value in self.in_force.items())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`."""
        return self._inside.llm.get_tokenizer().decode(tokens)

    def run(
        self,
        workload: Sequence[Request],
        xargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Run:
        """Serve `workload`, all of it waiting from the start, with a cold prefix cache.

        Args:
            workload: the requests.
            xargs: of every request; None leaves a stock engine alone.
            options: of `steps`.
        """
        steps = self.steps(workload, xargs, **options)
        with self._connected():
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value

    def flush(self) -> None:
        """Let the pool forget all prompts, once the host has what it stores of them."""
        with self._connected():
            while self._inside.scheduler.has_requests():
                self._engine.step()
        self._engine.reset_prefix_cache()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        _connect(self._connector)
        yield
        _connect(None)

    def steps(
        self,
        workload: Sequence[Request],
        xargs: Mapping[str, Any] | None = None,
        *,
        follow: Callable[[int, list[int]], Request | None] = lambda index, tokens: None,
        keeps_cache: bool = False,
    ) -> Generator[None, None, Run]:
        """Serve as `run` does; yield behind each step, return the run.

        The clock covers the engine's steps: images are resized before, in the front
        end, which a server runs in another process.

        Args:
            workload: the requests.
            xargs: of every request; None leaves a stock engine alone.
            follow: given the place of a finished request in the workload and its
                tokens, returns what is asked next in that place, None for nothing.
            keeps_cache: whether prefixes of earlier runs may be hit.
        """
        if not keeps_cache:
            self._engine.reset_prefix_cache()
        run, places = Run(), dict[str, int]()

        def add(request: Request, place: int) -> None:
            before = time.perf_counter()
            places[self._add(request, xargs)] = place
            run.front_end_seconds += time.perf_counter() - before

        for place, request in enumerate(workload):
            add(request, place)
        undo = _record(self._inside.scheduler, run)
        while self._engine.has_unfinished_requests():
            before, cpu_before = time.perf_counter(), time.process_time()
            finished = self._engine.step()
            run.step_seconds.append(time.perf_counter() - before)
            run.step_cpu_seconds.append(time.process_time() - cpu_before)
            for output in finished:
                tokens = list(output.outputs[0].token_ids)
                run.outputs[output.request_id] = tokens
                run.prompt_tokens[output.request_id] = len(output.prompt_token_ids)
                run.cached_tokens[output.request_id] = output.num_cached_tokens
                place = places[output.request_id]
                if (request := follow(place, tokens)) is not None:
                    add(request, place)
            yield
        undo()
        run.outputs = {request_id: run.outputs[request_id] for request_id in places}
        return run

    def close(self) -> None:
        """Shut the engine down and give its memory back."""
        self._inside.shutdown()
        if self._connector is not None:
            self._connector.shutdown()
        del self._inside, self._engine
        gc.collect()

    def _add(self, request: Request, xargs: Mapping[str, Any] | None) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=request.output_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=dict(xargs) if xargs else None,
        )
        prompt = {
            "prompt": request.prompt,
            "multi_modal_data": {"image": request.images},
        }
        self._count += 1
        request_id = str(self._count)
        self._engine.add_request(request_id, prompt, params)
        return request_id


def _connect(connector: Any) -> Any:
    """Let this process's worker have another KV connector; return the one it had."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    had = kv_transfer_state._KV_CONNECTOR_AGENT
    kv_transfer_state._KV_CONNECTOR_AGENT = connector
    return had


def _offloading(host_bytes: int) -> Any:
    """Return what vLLM makes of `--kv-offloading-size`.

    Without a GPU what vLLM asks of one is done here, at once.
    """
    from vllm.config import KVTransferConfig
    from vllm.platforms import current_platform

    from vllm_avl.support import OFFLOADING

    if current_platform.is_cpu():
        # Its import takes CUDA's events away.
        from benchmarks.testing import late_copies

        late_copies.install()
    return KVTransferConfig(
        kv_connector=OFFLOADING,
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": host_bytes},
    )


@contextmanager
def started(
    model: Model, variants: Mapping[str, Mapping[str, Any]], **options: Any
) -> Iterator[dict[str, Engine]]:
    """Start an engine for each variant, with `options` and its own; close them all."""
    engines = {name: Engine(model, **options, **own) for name, own in variants.items()}
    yield engines
    for engine in engines.values():
        engine.close()


def shortened(workload: Sequence[Request], output_tokens: int) -> list[Request]:
    """Return the requests with shorter answers."""
    return [replace(request, output_tokens=output_tokens) for request in workload]


def check_identity(
    stock: Engine, avl: Engine, sample: Sequence[Request], xargs: Any = None
) -> None:
    """Refuse to time anything unless ratios of 1 (S alone by default) are stock's."""
    expected = list(stock.run(sample).outputs.values())
    if list(avl.run(sample, xargs or store(1.0)).outputs.values()) != expected:
        raise SystemExit("ratios of 1 give other tokens than stock: nothing was timed")


def run_together(
    engines: Mapping[str, Engine], workload: Sequence[Request]
) -> dict[str, Run]:
    """Serve `workload` on every engine, a step of each in turn.

    Whatever slows the machine down for longer than a step meets all of them alike.
    """
    serving = {name: engine.steps(workload) for name, engine in engines.items()}
    order = deque(serving)
    runs: dict[str, Run] = {}
    while order:
        for name in list(order):
            try:
                next(serving[name])
            except StopIteration as end:
                runs[name] = end.value
                order.remove(name)
        order.rotate(-1)
    return runs


def _record(scheduler: Any, run: Run) -> Callable[[], None]:
    """Note what every `schedule()` of `scheduler` decides; call the result to stop."""
    from vllm_avl.messages import received_compactions

    schedule = scheduler.schedule

    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        # The scheduler's own list also holds requests that wait, with a few tokens
        # of text computed, for the encoder or for blocks.
        run.running.append(
            sum(
                request.num_computed_tokens >= request.num_prompt_tokens
                for request in scheduler.running
            )
        )
        run.pool_use.append(scheduler.kv_cache_manager.usage)
        run.preemptions += len(output.preempted_req_ids or ())
        run.adapted |= set(received_compactions(output))
        # Some request computes more than the one token of a decode step.
        scheduled = output.num_scheduled_tokens
        run.prompt_step.append(any(count > 1 for count in scheduled.values()))
        return output

    scheduler.schedule = recorded

    def undo() -> None:
        del scheduler.schedule

    return undo
