"""The tokenizer spells every answer, and prompts equal the chat template."""

import pytest

from vllm_avl.bundled.samples import TASKS, make_sample
from vllm_avl.bundled.tokens import make_tokenizer, prompt


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_come_back_as_they_were(tokenizer, task, split):
    for seed in range(30):
        for question, answer in make_sample(task, split, seed, 4).turns:
            ids = tokenizer(f"{question} {answer}").input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(tokenizer(answer).input_ids) == answer


def test_any_printable_text_has_tokens(tokenizer):
    text = "".join(map(chr, range(33, 127)))
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_a_prompt_equals_the_chat_template(tokenizer):
    image = {"type": "image"}
    first = {"role": "user", "content": [image, image, {"type": "text", "text": "a?"}]}
    assert prompt("a?", 2) == tokenizer.apply_chat_template(
        [first], tokenize=False, add_generation_prompt=True
    )


def test_a_second_turn_equals_the_chat_template(tokenizer):
    first = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}],
    }
    turns = [
        first,
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and?"},
    ]
    assert prompt("and?", 1, [("what is it?", "red")]) == (
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )
