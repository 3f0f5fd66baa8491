"""What the compiler makes of every shipped tile, without a GPU.

Chosen so that each tile, architecture, cache dtype and head size is compiled once.
"""

import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_avl.kernels.cuda import selected_attention
from vllm_avl.kernels.cuda.selected_attention import attention_constants

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8e4nv": torch.float8_e4m3fn,
}
ALIGNED = [["tt.divisibility", 16]]
LAUNCH_OPTIONS = ("num_warps", "num_stages")
# Blackwell and Hopper hold more, and so does Ampere's A100; the smaller Amperes do not.
SHARED_MEMORY = 99 << 10
# Group 4, one query row; 16 query rows fill the larger block of queries.
SHIPPED = [
    pytest.param(80, "fp16", "fp16", 64, 1, id="sm80-fp16-64"),
    pytest.param(90, "fp16", "fp16", 80, 1, id="sm90-fp16-80"),
    pytest.param(80, "bf16", "bf16", 96, 1, id="sm80-bf16-96"),
    pytest.param(80, "bf16", "bf16", 128, 16, id="sm80-bf16-128-16-rows"),
    pytest.param(90, "bf16", "bf16", 128, 1, id="sm90-bf16-128"),
    pytest.param(100, "fp16", "fp16", 128, 1, id="sm100-fp16-128"),
    pytest.param(90, "fp16", "fp16", 256, 16, id="sm90-fp16-256-16-rows"),
    pytest.param(100, "bf16", "bf16", 256, 1, id="sm100-bf16-256"),
    pytest.param(90, "bf16", "fp8e4nv", 64, 1, id="sm90-fp8-64"),
    pytest.param(90, "bf16", "fp8e4nv", 128, 1, id="sm90-fp8-128"),
    pytest.param(100, "bf16", "fp8e4nv", 128, 16, id="sm100-fp8-128-16-rows"),
    pytest.param(90, "bf16", "fp8e4nv", 256, 1, id="sm90-fp8-256"),
    pytest.param(80, "fp32", "fp32", 64, 1, id="sm80-fp32-64"),
    pytest.param(90, "fp32", "fp32", 128, 1, id="sm90-fp32-128"),
    pytest.param(90, "fp32", "fp32", 256, 1, id="sm90-fp32-256"),
]


@pytest.fixture(scope="module")
def compiler():
    """A process of its own: Triton's interpreter leaves its marks on the compiler."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize(("arch", "query", "cache", "head_size", "rows"), SHIPPED)
def test_shipped_tile_fits_and_reads_wide(
    arch, query, cache, head_size, rows, compiler, tmp_path
):
    order = (arch, query, cache, head_size, rows, tmp_path / "cubin")
    shared = compiler.submit(compile_attention, *order).result()
    assert shared <= SHARED_MEMORY
    usage = dump("-res-usage", tmp_path / "cubin")
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage
    copies = re.findall(r"LDGSTS[.\w]*", dump("-sass", tmp_path / "cubin"))
    narrow = [copy for copy in copies if not copy.endswith(".128")]
    assert len(copies) > len(narrow)
    # Values in fp8 reach the dot through a layout that takes 8 bytes at a time.
    assert set(narrow) <= ({"LDGSTS.E.64"} if cache == "fp8e4nv" else set())


def test_every_tile_is_compiled_above():
    compiled = {
        (DTYPES[cache].itemsize, triton.next_power_of_2(head_size))
        for _, _, cache, head_size, _ in (shipped.values for shipped in SHIPPED)
    }
    assert compiled == set(selected_attention.TILES)


def compile_attention(arch, query, cache, head_size, rows, cubin):
    """Compile the kernel with a refresh to a file; bytes of shared memory it takes."""
    kernel = selected_attention._attention_kernel
    constants = attention_constants(head_size, DTYPES[cache], 4, rows)
    constants |= {"num_splits": 8, "soft_cap": 0.0, "block_size": 16}
    if cache != "fp8e4nv":
        constants |= {"k_scale_ptr": None, "v_scale_ptr": None}
    options = {name: constants.pop(name) for name in LAUNCH_OPTIONS}
    types = {
        "query_ptr": f"*{query}",
        "key_cache_ptr": f"*{cache}",
        "value_cache_ptr": f"*{cache}",
        "reads": ("*i32", "*i32", "i32", "i32", "*i32", "*i32"),
        "scale": "fp32",
        "output_strides": ("i32",) * 2,
        "query_strides": ("i32",) * 2,
        "key_strides": ("i32",) * 3,
        "value_strides": ("i32",) * 3,
        "logits_stride": "i32",
    }
    for name in ("output_ptr", "lse_ptr", "logits_ptr", "k_scale_ptr", "v_scale_ptr"):
        types[name] = "*fp32"
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = signature[name] = types.get(name, "*i32")
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(kind, tuple):
            attributes |= {(position, part): ALIGNED for part in range(len(kind))}
        elif kind != "fp32":
            attributes[position,] = ALIGNED
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    cubin.write_bytes(compiled.asm["cubin"])
    return compiled.metadata.shared


def dump(what, cubin):
    command = [str(CUOBJDUMP), what, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
