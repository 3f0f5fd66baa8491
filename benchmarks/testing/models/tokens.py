"""A byte-level tokenizer and the prompts of the small checkpoints."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"

# What one image is in a prompt, before the processor expands it.
PLACEHOLDERS = {
    "llava": "<image>\n",
    "llava_next": "<image>\n",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>\n",
    "llava_onevision": "<image>\n",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "glm4_1v": "<|begin_of_image|><|image|><|end_of_image|>",
    "glm_ocr": "<|begin_of_image|><|image|><|end_of_image|>",
    "mistral3": "[IMG]",
    "pixtral": "[IMG]",
    "gemma3": "<start_of_image>",
    "gemma4": "<|image|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "llama4": "<|image|>",
}

# A reply follows "ASSISTANT:" directly, so that a next turn repeats what was decoded.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | upper + ':' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- IMAGE }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def make_tokenizer(
    name: str, special_tokens: Sequence[str] = (), **named_tokens: str
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one token per byte, with the chat template of `name`.

    It adds nothing to a text: prompts spell out the BOS.

    Args:
        name: The architecture.
        special_tokens: Added after BOS, EOS and PAD.
        **named_tokens: Special tokens that are attributes of the tokenizer as well.
    """
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=named_tokens,
    )
    fast.add_tokens(list(special_tokens), special_tokens=True)
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", repr(PLACEHOLDERS[name]))
    return fast


def image_prompt(name: str, num_images: int, text: str) -> str:
    """Returns the prompt for `LLM.generate`: one user turn, its images first.

    It equals the chat template's rendering of the same turn.

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in PLACEHOLDERS:
        raise ValueError(f"name={name!r} must be one of {sorted(PLACEHOLDERS)}")
    return f"{BOS}USER:{PLACEHOLDERS[name] * num_images}{text}\nASSISTANT:"
