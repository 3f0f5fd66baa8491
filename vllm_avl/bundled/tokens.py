"""The tokenizer: a token for each word of the tasks, and one for each character."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_avl.bundled.documents import HEADERS, KEYS, KINDS
from vllm_avl.bundled.picture import COLORS, SHAPES, SIZES
from vllm_avl.bundled.scenes import NUMBERS
from vllm_avl.bundled.wording import Wording

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "USER:", "ASSISTANT:"
WORDS = {
    *("what", "color", "is", "the", "shape", "object", "size", "letter", "on", "where"),
    *("at", "how", "many", "objects", "are", "there", "of", "a", "left", "right"),
    *("above", "below", "top", "upper", "lower", "bottom", "middle", "more", "often"),
    *("than", "which", "larger", "or", "with", "and", "in", "picture", "shows"),
    *("image", "does", "say", "word", "number", "describe", "has", "yes", "no"),
}

WORDING = Wording(
    first=f"{BOS}{USER}",
    image=f" image {{}} {IMAGE}",
    question=f" {{}} {ASSISTANT}",
    answer=f" {{}}{EOS}",
    again=USER,
)
# A reply ends with EOS, so that a next turn repeats what was decoded.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set pictures = namespace(count=0) %}
{%- for message in messages %}
    {{- message['role'] | upper + ':' }}
    {%- if message['content'] is string %}
        {{- ' ' + message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set pictures.count = pictures.count + 1 %}
                {{- ' image ' ~ pictures.count ~ ' <image>' }}
            {%- elif part['type'] == 'text' %}
                {{- ' ' + part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- else %}
        {{- ' ' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""


def vocabulary() -> list[str]:
    """Returns every token but the special ones, in order of its id."""
    printable = [chr(code) for code in range(33, 127)]
    names = {*WORDS, *COLORS, *SHAPES, *SIZES, *NUMBERS}
    names |= {w.lower() for w in (*KEYS, *KINDS, *HEADERS)} | {"table"}
    words = sorted(names - set(printable))
    return [*printable, *(f"##{c}" for c in printable), *words]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer with its chat template; it adds nothing to a text."""
    tokens = [PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT, *vocabulary()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt(
    text: str, num_images: int = 1, earlier: Sequence[tuple[str, str]] = ()
) -> str:
    """Returns the prompt for `LLM.generate`: the images, then the turns.

    It equals the chat template's rendering of the same turns.

    Args:
        text: The question.
        num_images: Images of the first turn.
        earlier: Questions and answers of the turns before this one.
    """
    return WORDING.prompt(text, num_images, earlier)
