"""vLLM's offloading to the host without CUDA: copies are made late, and in order.

The connector, its scheduler's part and its worker's, is vLLM's. Streams and events are
those of a device that is never done before somebody has asked often enough.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import ClassVar

import torch
from standin.cuda import Event, Stream


class LowStream(Stream):
    """A stream of the priority that is asked for."""

    @staticmethod
    def priority_range():
        return 0, 0


class Copy:
    """A copy that is made when its event has been asked for often enough."""

    def __init__(self, make: Callable[[], None], num_polls: int) -> None:
        self._make, self._num_polls = make, num_polls

    def query(self) -> bool:
        self._num_polls -= 1
        if self._num_polls < 0:
            self.synchronize()
        return self._num_polls < 0

    def synchronize(self) -> None:
        if self._make is not None:
            self._make()
        self._make, self._num_polls = None, -1


class LateCopies:
    """Stands for `DmaCopyBackend`."""

    random = random.Random(0)
    most_polls = 4
    num_blocks: ClassVar = {True: 0, False: 0}
    """Copied so far, by whether they were stored."""

    def init(self, gpu_caches, cpu_caches, device, load_stream, store_stream):
        self._caches = list(zip(gpu_caches.values(), cpu_caches.values(), strict=True))

    def launch_copy(
        self, src_blocks, dst_blocks, is_store, event_idx, events_list, wait_event=None
    ):
        def make():
            self.num_blocks[is_store] += len(src_blocks)
            for gpu, cpu in self._caches:
                source, target = (gpu, cpu) if is_store else (cpu, gpu)
                target[dst_blocks] = source[src_blocks]

        num_polls = self.random.randrange(self.most_polls + 1)
        events_list.append((event_idx, Copy(make, num_polls)))

    def shutdown(self):
        pass


def install(monkeypatch) -> None:
    """Let workers that start from now on copy so."""
    from vllm.v1.simple_kv_offload import worker

    monkeypatch.setattr(worker, "DmaCopyBackend", LateCopies)
    monkeypatch.setattr(torch.cuda, "Stream", LowStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: LowStream())
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(LateCopies, "num_blocks", {True: 0, False: 0})
