"""Answer requests in this process: on the stand-in, on a GPU, or on vLLM's CPU build.

    python -m standin.generate MODEL SPEC.json --backend TRITON_ATTN --runner v2

run in the folder tests, or with it on PYTHONPATH. SPEC.json (- for standard input) is

    {"requests": [{"images": [1], "text": "What?", "max_tokens": 4, "xargs": {},
                   "says": [33, 58], "family": "llava"}],
     "llm": {"max_num_seqs": 2}, "orders": [[[0, 1], [0]]], "scales": [1, 1, 1]}

with every field optional: "scales" are the query's, the keys' and the values' of an fp8
cache; pictures are given by their seeds, an answer consists of the tokens of "says",
"xargs" are the request's vllm_xargs and "llm" are arguments of `LLM`. Each of "orders"
has batches of requests answered after each other, from an empty prefix cache. The last
line of the output is JSON: token ids of each request, log-probabilities with
--logprobs, with --kept what each layer of each request has evicted and selected, and
what the stand-in counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

LLM_DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 2 << 20,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 2},
    "skip_mm_profiling": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
}

PACKAGES = ("vllm", "torch", "triton", "transformers", "numpy")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m standin.generate")
    parser.add_argument("model")
    parser.add_argument("spec", help="file of JSON, - for standard input")
    parser.add_argument("--backend", default="TRITON_ATTN")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v2")
    parser.add_argument("--cpu", action="store_true", help="vLLM's CPU build as it is")
    parser.add_argument("--gpu", action="store_true", help="a GPU, no stand-in")
    parser.add_argument("--logprobs", action="store_true")
    parser.add_argument("--kept", action="store_true", help="needs introspection")
    parser.add_argument(
        "--alone", action="store_true", help="answer each request again, on its own"
    )
    return parser.parse_args(argv)


def set_up(args: argparse.Namespace) -> None:
    """Prepare the process, before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.cpu:
        os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
        return
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(args.runner == "v2"))
    # Else vLLM's sampler wants FlashInfer, which not every environment has.
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    if not args.gpu:
        from standin import hopper  # noqa: F401


