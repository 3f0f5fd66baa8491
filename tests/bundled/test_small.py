"""The size *small* around a random Llama: what is trained, kept, merged and served."""

from dataclasses import replace

import pytest
import small_checks
import stand_in
import torch
import transformers

from benchmarks.training import adapters, export, prefetch, smollm2
from benchmarks.training.architecture import llava_config, tower_config
from benchmarks.training.batches import IGNORED, BatchMaker
from benchmarks.training.evaluate import ALL_TASKS, CONTROLS, make_engine, questions
from benchmarks.training.schedule import Stage
from benchmarks.training.small import (
    RANK,
    VISION_INTERMEDIATE,
    VISION_LAYERS,
    VISION_SIZE,
    WORDING,
    small,
)
from benchmarks.training.train import CHECKPOINT, Trainer
from benchmarks.training.trained import trained_state
from vllm_avl.bundled.picture import NUM_PATCHES
from vllm_avl.bundled.samples import TASKS
from vllm_avl.bundled.tokens import IMAGE, make_tokenizer, prompt

STAGES = (
    Stage("tower", 1, 2, 24, False, 1.0, 1.0, 0.5),
    Stage("answers", 2, 2, 24, True, 0.0, 0.5, 0.5),
    Stage("both", 2, 2, 24, True, 0.3, 0.5, 0.1),
)
SIZE = replace(small(stand_in.load), stages=STAGES)
LIMIT = 20_000_000


def trainer(folder):
    return Trainer(folder, 0, size=SIZE)


def weights(module):
    return torch.cat([w.flatten() for w in trained_state(module).values()])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of all stages, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    whole = trainer(folder)
    for _ in range(5):
        whole.train_step()
    whole.save()
    return whole


def test_what_we_add_to_smollm2_is_at_most_20_mb_in_half_precision():
    smollm2_config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    tower = tower_config(VISION_SIZE, VISION_LAYERS, VISION_INTERMEDIATE)
    tokenizer, _ = stand_in.load()
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            llava_config(tower, smollm2_config, tokenizer)
        )
        adapters.add(model.model.language_model, RANK)
    model.lm_head.requires_grad_(False)
    count = sum(weight.numel() for weight in trained_state(model).values())
    assert count == small_checks.NUM_WEIGHTS
    assert 2 * count <= LIMIT


def test_a_resumed_run_equals_one_without_a_stop(tmp_path, run):
    stopped = trainer(tmp_path)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = trainer(tmp_path)
    for _ in range(2):
        resumed.train_step()
    assert resumed.step == run.step
    assert torch.equal(weights(resumed.learner), weights(run.learner))
    assert not torch.equal(
        weights(trainer(tmp_path / "new").learner), weights(run.learner)
    )


def test_training_leaves_the_language_model_as_it_was(run):
    _, language_model = stand_in.load()
    now = run.learner.llava.model.language_model.state_dict()
    for name, weight in language_model.model.state_dict().items():
        owner, _, kind = name.rpartition(".")
        same = now.get(name, now.get(f"{owner}.base_layer.{kind}"))
        assert torch.equal(same, weight), name


def test_the_checkpoint_holds_what_is_ours_and_no_more(run):
    state = torch.load(run.out_dir / CHECKPOINT, weights_only=True)
    parts = {
        "llava.model.vision_tower.",
        "llava.model.multi_modal_projector.",
        "heads.",
        "llava.model.language_model.layers.",
    }
    used = set()
    for name in state["learner"]:
        (part,) = [part for part in parts if name.startswith(part)]
        used.add(part)
        assert "language_model" not in name or adapters.is_adapter(name)
    assert used == parts
    optimized = sum(
        tensor.numel()
        for optimizer in state["optimizers"]
        for buffers in optimizer["state"].values()
        for tensor in buffers.values()
    )
    assert optimized < 2.1 * len(weights(run.learner))


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    Trainer(tmp_path, 0).save()
    with pytest.raises(ValueError, match="size=small must be tiny"):
        trainer(tmp_path)


def test_a_checkpoint_that_names_no_size_is_of_tiny(tmp_path):
    tiny = Trainer(tmp_path, 0)
    tiny.step = 7
    tiny.save()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["size"]
    torch.save(state, tmp_path / CHECKPOINT)
    assert Trainer(tmp_path, 0).step == 7


