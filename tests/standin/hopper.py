"""One Hopper GPU that is not there: vLLM's CUDA code path on CPU tensors.

A process that imports this first, before vLLM and Triton, has vLLM find one "NVIDIA
H200 (stand-in)". It then builds its CUDA configuration, chooses CUDA attention back
ends and runs the GPU worker with either model runner. Tensors live on the CPU, Triton
kernels are interpreted, compiled operators are those of vLLM's CPU build. It shows
that Python code and Triton kernels compute the right thing, nothing about speed, races
or memory.

Environment:
    STANDIN_FLASH=1: there is FlashAttention too, in plain torch: see `flash`.
    STANDIN_ATTENTION=torch: vLLM's Triton attention in plain torch, see `attention`.
    STANDIN_COMPILE=1: interpret no kernel; compile each one launched for sm_90, with
        the arguments of the launch, and do not run it. Tokens are noise then; see
        `kernels.report`.
"""

import os

COMPILE_ONLY = os.environ.get("STANDIN_COMPILE", "") not in ("", "0")
TORCH_ATTENTION = os.environ.get("STANDIN_ATTENTION", "") == "torch"
FLASH = os.environ.get("STANDIN_FLASH", "") not in ("", "0")

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: patches stay in it
    "HF_HUB_OFFLINE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer is not installed
    "VLLM_DO_NOT_TRACK": "1",
}


def set_environment() -> None:
    """Set what vLLM and Triton read when they are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if COMPILE_ONLY:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"


def install() -> None:
    """Put the stand-in into this process; the order is that of the imports."""
    set_environment()
    from standin import (
        attention,
        cuda,
        flash,
        gdn,
        graphs,
        kernels,
        ops,
        platform,
        worker,
    )

    kernels.install(COMPILE_ONLY)
    cuda.install()
    platform.install()
    graphs.install()
    ops.install()
    if FLASH:
        # Layers import the back end.
        flash.install()
    ops.use_torch_in_layers()
    if TORCH_ATTENTION:
        attention.install()
    gdn.install()
    worker.install(COMPILE_ONLY)


install()