def start(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    """Return the `LLM`."""
    from vllm import LLM

    settings = LLM_DEFAULTS | {"attention_backend": args.backend} | options
    if not args.cpu:
        # The picture's attention would take FlashAttention.
        settings.setdefault("mm_encoder_attn_backend", "TORCH_SDPA")
    if args.gpu:
        # Several may share it: vLLM wants that much free, and takes the cache's bytes.
        settings.setdefault("gpu_memory_utilization", 0.3)
    return LLM(args.model, **settings)


def answer(llm: Any, requests: list[dict[str, Any]], logprobs: bool) -> list[Any]:
    """Return the only answer to each request of a batch."""
    return [output.outputs[0] for output in generate(llm, requests, logprobs)]


def generate(llm: Any, requests: list[dict[str, Any]], logprobs: bool) -> list[Any]:
    """Return vLLM's outputs for all requests in one batch."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=request.get("max_tokens", 4),
            temperature=0.0,
            ignore_eos=True,
            logprobs=0 if logprobs else None,
            allowed_token_ids=request.get("says"),
            extra_args=request.get("xargs"),
        )
        for request in requests
    ]
    return llm.generate(list(map(prompt, requests)), params, use_tqdm=False)


def answer_in_order(
    llm: Any, requests: list[dict[str, Any]], order: list[list[int]]
) -> dict[str, Any]:
    """Answer batches of requests after each other, from an empty prefix cache."""
    assert llm.reset_prefix_cache()
    outputs = [
        output
        for batch in order
        for output in generate(llm, [requests[index] for index in batch], False)
    ]
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "hits": [output.num_cached_tokens for output in outputs],
    }


def prompt(request: dict[str, Any]) -> dict[str, Any]:
    """Return the engine's input."""
    from benchmarks.testing import models

    pictures = [
        models.random_image(seed, width=112, height=112)
        for seed in request.get("images", [])
    ]
    family, text = request["family"], request.get("text", "What?")
    text = models.image_prompt(family, len(pictures), text)
    return {"prompt": text} | (
        {"multi_modal_data": {"image": pictures}} if pictures else {}
    )


def describe(llm: Any) -> dict[str, str]:
    """Say which code has run."""
    worker = worker_of(llm)
    runner = worker.model_runner
    backends = [group.backend for groups in runner.attn_groups for group in groups]
    return {
        "worker": qualified_name(type(worker)),
        "runner": qualified_name(type(runner)),
        "backend": ", ".join(sorted(map(qualified_name, set(backends)))),
        "layout": worker.vllm_config.cache_config.kv_cache_layout,
    }


def worker_of(llm: Any) -> Any:
    """Return the only worker, which lives in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def set_scales(llm: Any, scales: list[float]) -> None:
    """Let every layer's fp8 numbers stand for multiples of these."""
    from vllm.model_executor.layers.attention import Attention

    for layer in worker_of(llm).model_runner.model.modules():
        if isinstance(layer, Attention):
            for name, scale in zip("qkv", scales, strict=True):
                getattr(layer, f"_{name}_scale").fill_(scale)
                setattr(layer, f"_{name}_scale_float", scale)


def kept(llm: Any) -> list[dict[str, Any]]:
    """Return what the KV heads of each layer of each adapted request have evicted.

    And which core they have selected, at which lengths, and what is left of the
    prompt's text.
    """
    worker = worker_of(llm)
    names = sorted(worker.avl_requests(), key=lambda name: int(name.partition("-")[0]))
    found = []
    for name in names:
        report, plan = worker.avl_report(name), worker._avl_requests.find(name).plan
        prompt = range(plan.num_prompt_tokens)
        layers = {
            "evicted": [layer.evicted for layer in report.layers],
            "text": [
                [[token for token in head if token in prompt] for head in layer.text]
                for layer in report.layers
            ],
            "selected": [
                [(one.num_tokens, one.core) for one in layer.history]
                for layer in report.layers
            ],
        }
        counts = {
            "num_scoring": plan.num_scoring_rows,
            "num_refreshes": report.num_refreshes,
        }
        found.append(counts | layers)
    return found


def watch_drafts(llm: Any) -> dict[str, list[list[int]]]:
    """Return where the drafts of each request will be, step by step."""
    drafts: dict[str, list[list[int]]] = {}

    def note(names: list[str], tokens: list[list[int]]) -> None:
        for name, of_request in zip(names, tokens, strict=True):
            drafts.setdefault(name.partition("-")[0], []).append(list(of_request))

    def watch(owner: Any, name: str, names_and_tokens: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            note(*names_and_tokens(result, *args))
            return result

        setattr(owner, name, watched)

    speculator = getattr(worker_of(llm).model_runner, "speculator", None)
    if speculator is None:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        watch(
            scheduler,
            "update_draft_token_ids",
            lambda _, new: (new.req_ids, new.draft_token_ids),
        )
    else:
        # Runner V2 keeps them to itself.
        watch(
            speculator,
            "propose",
            lambda result, batch, *_: (batch.req_ids, result.tolist()),
        )
    return drafts


def num_accepted(llm: Any) -> int:
    """Return how many drafts were accepted so far."""
    counts = {metric.name: metric for metric in llm.get_metrics()}
    return counts["vllm:spec_decode_num_accepted_tokens"].value


def qualified_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def result(llm: Any, outputs: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Collect what is printed."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    answers = [output.outputs[0] for output in outputs]
    report = {
        "versions": {name: version(name) for name in PACKAGES},
        "hits": [output.num_cached_tokens for output in outputs],
        "tokens": [list(one.token_ids) for one in answers],
        "ran": describe(llm),
        "plugin_loaded": "AVL" in AttentionBackendEnum.__members__,
    }
    if args.logprobs:
        report["logprobs"] = [
            [next(iter(step.values())).logprob for step in one.logprobs]
            for one in answers
        ]
    if args.kept:
        report["kept"] = kept(llm)
    if not args.cpu and not args.gpu:
        from standin import graphs, kernels

        report |= {"graphs": dict(graphs.counts), "kernels": kernels.report()}
    return report


def check_blocks(llm: Any) -> None:
    """Assert that every block has come back."""
    from benchmarks.testing.engine import check_integrity

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    check_integrity(scheduler)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def run(args: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """Answer what `spec` asks, and report."""
    requests = [{"family": "llava", **request} for request in spec["requests"]]
    if not args.cpu and not args.gpu:
        from standin import graphs

        graphs.counts.clear()
    llm = start(args, spec.get("llm", {}))
    set_scales(llm, spec.get("scales", [1, 1, 1]))
    drafts = watch_drafts(llm)
    outputs = generate(llm, requests, args.logprobs)
    report = result(llm, outputs, args)
    if args.alone:
        report["alone"] = [
            list(answer(llm, [request], False)[0].token_ids) for request in requests
        ]
    if spec.get("llm", {}).get("speculative_config"):
        report |= {"drafts": drafts, "num_accepted": num_accepted(llm)}
    report["orders"] = [
        answer_in_order(llm, requests, order) for order in spec.get("orders", [])
    ]
    check_blocks(llm)
    llm.llm_engine.engine_core.shutdown()
    return report


def main(argv: list[str] | None = None) -> None:
    """Answer what the specification asks."""
    args = parse(argv)
    set_up(args)
    text = sys.stdin.read() if args.spec == "-" else Path(args.spec).read_text()
    print(json.dumps(run(args, json.loads(text))), flush=True)


if __name__ == "__main__":
    main()
