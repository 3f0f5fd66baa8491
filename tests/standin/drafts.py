"""Drafters that look up what the last tokens were followed by, as runner V2's does."""

from __future__ import annotations

from collections.abc import Sequence

NUM_DRAFTS = 3
LONGEST = 2
"""Tokens that are looked for at most; one at least."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": LONGEST,
}
REPEATED, FILLED = (
    {
        "method": "custom_class",
        "model": f"standin.drafts.{name}",
        "num_speculative_tokens": NUM_DRAFTS,
    }
    for name in ("Repeated", "Filled")
)
"""`speculative_config` of drafts as many as are found, and of all that there can be."""


class Repeated:
    """Drafts what followed the last tokens the last time."""

    def __init__(self, vllm_config: object) -> None:
        """It has nothing."""

    def load_model(self, *args: object, **kwargs: object) -> None:
        """It has none."""

    def propose(self, sampled_token_ids, num_tokens_no_spec, token_ids_cpu, **kwargs):
        """Draft for each row that has sampled something."""
        return [
            self.draft(token_ids_cpu[row, : num_tokens_no_spec[row]].tolist())
            if sampled
            else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def draft(self, tokens: Sequence[int]) -> list[int]:
        """Return what followed the longest match, of several the last."""
        for length in range(LONGEST, 0, -1):
            for start in range(len(tokens) - length - 1, -1, -1):
                stop = start + length
                if tokens[start:stop] == tokens[-length:]:
                    return list(tokens[stop : stop + NUM_DRAFTS])
        return []


class Filled(Repeated):
    """Drafts the last token again where nothing is found."""

    def draft(self, tokens: Sequence[int]) -> list[int]:
        """Return as many drafts as there can be."""
        found = super().draft(tokens)
        return found + [tokens[-1]] * (NUM_DRAFTS - len(found))
