"""The stand-in is vLLM: the CUDA code path gives the tokens of the CPU build."""

import pytest
import torch

from standin import graphs
from standin.process import GRAPHS, generate

SPEC = {
    "requests": [
        {"images": [1], "text": "What is it?", "max_tokens": 6},
        {"images": [2], "text": "And this?", "max_tokens": 4},
        {"text": "No picture at all.", "max_tokens": 5},
    ]
}
V2 = "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
V1 = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"
FLASH = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
TRITON = "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"


@pytest.fixture(scope="module")
def expected(model):
    report = generate(model, SPEC, "--cpu", "--backend", "CPU_ATTN")
    assert report["ran"]["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert [len(tokens) for tokens in report["tokens"]] == [6, 4, 5]
    return report["tokens"]


@pytest.mark.parametrize(("runner", "runner_class"), [("v1", V1), ("v2", V2)])
def test_cuda_path_gives_the_tokens_of_the_cpu_build(
    model, expected, runner, runner_class
):
    report = generate(model, SPEC, "--runner", runner)
    assert report["ran"] == {
        "worker": "vllm.v1.worker.gpu_worker.Worker",
        "runner": runner_class,
        "backend": TRITON,
        "layout": "LBNHC",
    }
    assert report["tokens"] == expected
    assert report["plugin_loaded"]


def test_flash_attention_gives_the_tokens_of_the_cpu_build(model, expected):
    options = ("--runner", "v2", "--backend", "FLASH_ATTN")
    report = generate(model, SPEC | {"llm": GRAPHS}, *options, STANDIN_FLASH="1")
    assert report["ran"]["backend"] == FLASH
    assert report["tokens"] == expected
    assert report["graphs"]["replayed"] >= 5


def test_graphs_give_the_tokens_of_the_cpu_build(model, expected):
    report = generate(
        model,
        SPEC | {"llm": GRAPHS},
        *("--runner", "v2"),
        VLLM_USE_BREAKABLE_CUDAGRAPH="1",
    )
    assert report["tokens"] == expected
    assert report["graphs"]["captured"] > 3
    assert report["graphs"]["replayed"] >= 5


def capture(function):
    """Capture one call of `function`; return the graph."""
    graph = graphs.CUDAGraph()
    with torch.inference_mode(), graphs.graph(graph):
        function()
    return graph


def test_a_replay_reads_static_buffers():
    x, out = torch.ones(3), torch.zeros(3)
    graph = capture(lambda: out.copy_((x + 1).view(3, 1).sum(-1) * 2))
    x.fill_(4)
    graph.replay()
    assert out.tolist() == [10.0] * 3


def test_a_replay_knows_no_new_python_value_and_no_new_tensor():
    given = {"x": torch.ones(2), "factor": 3}
    out = torch.zeros(2)
    graph = capture(lambda: out.copy_(given["x"] * given["factor"]))
    given.update(x=torch.full((2,), 7.0), factor=5)
    graph.replay()
    assert out.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("read", [lambda x: x[0].item(), lambda x: bool(x.sum() > 0)])
def test_values_cannot_be_read_while_capturing(read):
    x = torch.ones(2)
    with pytest.raises(graphs.CaptureError, match="while capturing"):
        capture(lambda: read(x))
    assert not graphs.capturing
