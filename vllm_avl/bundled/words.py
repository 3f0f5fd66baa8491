"""Words and numbers that no language model could guess."""

import numpy as np

from vllm_avl.bundled.splits import Split, split_of

VOWELS = "AEIOU"
CONSONANTS = "BCDFGHJKLMNPQRSTVWXYZ"
PATTERNS = ("CVC", "CVCV", "CVCC", "VCCV", "CVCVC", "CVCCV", "CVCVCV", "CCVCVC")


def word(rng: np.random.Generator, split: Split, longest: int = 6) -> str:
    """Returns a made-up word of 3 to `longest` capital letters, of `split` only."""
    patterns = [p for p in PATTERNS if len(p) <= longest]
    while True:
        pattern = patterns[int(rng.integers(len(patterns)))]
        letters = (VOWELS if c == "V" else CONSONANTS for c in pattern)
        text = "".join(pool[int(rng.integers(len(pool)))] for pool in letters)
        if split_of(text) == split:
            return text


def number(rng: np.random.Generator, split: Split, digits: int) -> str:
    """Returns a number of `digits` digits, of `split` only where it has 3 or more."""
    while True:
        text = str(rng.integers(10 ** (digits - 1), 10**digits))
        if digits < 3 or split_of(text) == split:
            return text
