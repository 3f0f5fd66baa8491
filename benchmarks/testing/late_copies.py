"""vLLM's offloading to the host without CUDA: copies are made late, and in order.

The connectors, their scheduler's parts and their workers', are vLLM's. Streams and
events are those of a device that is never done before somebody has asked often enough.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.cpu import gpu_worker
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.simple_kv_offload import worker

# Replaces torch.Event when it is imported: before `install` does.
from vllm.v1.worker.cpu import shm as _shm  # noqa: F401


class Device:
    """How late copies are, and how many were made."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Be as new."""
        self.random = random.Random(0)
        self.most_polls = 0
        """Times that a copy's end is asked for in vain, at most."""
        self.waits = False
        """Whether no copy ends by itself."""
        self.num_copies = {True: 0, False: 0}
        """Made so far, by whether they were stores."""
        self.launched: list[Callable[[], None]] = []
        """Copies that the next event stands behind."""

    def copy(self, make: Callable[[], None], is_store: bool, count: int) -> None:
        """Have `count` copies made, late."""

        def counted() -> None:
            self.num_copies[is_store] += count
            make()

        self.launched.append(counted)


DEVICE = Device()


class Event:
    """Happens when it has been asked for often enough; copies are made then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._make: list[Callable[[], None]] = []
        self._num_polls = 0

    def record(self, stream: Any = None) -> None:
        """Stand behind all that was launched."""
        self._make, DEVICE.launched = DEVICE.launched, []
        self._num_polls = DEVICE.random.randrange(DEVICE.most_polls + 1)

    def query(self) -> bool:
        """Return whether it has happened."""
        if DEVICE.waits:
            return not self._make
        self._num_polls -= 1
        is_over = self._num_polls < 0
        if is_over:
            self.synchronize()
        return is_over

    def synchronize(self) -> None:
        """Let it happen."""
        for make in self._make:
            make()
        self._make, self._num_polls = [], -1

    def elapsed_time(self, other: Event) -> float:
        """Return that it took no time."""
        return 0.0


class Stream:
    """A stream on which nothing waits: events do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the only priority, twice."""
        return 0, 0

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    wait_stream = wait_event


class SimpleCopies:
    """Stands for `DmaCopyBackend`."""

    def init(
        self, gpu_caches: Any, cpu_caches: Any, device: Any, *streams: Any
    ) -> None:
        """Note where to copy from and to."""
        self._caches = list(zip(gpu_caches.values(), cpu_caches.values(), strict=True))

    def launch_copy(
        self,
        src_blocks: list[int],
        dst_blocks: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        """Copy blocks of every layer, late."""

        def make() -> None:
            for gpu, cpu in self._caches:
                source, target = (gpu, cpu) if is_store else (cpu, gpu)
                target[dst_blocks] = source[src_blocks]

        DEVICE.copy(make, is_store, len(src_blocks))
        event = Event()
        event.record()
        events_list.append((event_idx, event))

    def shutdown(self) -> None:
        """Do nothing."""


def swap_blocks_batch(
    src: torch.Tensor,
    dst: torch.Tensor,
    sizes: torch.Tensor,
    is_src_access_order_any: bool,
) -> None:
    """Copy bytes between addresses, late; vLLM's own of this name wants CUDA."""
    copies = list(zip(dst.tolist(), src.tolist(), sizes.tolist(), strict=True))

    def make() -> None:
        for target, source, size in copies:
            ctypes.memmove(target, source, size)

    # Loads alone may be read in any order.
    DEVICE.copy(make, not is_src_access_order_any, len(copies))


class _OnDevice(torch.Tensor):
    """A tensor that says it is CUDA's."""

    is_cuda = True


def make_worker(spec: CPUOffloadingSpec, kv_caches: CanonicalKVCaches) -> Any:
    """Make the worker that vLLM makes for CUDA and XPU alone."""
    for each in kv_caches.tensors:
        each.tensor = each.tensor.as_subclass(_OnDevice)
    return spec.create_worker(kv_caches)


def install(replace: Callable[[Any, str, Any], None] = setattr) -> Device:
    """Let workers that start from now on copy so.

    Args:
        replace: sets an attribute; pytest's `monkeypatch.setattr` takes it back.

    Returns:
        what they copy on, as new.
    """
    DEVICE.reset()
    replace(torch, "Event", Event)
    replace(torch.cuda, "Stream", Stream)
    replace(torch.cuda, "current_stream", Stream)
    replace(worker, "DmaCopyBackend", SimpleCopies)
    platform = type(current_platform)
    replace(platform, "Stream", Stream)
    replace(platform, "current_stream", staticmethod(Stream))
    replace(platform, "stream", staticmethod(lambda stream: nullcontext()))
    replace(gpu_worker.ops, "swap_blocks_batch", swap_blocks_batch)
    replace(CPUOffloadingSpec, "get_worker", make_worker)
    return DEVICE
