"""The size *small* around SmolLM2 itself, where its package is installed."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import small_checks

from benchmarks.training import export, smollm2
from benchmarks.training.evaluate import make_engine, questions
from benchmarks.training.schedule import Stage
from benchmarks.training.small import small
from benchmarks.training.train import CHECKPOINT, Trainer
from vllm_avl.bundled.samples import TASKS

# Looked for, not imported: the weights' package imports a tool that need not be there.
if missing := [name for name in smollm2.NEEDED if find_spec(name) is None]:
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)

KEPT, ROWS = 12, 2
STAGES = (
    Stage("tower", 30, ROWS, KEPT, False, 1.0, 1.0, 1.0),
    Stage("answers", 16, ROWS, KEPT, True, 0.0, 2.0, 2.0),
    Stage("both", 6, ROWS, KEPT, True, 0.3, 2.0, 2.0),
)


@pytest.fixture(scope="module")
def language_model():
    """Tokenizer and model, read once: that takes a minute."""
    return smollm2.load()


@pytest.fixture(scope="module")
def overfitted(language_model, tmp_path_factory):
    """A trainer and its losses on the batch that it saw in every step of a stage."""
    size = replace(small(lambda: language_model), stages=STAGES)
    trainer = Trainer(tmp_path_factory.mktemp("run"), 0, size=size)
    losses: dict[str, list[float]] = {}
    batch = trainer.batches.held_out("vqa", ROWS, KEPT)
    for stage in STAGES:
        for _ in range(stage.steps):
            shown = trainer.train_step(batch)
            trainer.log(**shown)
            loss = shown["answers"] if stage.answers else sum(shown.values())
            losses.setdefault(stage.name, []).append(loss)
    trainer.save()
    return trainer, losses


def test_the_copy_answers_a_question(language_model):
    tokenizer, model = language_model
    prompt = small().wording.prompt("What is the capital of France?", 0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, do_sample=False, max_new_tokens=16)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])


@pytest.mark.parametrize("task", TASKS)
def test_training_reads_the_tokens_of_the_whole_prompt(language_model, task):
    small_checks.check_pieces(language_model[0], task)


def test_the_loss_on_a_batch_falls_in_every_stage(overfitted):
    _, losses = overfitted
    assert losses["tower"][-1] < losses["tower"][0] / 2
    assert losses["answers"][-1] < losses["answers"][0] / 2
    assert losses["both"][-1] < losses["answers"][-1]


def test_what_is_trained_is_what_the_card_says(overfitted):
    trainer, _ = overfitted
    llava = trainer.learner.llava
    trained = [w.numel() for w in llava.parameters() if w.requires_grad]
    assert sum(trained) == small_checks.NUM_WEIGHTS


@pytest.mark.parametrize("avl", [None, {"store_ratio": 0.9}], ids=["stock", "avl"])
def test_vllm_gives_the_tokens_of_transformers(exported, avl):
    folder, asked, expected = exported
    llm = make_engine(folder, avl)
    try:
        given = small_checks.vllm_tokens(llm, asked, 8)
    finally:
        llm.llm_engine.engine_core.shutdown()
    if avl is None:
        assert given == expected
    # Eviction begins behind the first token.
    assert [tokens[0] for tokens in given] == [tokens[0] for tokens in expected]


@pytest.fixture(scope="module")
def exported(overfitted, tmp_path_factory):
    trainer, _ = overfitted
    folder = tmp_path_factory.mktemp("exported")
    export.export(trainer.out_dir / CHECKPOINT, folder, trainer.size)
    asked = [*questions("vqa", 2), *questions("doc", 1), *questions("two_turn", 1)]
    return folder, asked, small_checks.transformers_tokens(folder, asked, 8)
