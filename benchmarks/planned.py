"""What pictures give back by the planner's arithmetic, for several block sizes.

    python benchmarks/planned.py

Runs nothing. Blocks of recurrent hybrids are as large as a state: hundreds of tokens.
"""

from __future__ import annotations

from vllm_avl.config import AVLConfig
from vllm_avl.plan import PICTURE_TOKENS, TEXT_TOKENS, pictures_free

BLOCK_SIZES = (16, 32, 128, 272, 528, 784, 1056)
PICTURES = (1, 4, 16)
RATIOS = (0.5, 0.2)


def main() -> None:
    """Print the table."""
    columns = [(number, ratio) for number in PICTURES for ratio in RATIOS]
    names = [f"{number} x, S = {ratio}" for number, ratio in columns]
    print(f"Blocks given back, of the prompt's; pictures of {PICTURE_TOKENS} tokens,")
    print(f"{TEXT_TOKENS} tokens of text on either side.\n")
    print(f"| block size | {' | '.join(names)} |")
    print(f"| --- |{' --- |' * len(names)}")
    for block_size in BLOCK_SIZES:
        cells = [
            "{} / {}".format(
                *pictures_free(number, block_size, AVLConfig(store_ratio=ratio))
            )
            for number, ratio in columns
        ]
        print(f"| {block_size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
