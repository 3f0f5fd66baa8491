"""What a size of the bundled model is."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.training.schedule import Rates, Stage
from vllm_avl.bundled.wording import Wording


@dataclass(frozen=True)
class Size:
    """One size. Its checkpoints hold the weights that it trains, and no others.

    Attributes:
        name: As the command lines take it.
        make: Gives the tokenizer and, for a seed, the model before training, its
            frozen weights without a gradient.
        finish: Turns the trained model, in place, into the one that is served.
        wording: What its prompts look like; its chat template says the same.
        stages: What training does when.
        rates: The highest learning rates.
        points: Whether attention is taught where an answer is read off, which takes
            a tokenizer that spells.
        wants_gpu: Whether it is trained on a GPU where there is one. Elsewhere the
            same seed gives the same weights.
    """

    name: str
    make: Callable[[int], tuple[PreTrainedTokenizerFast, LlavaForConditionalGeneration]]
    finish: Callable[[LlavaForConditionalGeneration], None]
    wording: Wording
    stages: tuple[Stage, ...]
    rates: Rates
    points: bool
    wants_gpu: bool
