"""A drafter that knows the answers, and is wrong every now and then."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

NUM_DRAFTS = 3
CONFIG = {
    "method": "custom_class",
    "model": "scripted_drafts.Scripted",
    "num_speculative_tokens": NUM_DRAFTS,
}
"""`speculative_config` of an engine in this process."""
REPEATABLE_CONFIG = CONFIG | {"model": "scripted_drafts.Repeatable"}
WRONG_CONFIG = CONFIG | {"model": "scripted_drafts.Wrong"}
BOS = 256
"""Of the small models' tokenizer; they say printable characters only."""
WRONG = 0.3
"""Part of the drafts that are not what was taught."""


class Scripted:
    """Drafts what it was taught, with mistakes."""

    taught: ClassVar[dict[tuple[int, ...], set[tuple[int, ...]]]] = {}
    """Answers by the tokens of their prompt."""
    num_drafts: ClassVar[int] = 0
    num_accepted: ClassVar[int] = 0

    def __init__(self, vllm_config: object) -> None:
        self._rng = random.Random(0)

    @classmethod
    def teach(cls, prompt: Sequence[int], answer: Sequence[int]) -> None:
        """Let it know an answer; pictures do not tell prompts apart, answers do."""
        cls.taught.setdefault(tuple(prompt), set()).add(tuple(answer))

    @classmethod
    def teach_to(cls, engine: Any, ask: Any, answer: Sequence[int]) -> None:
        """Let it know an answer to a question as an engine tokenizes it."""
        (output,) = engine.llm.generate(
            [engine.prompt(ask)], [ask.params(max_tokens=1)], use_tqdm=False
        )
        cls.teach(output.prompt_token_ids, answer)

    def load_model(self, *args: object, **kwargs: object) -> None:
        """It has none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **kwargs):
        """Draft for each row that has sampled something."""
        drafts = []
        for row, sampled in enumerate(sampled_token_ids):
            tokens = token_ids_cpu[row, : num_tokens_no_spec[row]].tolist()
            drafts.append(self._draft(tokens) if sampled else [])
            Scripted.num_accepted += max(len(sampled) - 1, 0)
            Scripted.num_drafts += len(drafts[-1])
        return drafts

    def _draft(self, tokens: list[int]) -> list[int]:
        for prompt, answers in self.taught.items():
            said = tuple(tokens[len(prompt) :])
            if not said or tuple(tokens[: len(prompt)]) != prompt:
                continue
            for answer in answers:
                if answer[: len(said)] == said:
                    coming = answer[len(said) : len(said) + NUM_DRAFTS]
                    return [self._spoil(token) for token in coming]
        return []

    def _spoil(self, token: int) -> int:
        return token + 1 if self._rng.random() < WRONG else token


class Repeatable(Scripted):
    """Makes its mistakes at the same places of an answer every time."""

    def _draft(self, tokens: list[int]) -> list[int]:
        self._rng = random.Random(len(tokens))
        return super()._draft(tokens)


class Wrong:
    """Drafts what the small models never say."""

    def __init__(self, vllm_config: object) -> None:
        """It has nothing."""

    def load_model(self, *args: object, **kwargs: object) -> None:
        """It has none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **kwargs):
        """Draft for each row that has sampled something."""
        return [[BOS] * NUM_DRAFTS if sampled else [] for sampled in sampled_token_ids]
