"""What each token of an answer adds to its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

INCOMPLETE = "\ufffd"
"""What stands for the bytes of a character that has not ended."""
LONGEST = 16
"""Tokens that a character is waited for; no text has one as long."""


def pieces(decode: Callable[[list[int]], str], token_ids: Sequence[int]) -> list[str]:
    """Return each token's part of the text; together they are the text.

    Alone, a token is decoded without the space in front of it, and half a character
    not at all: so tokens are decoded behind the one before them, and a character
    comes with its last token.

    Args:
        decode: of a tokenizer.
        token_ids: of the answer.
    """
    ids, found = list(token_ids), []
    begin = read = 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[begin:read]), decode(ids[begin:end])
        if now.endswith(INCOMPLETE) and end < min(len(ids), read + LONGEST):
            found.append("")
            continue
        found.append(now[len(before) :])
        begin, read = read, end
    return found
