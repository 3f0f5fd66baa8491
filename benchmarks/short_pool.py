"""Many requests at once in a short pool: chats, or questions about one thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from benchmarks.conversation import Pictures, begin, following, questions
from benchmarks.engines import AVL, STOCK, Engine
from benchmarks.harness import take_turns
from benchmarks.runs import Run, counts, gains, median, tokens_per_second

Runs = dict[str, list[Run]]
Images = Sequence[list[Image.Image]]


@dataclass(frozen=True)
class Load:
    """What is asked at once."""

    part: str
    """`chats`, each about pictures of its own, or `questions`, all about the same."""
    count: int
    num_images: int
    num_turns: int
    output_tokens: int

    def images(self, pictures: Pictures) -> Images:
        """Take the pictures of one run."""
        num_subjects = self.count if self.part == "chats" else 1
        return [pictures.take(self.num_images) for _ in range(num_subjects)]

    def serve(
        self, engine: Engine, images: Images, xargs: Mapping[str, float] | None = None
    ) -> Run:
        """Ask `engine` everything, from a cold prefix cache.

        Questions come when one about the same pictures has been answered, untimed.
        """
        if self.part == "chats":
            chats = [begin(of_one, self.output_tokens) for of_one in images]
            follow = following(engine, chats, self.num_turns)
            return engine.run([chat.request for chat in chats], xargs, follow=follow)
        first, *others = questions(images[0], self.count + 1, self.output_tokens)
        engine.run([first], xargs)
        return engine.run(others, xargs, keeps_cache=True)


def check(load: Load, engines: Mapping[str, Engine], pictures: Pictures) -> None:
    """Refuse to time anything unless `avl: 0` gives stock's tokens; warm `avl` up."""
    few = replace(load, count=min(load.count, 3))
    images = few.images(pictures)
    stock = few.serve(engines[STOCK], images)
    off = few.serve(engines[AVL], images, {"avl": 0})
    if list(off.outputs.values()) != list(stock.outputs.values()):
        raise SystemExit(f"{load.part}: `avl: 0` and stock give different tokens")
    print(f"checked: `avl: 0` gives stock's tokens in {load.part}")
    few.serve(engines[AVL], images)


def run_all(
    load: Load, engines: Mapping[str, Engine], pictures: Pictures, repeats: int
) -> Runs:
    """Run the load `repeats` times on every engine, with fresh pictures each time."""
    images = [load.images(pictures) for _ in range(repeats)]

    def run(name: str, repeat: int) -> Run:
        return load.serve(engines[name], images[repeat])

    return take_turns(engines, repeats, run)


def summarize(runs: Runs) -> list[dict[str, object]]:
    """Return a row an engine: counts, and rates relative to stock's of its turn."""
    return [
        {
            "variant": name,
            **counts(of_one),
            "hit_rate": median(of_one, lambda run: run.hit_rate),
            "prompt_share": median(of_one, lambda run: run.prompt_share),
            **tokens_per_second(of_one),
            **gains(of_one, runs[STOCK]),
        }
        for name, of_one in runs.items()
    ]
