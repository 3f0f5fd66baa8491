"""Which rows to keep, tried without a server: rankings, heads and layer budgets.

The bundled model runs in eager code. Each prompt is computed once; then each variant
keeps the rows that its policy ranks first, as many as the plug-in would, and answers
over them. What policies score here is what they score there, so that the scores are
those of `accuracy.py`, at a fraction of the time. Differences to `full` are paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.accuracy import VALIDATION, interval
from benchmarks.harness import Benchmark, Report, main
from benchmarks.report import append_rows
from benchmarks.scoring.cells import DOWNSAMPLE
from benchmarks.scoring.eager import Kept, Model, Prompt
from benchmarks.scoring.pictures import shrunk
from benchmarks.training.evaluate import (
    ALL_TASKS,
    Question,
    max_tokens,
    questions,
    scores,
)
from vllm_avl.bundled import WEIGHTS
from vllm_avl.config import AVLConfig
from vllm_avl.plan import Plan, make_plan
from vllm_avl.policies import POLICIES, TokenView

RATIOS = (0.5, 0.2, 0.1)
FULL, LAYERS = "full", "layers"
BLOCK_SIZE = 32
"""As in `accuracy.py`."""
TOGETHER = 50
"""Questions that are answered together."""


@dataclass(frozen=True)
class Variant:
    """One way to answer all questions.

    Attributes:
        name: a policy, `full` or `downsample`.
        ratio: of the vision tokens that stay, or of the pixels.
        heads: how scores of heads become one, see `AVLConfig.head_reduction`.
        budgets: what the ratio is multiplied by in each layer; none: it is not.
    """

    name: str
    ratio: float = 1
    heads: str = "mean"
    budgets: tuple[float, ...] = ()

    @property
    def pixels(self) -> float:
        """Share of its pixels that each picture is shown with."""
        return self.ratio if self.name == DOWNSAMPLE else 1

    @property
    def columns(self) -> dict[str, object]:
        """What tells it from the others, for the table."""
        layers = " ".join(f"{factor:g}" for factor in self.budgets)
        return {
            "name": self.name,
            "S": self.ratio,
            "heads": self.heads,
            LAYERS: layers or "-",
        }

    def plan(self, prompt: Prompt, layer: int) -> Plan | None:
        """Return what becomes of a prompt; None where all of it stays."""
        if self.name not in POLICIES or self.ratio == 1:
            return None
        share = self.ratio * (self.budgets[layer] if self.budgets else 1)
        config = AVLConfig(
            policy=self.name,
            store_ratio=min(round(share, 4), 1.0),
            head_reduction=self.heads,
        )
        ranges = prompt.vision_ranges
        return make_plan(prompt.num_tokens, ranges, BLOCK_SIZE, config)


def measure(args: argparse.Namespace, report: Report) -> None:
    """Answer with each variant, and report what it scores."""
    model = Model(args.model)
    variants = list(make_variants(args))
    num_answers = len(args.tasks) * len(variants) * args.count
    rows: list[dict[str, object]] = []
    with tqdm(total=num_answers, unit="answer", disable=None) as progress:
        for task in args.tasks:
            progress.set_description(task)
            found = answer(args, model, task, variants, progress)
            if not args.quick:
                # Which machine computes does not matter to what is right.
                append_rows(args.results / "ranking.csv", found)
            rows += found
    asked = {"first": args.first, "questions": args.count}
    report.show("Scores by what is kept", asked, tabulate(rows))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is asked and tried."""
    add = parser.add_argument
    names = [name for name in POLICIES if name != FULL]
    add("--model", type=Path, default=WEIGHTS, help="folder of the checkpoint")
    add("--tasks", nargs="+", choices=ALL_TASKS, default=list(ALL_TASKS))
    add("--policies", nargs="+", choices=[*names, DOWNSAMPLE], default=names)
    add("--ratios", nargs="+", type=float, default=list(RATIOS), help="S")
    add("--heads", nargs="+", choices=["mean", "max"], default=["mean"])
    add(
        "--budgets",
        nargs="+",
        type=float,
        default=[],
        help="what S is multiplied by in each layer, beside one S for all",
    )
    add("--count", type=int, default=100, help="questions of each task")
    add("--tune", action="store_true", help="ask questions of the validation split")


def check(args: argparse.Namespace) -> None:
    """Say which question comes first."""
    args.first = VALIDATION if args.tune else 0


def make_variants(args: argparse.Namespace) -> Iterator[Variant]:
    """Yield `full`, then each policy at each ratio."""
    yield Variant(FULL)
    for name in args.policies:
        for ratio in args.ratios:
            if name == DOWNSAMPLE:
                yield Variant(name, ratio)
                continue
            for heads in args.heads:
                yield Variant(name, ratio, heads)
                if args.budgets:
                    yield Variant(name, ratio, heads, tuple(args.budgets))


