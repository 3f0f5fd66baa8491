"""The size *small*: a frozen SmolLM2 that learns to see through what we train."""

from collections.abc import Callable

import transformers
from transformers import PreTrainedTokenizerFast

from benchmarks.training import adapters, smollm2
from benchmarks.training.architecture import llava_config, make_model, tower_config
from benchmarks.training.schedule import Rates, Stage
from benchmarks.training.size import Size
from vllm_avl.bundled.picture import NUM_PATCHES
from vllm_avl.bundled.tokens import IMAGE
from vllm_avl.bundled.wording import Wording

VISION_SIZE, VISION_LAYERS, VISION_INTERMEDIATE = 256, 6, 768
RANK = 16
"""Tower, projector and adapters: 9.5 million weights, 19 MB in half precision."""

LanguageModel = tuple[PreTrainedTokenizerFast, transformers.LlamaForCausalLM]

# What SmolLM2 was tuned to answer, without its system message.
START, END = "<|im_start|>", "<|im_end|>"
WORDING = Wording(
    first=f"{START}user\n",
    image=f"image {{}} {IMAGE}\n",
    question=f"{{}}{END}\n{START}assistant\n",
    answer=f"{{}}{END}",
    again=f"\n{START}user\n",
)
CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {%- set pictures.count = pictures.count + 1 %}
                {{- 'image ' ~ pictures.count ~ ' <image>\\n' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# A proposal for an hour of one H200 or less: it has not been run.
STAGES = (
    Stage("tower", 6000, 64, 144, False, 1.0, 1.0, 0.1),
    Stage("answers", 4000, 64, 144, True, 0.0, 0.6, 0.5),
    Stage("both", 7000, 64, 144, True, 0.3, 0.5, 0.05),
    Stage("whole", 1000, 32, NUM_PATCHES, True, 0.1, 0.05, 0.002),
)
RATES = Rates(matrix=2e-3, other=1.5e-3, adapter=1e-3)


def small(load: Callable[[], LanguageModel] = smollm2.load) -> Size:
    """Returns the size.

    Args:
        load: Gives the language model and its tokenizer, which has `<image>`.
    """

    def make(
        seed: int,
    ) -> tuple[PreTrainedTokenizerFast, transformers.LlavaForConditionalGeneration]:
        tokenizer, language_model = load()
        tokenizer.chat_template = CHAT_TEMPLATE
        tower = tower_config(VISION_SIZE, VISION_LAYERS, VISION_INTERMEDIATE)
        config = llava_config(tower, language_model.config, tokenizer)
        model = make_model(config, seed)
        model.model.language_model.load_state_dict(language_model.model.state_dict())
        model.lm_head.load_state_dict(language_model.lm_head.state_dict())
        model.lm_head.requires_grad_(False)
        adapters.add(model.model.language_model, RANK)
        return tokenizer, model

    return Size(
        "small",
        make,
        finish=adapters.merge,
        wording=WORDING,
        stages=STAGES,
        rates=RATES,
        points=False,
        wants_gpu=True,
    )
