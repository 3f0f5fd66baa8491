"""LoRA adapters: adaptive requests answer through theirs, in one batch with others."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration
from vllm.lora.request import LoRARequest

from vllm_avl.testing.engine import Ask, Engine

ASKS = [Ask((1,), "What is it?", 20), Ask((2, 3), "Compare the two.", 20)]


@pytest.fixture(scope="module")
def adapter(checkpoints, tmp_path_factory):
    model = LlavaForConditionalGeneration.from_pretrained(checkpoints("llava"))
    config = LoraConfig(
        r=8,
        lora_alpha=64,
        target_modules=r".*language_model.*\.(q_proj|v_proj|o_proj)",
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora")
    get_peft_model(model, config).save_pretrained(path)
    return LoRARequest("strong", 1, str(path))


def ask(engine, asks, adapters):
    outputs = engine.llm.generate(
        [engine.prompt(ask) for ask in asks],
        [ask.params() for ask in asks],
        lora_request=adapters,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_adapters(checkpoints, adapter, ratio):
    options = {"enable_lora": True, "max_lora_rank": 8}
    ours = Engine(checkpoints("llava"), avl={"vision_store_ratio": ratio}, **options)
    with_adapter = ask(ours, ASKS, [adapter, adapter])
    without = ask(ours, ASKS, [None, None])
    assert with_adapter != without
    mixed = ask(ours, ASKS * 2, [adapter, None, None, adapter])
    assert mixed == [with_adapter[0], without[1], without[0], with_adapter[1]]
    ours.shutdown()
    if ratio == 1.0:
        stock = Engine(checkpoints("llava"), avl=None, **options)
        assert ask(stock, ASKS, [adapter, adapter]) == with_adapter
        stock.shutdown()
