"""What training does at which step."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_avl.bundled.picture import NUM_PATCHES


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Attributes:
        name: Shown beside the progress bar.
        steps: Its length.
        rows: Samples a step.
        kept: Patches of a picture that go through the model.
        answers: Whether the language model learns, or the tower alone.
        label_weight: How much the labels' loss counts; 0 leaves the tower as it is.
        peak: Learning rate it starts with, relative to the highest.
        end: Learning rate it ends with, likewise; linear between them.
    """

    name: str
    steps: int
    rows: int
    kept: int
    answers: bool
    label_weight: float
    peak: float
    end: float


@dataclass(frozen=True)
class Rates:
    """The highest learning rates: of layers' matrices, of all else, of adapters."""

    matrix: float
    other: float
    adapter: float = 0.0


STAGES = (
    Stage("tower", 2000, 16, 144, False, 1.0, 1.0, 0.1),
    Stage("answers", 1600, 16, 128, True, 0.0, 0.5, 0.356),
    Stage("both", 2000, 16, 128, True, 0.3, 0.356, 0.04),
    Stage("whole", 400, 8, NUM_PATCHES, True, 0.1, 0.04, 0.002),
)
RATES = Rates(matrix=4e-3, other=3e-3)
WARM_UP = 40


def stage_at(step: int, stages: Sequence[Stage]) -> tuple[Stage, float]:
    """Returns the stage of a step and the learning rate, relative to the highest.

    Args:
        step: Its number.
        stages: One after the other.
    """
    start = 0
    for stage in stages:
        if step < start + stage.steps:
            done = (step - start) / stage.steps
            rate = stage.peak + done * (stage.end - stage.peak)
            return stage, rate * min(1.0, (step - start + 1) / WARM_UP)
        start += stage.steps
    return stages[-1], stages[-1].end


def starts_answers(step: int, stages: Sequence[Stage]) -> bool:
    """Whether the language model begins to learn at this step of `stages`."""
    before = step > 0 and stage_at(step - 1, stages)[0].answers
    return stage_at(step, stages)[0].answers and not before
