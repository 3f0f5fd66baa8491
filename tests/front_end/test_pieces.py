"""Tokens of an answer, as the page shows them."""

import pytest
from transformers import AutoTokenizer

from benchmarks.testing.models.tokens import make_tokenizer
from vllm_avl.bundled import WEIGHTS
from vllm_avl.front_end.pieces import pieces

SAID = {
    "words": (
        AutoTokenizer.from_pretrained(WEIGHTS),
        "there are two objects in the picture: a large green star, and a letter K.",
    ),
    "bytes": (make_tokenizer("llava", ["<image>"]), "Où est l'étoile 🌟 ?"),
}


@pytest.mark.parametrize(("tokenizer", "text"), SAID.values(), ids=SAID)
def test_together_they_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer.decode, ids)
    assert len(found) == len(ids) > 5
    assert "".join(found) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in found)


def test_spaces_stand_in_front_of_words():
    tokenizer, text = SAID["words"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert pieces(tokenizer.decode, ids)[:3] == ["there", " are", " two"]


def test_an_answer_may_end_within_a_character():
    tokenizer, _ = SAID["bytes"]
    ids = tokenizer.encode("🌟", add_special_tokens=False)
    assert pieces(tokenizer.decode, ids[:-1])[-1] != ""
    assert pieces(tokenizer.decode, []) == []


def test_what_is_no_text_costs_no_more_than_text():
    """A model may answer with bytes of which no character comes."""
    tokenizer, _ = SAID["bytes"]
    byte = tokenizer.encode("🌟", add_special_tokens=False)[1]
    assert tokenizer.decode([byte]) == "\ufffd"
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    assert "".join(pieces(decode, [byte] * 300)) == "\ufffd" * 300
    assert max(lengths) <= 32