def answer(
    args: argparse.Namespace,
    model: Model,
    task: str,
    variants: Sequence[Variant],
    progress: tqdm,
) -> list[dict[str, object]]:
    """Return a row for each variant in one task."""
    asked = questions(task, args.count, first=args.first)
    answers: dict[Variant, list[str]] = {variant: [] for variant in variants}
    for start in range(0, args.count, TOGETHER):
        part = asked[start : start + TOGETHER]
        prompts = [model.prefill(question) for question in part]
        for variant in variants:
            read = prompts if variant.pixels == 1 else _shown(model, part, variant)
            kept = keep(variant, read, model.num_layers)
            answers[variant] += model.answer(read, kept, max_tokens(task))
            progress.update(len(part))
    full = scores(task, answers[variants[0]], asked)
    return [
        _row(args, task, variant, scores(task, given, asked), full)
        for variant, given in answers.items()
    ]


def _shown(model: Model, part: Sequence[Question], variant: Variant) -> list[Prompt]:
    return [model.prefill(question) for question in shrunk(part, variant.pixels)]


def keep(variant: Variant, prompts: Sequence[Prompt], num_layers: int) -> Kept:
    """Return the positions that stay, by layer and prompt."""
    by_prompt = []
    for prompt in prompts:
        memo: dict[str, Any] = {}
        layers = range(num_layers)
        by_prompt.append([_rows(variant, prompt, layer, memo) for layer in layers])
    return list(zip(*by_prompt, strict=True))


def _rows(
    variant: Variant, prompt: Prompt, layer: int, memo: dict[str, Any]
) -> torch.Tensor:
    """[num_heads, num_rows] positions that stay in a layer."""
    num_heads = prompt.keys.shape[1]
    plan = variant.plan(prompt, layer)
    if plan is None:
        return torch.arange(prompt.num_tokens).expand(num_heads, -1)
    policy = POLICIES[variant.name]
    ranges = ((0, plan.num_full_tokens),) if policy.ranks_text else plan.ranked_ranges
    ranked = torch.cat([torch.arange(start, end) for start, end in ranges])
    is_fixed = torch.ones(prompt.num_tokens, dtype=torch.bool)
    is_fixed[ranked] = False
    ranking = score(variant, plan, prompt, layer, ranked, memo)
    num_kept = len(ranked) - plan.num_evicted_rows
    order = torch.sort(ranking, dim=1, descending=True, stable=True).indices
    best = ranked[order[:, :num_kept]]
    fixed = is_fixed.nonzero().flatten().expand(len(best), -1)
    return torch.cat([fixed, best], 1).expand(num_heads, -1)


def score(
    variant: Variant,
    plan: Plan,
    prompt: Prompt,
    layer: int,
    ranked: torch.Tensor,
    memo: dict[str, Any],
) -> torch.Tensor:
    """[num_rankings, num_ranked] scores, asked for as `worker.layer` does."""
    policy = POLICIES[variant.name]
    reduce = torch.amax if variant.heads == "max" else torch.sum
    by_head = prompt.attention(layer, plan.num_scoring_rows)[:, ranked]
    splits = policy.per_head or policy.reads_rows
    weights = by_head if splits else reduce(by_head, 0, keepdim=True)
    num_kept = len(ranked) - plan.num_evicted_rows
    view = TokenView(
        positions=ranked,
        attention=weights,
        sums=by_head if policy.keeps_sums else None,
        held=torch.ones_like(weights, dtype=torch.bool),
        num_kept=torch.full((len(weights), 1), num_kept),
        num_scoring_rows=plan.num_scoring_rows,
        layer=layer,
        num_computed=prompt.num_tokens,
        memo=memo,
        keys=prompt.keys[layer][:, ranked] if policy.reads_rows else None,
        values=prompt.values[layer][:, ranked] if policy.reads_rows else None,
    )
    scored = policy.score(view)
    reduces = policy.reads_rows and not policy.per_head
    return reduce(scored, 0, keepdim=True) if reduces else scored


def _row(
    args: argparse.Namespace,
    task: str,
    variant: Variant,
    each: Sequence[float],
    full: Sequence[float],
) -> dict[str, object]:
    low, high = interval(np.subtract(each, full))
    return {
        "first": args.first,
        "questions": args.count,
        "task": task,
        **variant.columns,
        "score": fmean(each),
        "diff_low": low,
        "diff_high": high,
    }


def tabulate(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Return a line a variant: scores, and intervals of differences to `full`."""
    lines: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        names = {name: row[name] for name in ("name", "S", "heads", LAYERS)}
        line = lines.setdefault(tuple(names.values()), names)
        shown = f"{row['score']:.1f}"
        if row["name"] != FULL:
            shown += f" [{row['diff_low']:+.1f}, {row['diff_high']:+.1f}]"
        line[str(row["task"])] = shown
    return list(lines.values())


QUICK = {"count": 4, "ratios": [0.2]}
BENCHMARK = Benchmark(__doc__, measure, add_options, {"quick": QUICK}, check)

if __name__ == "__main__":
    main(BENCHMARK)
