"""What is always true, on a real GPU: vLLM's own engine, compiled kernels, graphs.

Most of it in fp32, where tokens of two kernels can be compared.
"""

import pytest
import torch
from standin import checkpoint
from standin.asks import ALL, ORDERS, SPEC, check_orders, spec
from standin.process import GRAPHS, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(1200),
]
WHERE = ("--gpu",)
RUNNERS = ["v1", "v2"]
SERVERS = ["none", "one", "many"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint.build(tmp_path_factory.mktemp("gpu") / "llava")


def answer(model, asked, runner, backend="AVL"):
    options = ("--runner", runner, "--backend", backend)
    return generate(model, asked, *WHERE, *options)


@pytest.mark.parametrize("graphs", [{}, GRAPHS], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("TRITON_ATTN", "float32"), ("FLASH_ATTN", "bfloat16")]
)
def test_all_ratios_one_give_stocks_tokens(model, backend, dtype, graphs):
    plain = [{**request, "xargs": {}} for request in SPEC["requests"]]
    llm = SPEC["llm"] | graphs | {"dtype": dtype, "additional_config": {}}
    stock = answer(model, {"requests": plain, "llm": llm}, "v2", backend)
    llm["additional_config"] = {"avl": ALL}
    ours = answer(model, {"requests": plain, "llm": llm}, "v2")
    assert ours["ran"]["worker"] == "vllm_avl.worker.worker.AVLWorker"
    assert ours["tokens"] == stock["tokens"]


@pytest.fixture(scope="module")
def expected(model):
    """Without graphs, on a server whose settings have no core."""
    return answer(model, spec("none"), "v2")["tokens"]


@pytest.mark.parametrize("lists", SERVERS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_in_company_alone_and_over_any_prefix(model, expected, runner, lists):
    asked = spec(lists) | {"orders": ORDERS}
    options = ("--runner", runner, "--backend", "AVL", "--alone")
    report = generate(model, asked, *WHERE, *options)
    assert report["tokens"] == report["alone"] == expected
    check_orders(report, expected)


@pytest.mark.parametrize("lists", SERVERS)
@pytest.mark.parametrize("runner", RUNNERS)
def test_graphs_change_no_token(model, expected, runner, lists):
    settings = GRAPHS | {"max_num_batched_tokens": 2048}
    assert answer(model, spec(lists, **settings), runner)["tokens"] == expected


@pytest.mark.parametrize("lists", SERVERS)
def test_compiled_layers_change_no_token(model, expected, lists):
    """torch.compile and piecewise graphs, as a server has them by default."""
    asked = spec(lists, enforce_eager=False)
    assert answer(model, asked, "v2")["tokens"] == expected