def test_new_adapters_change_nothing_and_merged_ones_stay_what_they_were():
    tokenizer, language_model = stand_in.load()
    ids = torch.tensor([tokenizer("what color is it?").input_ids])
    with torch.no_grad():
        plain = language_model(ids).logits
        adapters.add(language_model.model, RANK)
        assert torch.equal(language_model(ids).logits, plain)
        for name, weight in trained_state(language_model.model).items():
            assert adapters.is_adapter(name)
            weight.normal_(0, 0.1)
        adapted = language_model(ids).logits
        adapters.merge(language_model)
        merged = language_model(ids).logits
    assert (adapted - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert language_model.state_dict().keys() == stand_in.load()[1].state_dict().keys()


def test_all_patches_give_what_llava_gives(run):
    batch = run.batches.held_out("multi", 1)
    with torch.no_grad():
        ours = run.learner.answer_logits(run.learner.look(batch), batch)
    image = run.batches.tokenizer.convert_tokens_to_ids(IMAGE)
    prefix = [
        token
        for token in batch.prefix.tolist()
        for _ in range(NUM_PATCHES if token == image else 1)
    ]
    length = int((batch.targets[0] != IGNORED).nonzero()[-1]) + 1
    ids = torch.tensor([[*prefix, *batch.text[0, :length].tolist()]])
    with torch.no_grad():
        theirs = run.learner.llava(input_ids=ids, pixel_values=batch.pixels[0])
    torch.testing.assert_close(
        ours[0, :length], theirs.logits[0, -length:], atol=1e-4, rtol=1e-4
    )


def test_the_projector_starts_at_the_spread_of_the_embeddings(tmp_path):
    begun = trainer(tmp_path)
    embedding = begun.learner.llava.model.language_model.embed_tokens.weight
    before = embedding.clone()
    batch = begun.batches.train(0, 16, 60, text=False)
    begun.learner.spread(batch)
    with torch.no_grad():
        features = begun.learner.look(batch).flatten(0, 1)
        shown = begun.learner.llava.model.multi_modal_projector(features)
    assert torch.equal(embedding, before)
    assert shown.std() == pytest.approx(before.std().item(), rel=0.1)


IMAGES = {0: [], 1: [{"type": "image"}], 2: [{"type": "image"}] * 2}


@pytest.mark.parametrize("num_images", IMAGES)
def test_a_prompt_equals_the_chat_template(num_images):
    tokenizer, _ = SIZE.make(0)
    turns = [
        {
            "role": "user",
            "content": [*IMAGES[num_images], {"type": "text", "text": "what is it?"}],
        },
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and?"},
    ]
    for earlier, last, shown in (
        ([("what is it?", "red")], "and?", turns),
        ([], "what is it?", turns[:1]),
    ):
        assert WORDING.prompt(last, num_images, earlier) == (
            tokenizer.apply_chat_template(
                shown, tokenize=False, add_generation_prompt=True
            )
        )


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("control", CONTROLS)
def test_evaluation_asks_tiny_what_its_wording_says(task, control):
    tokenizer = make_tokenizer()
    for question in questions(task, 4, control):
        worded = prompt(question.text, len(question.images), question.earlier)
        assert question.request(tokenizer)["prompt"] == worded


@pytest.mark.parametrize("task", TASKS)
def test_training_reads_the_tokens_of_the_whole_prompt(run, task):
    small_checks.check_pieces(run.batches.tokenizer, task)


def test_batches_made_ahead_are_those_of_their_steps():
    maker = BatchMaker(make_tokenizer(), 0)
    steps = prefetch.Steps(maker, STAGES)
    for first, again in zip(
        prefetch.batches(steps, 0, 4, workers=1),
        prefetch.batches(steps, 0, 4, workers=0),
        strict=True,
    ):
        assert torch.equal(first.pixels, again.pixels)
        assert torch.equal(first.text, again.text)
        assert first.tasks == again.tasks


def test_a_missing_package_is_named_in_one_line(monkeypatch):
    monkeypatch.setattr(smollm2, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(SystemExit, match=r"needs no_such_package: pip install .+$"):
        smollm2.require()


def test_stock_vllm_serves_the_exported_folder(tmp_path, run):
    export.export(run.out_dir / CHECKPOINT, tmp_path, SIZE)
    asked = [
        *questions("vqa", 2),
        *questions("multi", 1),
        *questions("ocr", 1, "blind"),
    ]
    expected = small_checks.transformers_tokens(tmp_path, asked, 8)
    assert len({tuple(tokens) for tokens in expected}) > 1
    llm = make_engine(tmp_path, None)
    try:
        assert small_checks.vllm_tokens(llm, asked, 8) == expected
    finally:
        llm.llm_engine.engine_core.shutdown()
