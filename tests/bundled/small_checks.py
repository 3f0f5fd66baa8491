"""What is asserted of the size *small*, whatever language model is inside."""

from pathlib import Path

import torch
import transformers

from benchmarks.training.batches import IGNORED, BatchMaker
from benchmarks.training.evaluate import Question
from benchmarks.training.small import WORDING
from vllm_avl.bundled.picture import NUM_PATCHES
from vllm_avl.bundled.samples import make_sample

NUM_WEIGHTS = 9_513_600


@torch.no_grad()
def transformers_tokens(folder: Path, asked: list[Question], count: int) -> list[list]:
    """Returns greedy tokens of a folder's own model and processor, in fp32."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    )
    answers = []
    for question in asked:
        request = question.request(processor.tokenizer)
        inputs = processor(
            text=request["prompt"],
            images=question.images or None,
            add_special_tokens=False,
            return_tensors="pt",
        )
        images = inputs.input_ids == model.config.image_token_index
        assert int(images.sum()) == NUM_PATCHES * len(question.images)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=count)
        answers.append(output[0, inputs.input_ids.shape[1] :].tolist())
    return answers


def vllm_tokens(llm, asked: list[Question], count: int) -> list[list]:
    """Returns vLLM's greedy tokens."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count)
    requests = [question.request(llm.get_tokenizer()) for question in asked]
    outputs = llm.generate(requests, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_pieces(tokenizer, task):
    """Compares the batch of a chat of several turns with one call of the tokenizer."""
    maker = BatchMaker(tokenizer, 0, wording=WORDING, points=False)
    for seed in range(5):
        sample = make_sample(task, "train", seed, 3)
        pieces = maker._ids(WORDING.prefix(len(sample.pictures)))
        ids, due, _ = maker._turns(sample)
        asked = [turn for turn in sample.turns if turn[0] in tokenizer.decode(ids)]
        text = WORDING.prompt(asked[-1][0], len(sample.pictures), asked[:-1])
        text += WORDING.answer.format(asked[-1][1])
        assert [*pieces, *ids] == maker._ids(text)
        answers = tokenizer.decode([token for token in due if token != IGNORED])
        assert answers == "".join(WORDING.answer.format(a) for _, a in asked)
