"""Training: resumable to the bit, and the language model's positions are LLaVA's."""

import pytest
import torch

from benchmarks.training import schedule
from benchmarks.training.batches import IGNORED
from benchmarks.training.train import Trainer
from vllm_avl.bundled.glyphs import CHARACTERS
from vllm_avl.bundled.picture import NUM_PATCHES

STAGES = (
    schedule.Stage("tower", 2, 2, 24, False, 1.0, 1.0, 0.5),
    schedule.Stage("answers", 2, 2, 24, True, 0.5, 0.5, 0.1),
)


def weights(trainer):
    return torch.cat([w.detach().flatten() for w in trainer.learner.parameters()])


def test_resumed_training_equals_training_without_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(schedule, "STAGES", STAGES)
    whole = Trainer(tmp_path / "whole", 0)
    start = weights(whole)
    for _ in range(4):
        whole.train_step()
    stopped = Trainer(tmp_path, 0)
    for _ in range(3):
        stopped.train_step()
    stopped.save()
    resumed = Trainer(tmp_path, 0)
    resumed.train_step()
    assert resumed.step == 4
    assert torch.equal(weights(resumed), weights(whole))
    assert not torch.equal(weights(resumed), start)


def test_all_patches_give_what_llava_gives(tmp_path):
    trainer = Trainer(tmp_path, 0)
    batch = trainer.batches.held_out("multi", 2)
    learner, tokenizer = trainer.learner, trainer.batches.tokenizer
    with torch.no_grad():
        ours = learner.answer_logits(learner.look(batch), batch)
    image = tokenizer.convert_tokens_to_ids("<image>")
    prefix = [
        token
        for token in batch.prefix.tolist()
        for _ in range(NUM_PATCHES if token == image else 1)
    ]
    for row in range(2):
        length = int((batch.targets[row] != IGNORED).nonzero()[-1]) + 1
        ids = torch.tensor([[*prefix, *batch.text[row, :length].tolist()]])
        with torch.no_grad():
            theirs = learner.llava(input_ids=ids, pixel_values=batch.pixels[row])
        torch.testing.assert_close(
            ours[row, :length], theirs.logits[0, -length:], atol=1e-4, rtol=1e-4
        )


def test_the_stages_follow_one_another():
    steps = range(sum(stage.steps for stage in schedule.STAGES))
    names = [schedule.stage_at(step, schedule.STAGES)[0].name for step in steps]
    lengths = {stage.name: stage.steps for stage in schedule.STAGES}
    assert names == [name for name, steps in lengths.items() for _ in range(steps)]


def test_in_every_stage_the_rate_rises_from_zero_and_then_falls():
    start = 0
    for stage in schedule.STAGES:
        steps = range(start, start + stage.steps)
        rates = [schedule.stage_at(step, schedule.STAGES)[1] for step in steps]
        top = rates.index(max(rates))
        assert rates[0] < stage.peak / 10
        assert top < schedule.WARM_UP
        assert rates[:top] == sorted(rates[:top])
        assert rates[top:] == sorted(rates[top:], reverse=True)
        assert rates[-1] == pytest.approx(stage.end, rel=0.1)
        start += stage.steps


def test_the_projector_starts_with_features_of_equal_spread(tmp_path):
    trainer = Trainer(tmp_path, 0)
    batch = trainer.batches.train(0, 16, 60, text=False)
    trainer.learner.spread(batch)
    with torch.no_grad():
        features = trainer.learner.look(batch).flatten(0, 1)
        shown = trainer.learner.llava.model.multi_modal_projector(features)
    values = torch.linalg.eigvalsh(shown.T.cov())
    raw = torch.linalg.eigvalsh(features.T.cov())
    assert values[-1] / values[-32] < 2 < raw[-1] / raw[-32]


def test_evidence_is_where_the_answer_stands(tmp_path):
    maker = Trainer(tmp_path, 0).batches
    batch = maker.held_out("doc", 8)
    characters = batch.labels["character"][:, 0]
    for row in range(8):
        due = (batch.targets[row] != IGNORED).nonzero().flatten()[:-1]
        letters = maker.tokenizer.convert_ids_to_tokens(
            batch.targets[row, due].tolist()
        )
        for place, letter in zip(due, letters, strict=True):
            seen = characters[row][batch.evidence[row, place]]
            assert seen.unique().tolist() == [
                CHARACTERS.index(letter.removeprefix("##")) + 1
            ]
