"""Draws where one request's rows lie in its blocks, from prefill to text eviction.

Every count in the picture comes from the plan that the scheduler would make.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes

from vllm_avl.config import AVLConfig
from vllm_avl.plan import Plan, count, make_plan

matplotlib.use("Agg")

NUM_PROMPT_TOKENS = 600
VISION_RANGE = (5, 581)
BLOCK_SIZE = 32
CONFIG = AVLConfig(
    store_ratio=0.5,
    core_ratio=0.3,
    refresh_interval=3,
    text_keep_ratio=0.7,
)
ORDINARY_STEP = 40
"""Late enough that what has been appended can be seen."""

# Okabe and Ito's colours and a grey, which colour-blind readers can tell apart.
VISION, TEXT = "#F0E442", "#999999"
FREED, SECONDARY, CORE = "#FFFFFF", "#E69F00", "#56B4E9"
PARTIAL, GENERATED = "#CC79A7", "#009E73"
STRIP_HEIGHT = 0.8

Span = tuple[float, float, str, str]
"""First slot, end, colour and label."""


class Strips:
    """One request's blocks, drawn once for each moment of its life."""

    def __init__(self, axes: Axes, block_size: int) -> None:
        self.axes = axes
        self.block_size = block_size
        self.top = 0.0

    def begin(self, title: str, below: float) -> None:
        """Start a strip `below` the one before."""
        self.top -= below
        self.axes.text(0, self.top + 0.15, title, va="bottom", fontsize=10.5)

    def fill(self, spans: Sequence[Span], num_tokens: int) -> None:
        """Colour spans of slots, and outline the blocks of `num_tokens`."""
        bottom, middle = self.top - STRIP_HEIGHT, self.top - STRIP_HEIGHT / 2
        for start, end, colour, label in spans:
            left, right = start / self.block_size, end / self.block_size
            hatch = "//" if colour == FREED else None
            self.axes.add_patch(
                pyplot.Rectangle(
                    (left, bottom),
                    right - left,
                    STRIP_HEIGHT,
                    facecolor=colour,
                    edgecolor="#CCCCCC",
                    linewidth=0,
                    hatch=hatch,
                )
            )
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
            at = (left + right) / 2, middle
            self.axes.text(
                *at, label, ha="center", va="center", fontsize=9, bbox=box, zorder=4
            )
        for block in range(-(-num_tokens // self.block_size)):
            outline = pyplot.Rectangle((block, bottom), 1, STRIP_HEIGHT, fill=False)
            outline.set(edgecolor="#555555", linewidth=0.6)
            self.axes.add_patch(outline)

    def bracket(self, start: int, end: int, label: str) -> None:
        """Mark the slots [start, end) below the strip."""
        left, right = start / self.block_size, end / self.block_size
        y = self.top - STRIP_HEIGHT - 0.2
        self.axes.plot(
            [left, left, right, right],
            [y + 0.12, y, y, y + 0.12],
            color="black",
            linewidth=1.4,
        )
        at = (left + right) / 2, y - 0.08
        self.axes.text(*at, label, ha="center", va="top", fontsize=9.5)

    def arrow(self, start: float, end: float, height: float) -> None:
        """Point from block `start` to block `end`, `height` above the strip's foot."""
        y = self.top - STRIP_HEIGHT + height
        style = {"arrowstyle": "-|>", "linewidth": 1.4, "color": "black"}
        style |= {"shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", (end, y), (start, y), arrowprops=style, zorder=5)


def main() -> None:
    """Draw the picture into a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_suffix(".png"),
        help="the picture to write (default: beside this script)",
    )
    output = parser.parse_args().output
    plan = make_plan(NUM_PROMPT_TOKENS, [VISION_RANGE], BLOCK_SIZE, CONFIG)
    assert plan is not None
    draw(plan, output)


def draw(plan: Plan, file: Path) -> None:
    """Draw the life of a request that is served by `plan`."""
    evicting = first_text_eviction(plan)
    num_blocks = -(-evicting // plan.block_size)
    figure, axes = pyplot.subplots(figsize=(9, 6.5))
    strips = Strips(axes, plan.block_size)
    draw_prompt(strips, plan)
    draw_stored(strips, plan)
    draw_ordinary_step(strips, plan, plan.num_prompt_tokens + ORDINARY_STEP)
    draw_refresh_step(strips, plan, next_refresh(plan, ORDINARY_STEP))
    draw_evicted_text(strips, plan, evicting)
    axes.set_xlim(-0.1, num_blocks + 0.1)
    axes.set_ylim(strips.top - 1.55, 0.6)
    axes.axis("off")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_prompt(strips: Strips, plan: Plan) -> None:
    """Draw the prompt as prefill leaves it."""
    start, end = VISION_RANGE
    length = plan.num_prompt_tokens
    strips.begin(
        f"Prefill: {length} tokens in {plan.num_full_blocks} full blocks of "
        f"{plan.block_size} and a partial one",
        below=0,
    )
    vision = f"vision: {count(plan.vision_ranges)} tokens"
    strips.fill(
        [(0, start, TEXT, ""), (start, end, VISION, vision), (end, length, TEXT, "")],
        length,
    )
    note = f"text: {start} tokens in front, {length - end} behind"
    below = strips.top - STRIP_HEIGHT - 0.1
    strips.axes.text(length / plan.block_size, below, note, ha="right", va="top")


def draw_stored(strips: Strips, plan: Plan) -> None:
    """Draw what is stored after the step that computes the last prompt token."""
    length = plan.num_prompt_tokens
    freed = plan.num_freed_blocks(length)
    text = plan.num_full_tokens - plan.num_vision_tokens
    secondary = plan.num_secondary_rows
    strips.begin(
        "The end of the prompt: kept rows are copied, best first, to private blocks",
        below=2.1,
    )
    labels = (
        f"nothing: {freed} blocks less",
        f"text + core: {plan.num_core_blocks} blocks\n"
        f"{text} text, {plan.num_core_vision} vision",
        f"secondary:\n{secondary} vision",
    )
    strips.fill(regions(plan, length, labels), length)
    end = length / plan.block_size + 0.4
    where = strips.top - STRIP_HEIGHT / 2
    note = "partial\nblock: stays"
    strips.axes.text(end, where, note, va="center", fontsize=9)
    below = strips.top - STRIP_HEIGHT - 0.1
    note = f"all {plan.num_full_blocks} blocks of the prompt go back, exact and hashed"
    strips.axes.text(0, below, note, ha="left", va="top", fontsize=9.5)


def draw_ordinary_step(strips: Strips, plan: Plan, length: int) -> None:
    """Draw a step that reads core, text and what has been generated."""
    step = length - plan.num_prompt_tokens
    assert not plan.refreshes(length - 1, 1)
    strips.begin(f"An ordinary step (t = {step}) reads core and text", below=2.3)
    strips.fill(regions(plan, length), length)
    start = plan.num_freed_blocks(length - 1) * plan.block_size
    strips.bracket(start, start + plan.num_core_rows, f"read: {plan.num_core_rows}")
    behind = length - plan.num_full_tokens
    strips.bracket(plan.num_full_tokens, length, f"and {behind} rows")
    end = length / plan.block_size + 0.2
    where = strips.top - STRIP_HEIGHT / 2
    strips.axes.text(end, where, "generated,\nappended", va="center", fontsize=9)


def draw_refresh_step(strips: Strips, plan: Plan, length: int) -> None:
    """Draw a step that reads all and selects core anew."""
    step = length - plan.num_prompt_tokens
    interval = plan.config.refresh_interval
    strips.begin(
        f"A refresh step (t = {step}, K = {interval}) reads all that is stored; "
        "core is other slots from now on, no row moves",
        below=2.3,
    )
    strips.fill(regions(plan, length, ("", "text + core, scattered", "")), length)
    start = plan.num_freed_blocks(length - 1) * plan.block_size
    strips.bracket(start, length, f"read: {length - start} rows")


def draw_evicted_text(strips: Strips, plan: Plan, length: int) -> None:
    """Draw the blocks after the first block's worth of text has left."""
    strips.begin(
        f"A block's worth of text leaves (after t = {length - plan.num_prompt_tokens}):"
        " what survives of the first block fills its holes",
        below=2.3,
    )
    size = plan.block_size
    old, new = plan.num_freed_blocks(length - 1), plan.num_freed_blocks(length)
    strips.fill(
        [
            (0, new * size, FREED, f"nothing: {new} blocks less"),
            (new * size, plan.num_full_tokens, CORE, "text + core, and secondary"),
            (plan.num_full_tokens, length, GENERATED, ""),
        ],
        length,
    )
    assert not plan.refreshes(length, 1)
    num_read = length + 1 - new * size - plan.num_secondary_rows
    note = f"the next ordinary step reads {num_read} of these rows"
    strips.bracket(new * size, length, note)
    for block in range(old, new):
        strips.arrow(block + 0.5, plan.num_full_blocks + 1, 0.15 * STRIP_HEIGHT)


def regions(
    plan: Plan,
    length: int,
    labels: Sequence[str] = ("", "text + core", "secondary"),
) -> list[Span]:
    """Return the spans of a request that has not evicted any text yet."""
    freed = plan.num_freed_blocks(length) * plan.block_size
    core = freed + plan.num_core_rows
    prompt = plan.num_prompt_tokens
    return [
        (0, freed, FREED, labels[0]),
        (freed, core, CORE, labels[1]),
        (core, plan.num_full_tokens, SECONDARY, labels[2]),
        (plan.num_full_tokens, prompt, PARTIAL, ""),
        (prompt, length, GENERATED, ""),
    ]


def next_refresh(plan: Plan, step: int) -> int:
    """Length of the request after the first refresh step behind `step`."""
    computed = plan.num_prompt_tokens + step
    while not plan.refreshes(computed, 1):
        computed += 1
    return computed + 1


def first_text_eviction(plan: Plan) -> int:
    """Length of the request after the first step that evicts text."""
    length = plan.num_prompt_tokens
    while not plan.num_evicted_text_blocks(length):
        length += 1
    return length


if __name__ == "__main__":
    main()
