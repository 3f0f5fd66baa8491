"""The sizes of the bundled model: all in which they differ."""

from collections.abc import Callable

from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.training import schedule
from benchmarks.training.architecture import make_config, make_model
from benchmarks.training.size import Size
from vllm_avl.bundled.tokens import WORDING, make_tokenizer


def tiny() -> Size:
    """Returns the size in `weights/`: everything is trained from scratch."""

    def make(
        seed: int,
    ) -> tuple[PreTrainedTokenizerFast, LlavaForConditionalGeneration]:
        tokenizer = make_tokenizer()
        return tokenizer, make_model(make_config(tokenizer), seed)

    return Size(
        "tiny",
        make,
        finish=lambda model: None,
        wording=WORDING,
        stages=schedule.STAGES,
        rates=schedule.RATES,
        points=True,
        wants_gpu=False,
    )


def _small() -> Size:
    # Its modules are for those who ask for it.
    from benchmarks.training import smollm2
    from benchmarks.training.small import small

    smollm2.require()
    return small()


SIZES: dict[str, Callable[[], Size]] = {"tiny": tiny, "small": _small}
