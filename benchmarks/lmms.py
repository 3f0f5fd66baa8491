"""The paper's table with lmms-eval: tasks by policy, each on a real `vllm serve`.

lmms-eval runs in an environment of its own (`deploy/cpu/lmms_eval.sh` makes one) and
asks over HTTP. Without a model name it asks the bundled model the bundled tasks; with
one, the six tasks of the paper, whose data the hub must then give. `full` is vLLM
without this plug-in. An answer that never came stops the run: lmms-eval would count it
as wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.harness import Benchmark, Report, main
from benchmarks.training.evaluate import ALL_TASKS, MAX_IMAGES
from vllm_avl.bundled import WEIGHTS
from vllm_avl.demo.server import ServerError, json_option, serve
from vllm_avl.policies import POLICIES

REPOSITORY = Path(__file__).parents[1]
TASKS = Path(__file__).parent / "lmms_tasks"
BUNDLED_TASKS = [f"avl_{task}" for task in ALL_TASKS]
PAPER_TASKS = [
    "nocaps_val",
    "flickr30k_test",
    "docvqa_val",
    "textvqa_val",
    "vqav2_val",
    "ocrbench",
]
METRICS = (
    *("cider", "nocaps_CIDEr", "flickr_CIDEr", "anls"),
    *("exact", "exact_match", "ocrbench_accuracy"),
)
QUESTIONS = 200
"""Of each bundled task, unless there is a limit."""
FAILED = "LMMS_EVAL_REQUEST_FAILED"
BUNDLED_OPTIONS = [
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(128 << 20)),
    *json_option("--limit-mm-per-prompt", {"image": MAX_IMAGES}),
]


def measure(args: argparse.Namespace, report: Report) -> None:
    """Serve and ask, policy by policy."""
    rows = []
    for policy in (progress := tqdm(args.policies, unit="policy", disable=None)):
        progress.set_description(policy)
        found = ask_with(policy, args)
        report.keep("lmms", {}, found)
        rows += found
    title = f"lmms-eval, S = {args.store_ratio}"
    report.show(title, {"model": args.model}, tabulate(rows))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--model", default=str(WEIGHTS), help="checkpoint, folder or name")
    add("--tasks", nargs="+", help="of lmms-eval; the bundled ones or the paper's six")
    add("--policies", nargs="+", default=["full", "avl", "h2o", "fastv"])
    add("--store-ratio", type=float, default=0.5, help="of every policy but full")
    add("--limit", type=int, help="questions a task, at most")
    add("--concurrency", type=int, default=16, help="requests at a time")
    add(
        "--python",
        type=Path,
        default=REPOSITORY / ".cache/lmms-eval/bin/python",
        help="of the environment that has lmms-eval",
    )
    add("--work", type=Path, default=REPOSITORY / ".cache/lmms", help="logs, answers")
    add("serve", nargs="*", help="further arguments of vllm serve, behind --")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot run, and fill in the tasks and the bundled model's options."""
    unknown = set(args.policies) - set(POLICIES)
    if unknown:
        raise ValueError(
            f"--policies {' '.join(unknown)}: known are {', '.join(POLICIES)}"
        )
    if not args.python.exists():
        raise ValueError(
            f"--python {args.python}: not there; deploy/cpu/lmms_eval.sh makes it"
        )
    if args.model == str(WEIGHTS):
        args.tasks = args.tasks or BUNDLED_TASKS
        args.serve = BUNDLED_OPTIONS + args.serve
    args.tasks = args.tasks or PAPER_TASKS


def ask_with(policy: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """Return a row a task.

    Raises:
        SystemExit: the server or lmms-eval failed, or an answer is missing.
    """
    folder = (args.work / policy).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.rglob("*.json*"):
        old.unlink()
    for task in ALL_TASKS:
        lines = [{"task": task, "number": n} for n in range(args.limit or QUESTIONS)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{task}.jsonl").write_text(text)
    options = list(args.serve)
    if policy != "full":
        settings = {"policy": policy, "store_ratio": args.store_ratio}
        options += ["--attention-backend", "avl"]
        options += json_option("--additional-config", {"avl": settings})
    try:
        with serve(args.model, options, log=folder / "server.log") as server:
            found = ask(server.url, folder, args)
    except ServerError as error:
        raise SystemExit(f"{policy}: {error}") from error
    return [
        {
            "model": Path(args.model).name,
            "policy": policy,
            "S": 1 if policy == "full" else args.store_ratio,
            "limit": args.limit or "",
            "task": task,
            **score(found["results"][task]),
        }
        for task in args.tasks
    ]


def ask(url: str, folder: Path, args: argparse.Namespace) -> Mapping[str, Any]:
    """Run lmms-eval against a server; return what it wrote."""
    served = f"base_url={url}/v1,api_key=none,model={args.model}"
    command = [
        *(str(args.python), "-m", "lmms_eval", "--model", "openai"),
        *("--model_args", f"{served},timeout=600,num_concurrent={args.concurrency}"),
        *("--tasks", ",".join(args.tasks), "--include_path", str(TASKS.resolve())),
        *("--output_path", "answers", "--log_samples", "--verbosity", "DEBUG"),
    ]
    if args.limit:
        command += ["--limit", str(args.limit)]
    path = os.pathsep.join(
        filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    )
    log = folder / "lmms_eval.log"
    with log.open("wb") as output:
        environment = {"PYTHONPATH": path, "OPENAI_API_KEY": "none"}
        code = subprocess.call(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
    written = list((folder / "answers").rglob("*_results.json"))
    if code or not written:
        raise SystemExit(f"lmms-eval ended with {code}; its log is {log}")
    for samples in (folder / "answers").rglob("*_samples_*.jsonl"):
        if FAILED in samples.read_text():
            raise SystemExit(
                f"{samples}: requests failed; the server's log is beside it"
            )
    return json.loads(written[0].read_text())


def score(found: Mapping[str, Any]) -> dict[str, object]:
    """Pick the metric that the paper prints, and its standard error."""
    for metric in METRICS:
        if f"{metric},none" in found:
            error = found.get(f"{metric}_stderr,none", "N/A")
            return {
                "metric": metric,
                "score": found[f"{metric},none"],
                "stderr": "" if error == "N/A" else error,
            }
    raise SystemExit(f"{found.get('alias')}: none of {', '.join(METRICS)} in {found}")


def tabulate(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Return a row a task, a column a policy."""
    table: dict[str, dict[str, object]] = {}
    for row in rows:
        line = table.setdefault(row["task"], {"task": row["task"]})
        line["metric"] = row["metric"]
        error = f" ±{row['stderr']:.1f}" if row["stderr"] != "" else ""
        line[row["policy"]] = f"{row['score']:.1f}{error}"
    return list(table.values())


BENCHMARK = Benchmark(
    __doc__, measure, add_options, {"quick": {"limit": 4}}, check=check
)

if __name__ == "__main__":
    main(BENCHMARK)
