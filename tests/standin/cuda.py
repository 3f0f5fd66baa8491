"""The part of `torch.cuda` and `torch.accelerator` that vLLM calls, without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

GIB = 1 << 30
NAME = "NVIDIA H200 (stand-in)"
CAPABILITY = (9, 0)
MEMORY = (130 * GIB, 140 * GIB)
"""Free and total bytes."""

PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY[1],
    multi_processor_count=132,
    is_integrated=False,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    L2_cache_size=60 << 20,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    regs_per_multiprocessor=65536,
    gcnArchName="",
    uuid="stand-in",
)


class Event:
    """An event that has happened: everything runs in order here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        """Do nothing."""

    wait = synchronize = record

    def query(self) -> bool:
        """Return that it has happened."""
        return True

    def elapsed_time(self, other: Event) -> float:
        """Return that it took no time."""
        return 0.0


class Stream:
    """A stream without work; also the context manager `torch.cuda.stream`."""

    device = torch.device("cpu")
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        """Do nothing."""

    wait_event = synchronize = wait_stream

    def record_event(self, *args: Any) -> Event:
        """Return an event that has happened."""
        return Event()

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def returns(value: Any) -> Callable[..., Any]:
    """Make a function that ignores its arguments.

    A new one each time: torch's Dynamo keeps one rule for each function.
    """
    return lambda *args, **kwargs: value


NOTHING_TO_DO = {
    torch.cuda: (
        *("synchronize", "empty_cache", "set_device", "manual_seed_all"),
        *("reset_peak_memory_stats", "set_rng_state"),
    ),
    torch.accelerator: (
        *("set_device_index", "synchronize", "empty_cache", "empty_host_cache"),
        "reset_peak_memory_stats",
    ),
    torch.Tensor: ("record_stream",),
}

ANSWERS = {
    torch.cuda: {
        "current_device": 0,
        "device_count": 1,
        "mem_get_info": MEMORY,
        "get_device_properties": PROPERTIES,
        "get_device_capability": CAPABILITY,
        "get_device_name": NAME,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
        "memory_reserved": 0,
    },
    torch.accelerator: {
        "device_count": 1,
        "get_memory_info": MEMORY,
        "memory_stats": {},
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
    },
}


def install() -> None:
    """Replace the functions that would need a device."""
    # Dynamo lists torch's functions once: let it, before some are replaced.
    import torch._dynamo

    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    for owner, names in NOTHING_TO_DO.items():
        for name in names:
            setattr(owner, name, returns(None))
    for owner, answers in ANSWERS.items():
        for name, value in answers.items():
            setattr(owner, name, returns(value))
    install_streams()
    # Pinned memory is CUDA's.
    torch.Tensor.pin_memory = lambda self, *args: self
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    # Its settings are those of CUDA's allocator: any other name leaves them alone.
    torch.cuda.memory.get_allocator_backend = returns("none")


def install_streams() -> None:
    """Put streams and events that know no asynchrony in place of torch's."""
    torch.Event = torch.cuda.Event = Event
    torch.cuda.Stream = torch.cuda.ExternalStream = Stream
    torch.cuda.set_stream = returns(None)
    for owner in (torch.cuda, torch.accelerator):
        owner.current_stream = returns(Stream())
    torch.cuda.default_stream = returns(Stream())
    torch.cuda.stream = returns(Stream())
