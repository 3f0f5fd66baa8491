"""A small random Llama in SmolLM2's place, with a tokenizer of bytes."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.training.small import END, START
from benchmarks.training.smollm2 import SPARE, with_image

UNKNOWN = "<|endoftext|>"


def load() -> tuple[PreTrainedTokenizerFast, transformers.LlamaForCausalLM]:
    """Returns both as `smollm2.load` does, the same each time."""
    tokenizer = _tokenizer()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=288,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return tokenizer, transformers.LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    special = [UNKNOWN, START, END, SPARE]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return with_image(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=START,
            eos_token=END,
            pad_token=END,
            unk_token=UNKNOWN,
        )
    )
