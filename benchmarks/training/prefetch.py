"""Makes the batches of the coming steps in other processes, for a fast device."""

from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from benchmarks.training.batches import Batch, BatchMaker
from benchmarks.training.schedule import Stage, stage_at


class Steps(Dataset[Batch]):
    """The batch of every step of training, by the step's number."""

    def __init__(self, maker: BatchMaker, stages: tuple[Stage, ...]) -> None:
        self.maker = maker
        self.stages = stages

    def __getitem__(self, step: int) -> Batch:
        """Makes the batch."""
        stage, _ = stage_at(step, self.stages)
        return self.maker.train(step, stage.rows, stage.kept, stage.answers)


def batches(steps: Steps, first: int, last: int, workers: int) -> Iterator[Batch]:
    """Yields the batches of steps `first` to `last`, the last one excluded.

    Args:
        steps: Makes each.
        first: The first step.
        last: The step after the last one.
        workers: Processes that make them ahead of time; 0 makes each when asked.
    """
    numbers = range(first, last)
    if not workers:
        yield from (steps[step] for step in numbers)
        return
    yield from DataLoader(
        steps,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        multiprocessing_context="spawn",
    )
