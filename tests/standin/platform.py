"""vLLM's CUDA platform, without NVML and with its tensors on the CPU."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

EXTENSION = "vllm._C_stable_libtorch"
ALLOCATOR = "vllm.cumem_allocator"
PASSES = "vllm.compilation.passes.pass_manager"


def install() -> None:
    """Make `vllm.platforms.current_platform` a CUDA platform, before its first use."""
    from vllm import platforms

    if platforms._current_platform is not None:
        raise RuntimeError("vLLM has chosen its platform: import standin.hopper first")
    # The CUDA extension, which the CPU wheel has not: `ops` brings its operators.
    sys.modules.setdefault(EXTENSION, ModuleType(EXTENSION))
    # The CUDA wheel has it, and it asks for a driver: missing, as in the CPU wheel.
    sys.modules.setdefault(ALLOCATOR, None)
    # Passes name operators of the CUDA extension, and nothing is compiled here.
    passes = sys.modules.setdefault(PASSES, ModuleType(PASSES))
    passes.PostGradPassManager = None
    platforms._current_platform = make_platform()
    # vLLM refuses Triton in a build whose version says "cpu".
    platforms.vllm_version_matches_substr = lambda substring: False
    use_placeholder_stream()
    open_flash_attention()


def make_platform() -> object:
    """Return the platform: it asks torch.cuda, which `cuda` answers for, not NVML."""
    from vllm.platforms import cuda

    class StandInPlatform(cuda.NonNvmlCudaPlatform):
        """A CUDA platform whose device is the CPU."""

        device_type = "cpu"
        dispatch_key = "CPU"
        dist_backend = "gloo"

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            """Return False: no CUDA, no pinned memory."""
            return False

        @classmethod
        def set_device(cls, device: torch.device) -> None:
            """Do nothing: there is one."""

        @classmethod
        def current_device(cls) -> torch.device:
            """Return where tensors go that are made for the device by its number."""
            return torch.device("cpu")

        @classmethod
        def device_count(cls) -> int:
            """Return 1."""
            return 1

        def __getattr__(self, name: str) -> object:
            """Look an unknown name up in torch.cuda, as CUDA's platform does."""
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(torch.cuda, name)

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: VllmConfig) -> Any:
            """Prefer torch: the CPU build's norm takes any rows to be contiguous."""
            from vllm.config.kernel import IrOpPriorityConfig

            return IrOpPriorityConfig.with_default(["native"])

        @classmethod
        def use_custom_allreduce(cls) -> bool:
            """Return False: one device."""
            return False

    # Code that asks the module for its class must get the one in use.
    cuda.CudaPlatform = StandInPlatform
    return StandInPlatform()


def use_placeholder_stream() -> None:
    """Answer vLLM's `current_stream`, which would set up a CUDA stream."""
    from vllm.utils import torch_utils

    torch_utils.current_stream = torch.cuda.current_stream


def open_flash_attention() -> None:
    """Let vLLM import its FlashAttention: the Python part, which finds no kernels.

    The package refuses to be imported without them; back ends that need them then
    refuse by themselves.
    """
    name = "vllm.vllm_flash_attn"
    package = ModuleType(name)
    package.__path__ = list(find_spec(name).submodule_search_locations)
    sys.modules[name] = package
    interface = import_module(f"{name}.flash_attn_interface")
    vars(package).update(
        {name: value for name, value in vars(interface).items() if name[0] != "_"}
    )
