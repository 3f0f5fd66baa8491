"""The generator: the same for a seed, and nothing held out is ever trained on."""

import numpy as np
import pytest

from vllm_avl.bundled import documents, scenes, sheets
from vllm_avl.bundled.glyphs import FACES, NUM_VARIANTS, choose_face, glyph
from vllm_avl.bundled.samples import TASKS, VQA_SHARES, make_sample
from vllm_avl.bundled.splits import SPLITS, split_of
from vllm_avl.bundled.words import number, word

COUNT = 60


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_is_the_same_for_its_seed(task, split):
    first, again = (make_sample(task, split, 7, 3) for _ in range(2))
    assert first.turns == again.turns
    for one, other in zip(first.images(), again.images(), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_seeds_differ():
    assert make_sample("ocr", "test", 1).turns != make_sample("ocr", "test", 2).turns


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task='poem'"):
        make_sample("poem", "train", 0)


def test_words_and_numbers_of_the_splits_are_disjoint():
    rng = np.random.default_rng(0)
    seen = {
        split: {word(rng, split) for _ in range(2000)}
        | {number(rng, split, 4) for _ in range(2000)}
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"]


def test_faces_and_layouts_of_the_splits_are_disjoint():
    assert not set(FACES["train"]) & set(FACES["test"])
    assert not set(documents.LAYOUTS["train"]) & set(documents.LAYOUTS["test"])


def test_only_training_faces_vary():
    rng = np.random.default_rng(0)
    for split in SPLITS:
        chosen = {choose_face(rng, split) for _ in range(4000)}
        assert {face.partition("+")[0] for face in chosen} == set(FACES[split])
        every = 1 + NUM_VARIANTS if split == "train" else 1
        assert len(chosen) == len(FACES[split]) * every


def test_a_variant_is_another_shape_and_the_same_each_time():
    plain = glyph("DejaVuSans", "R", 8, 16)
    glyph.cache_clear()
    varied = [glyph(f"DejaVuSans+{n}", "R", 8, 16) for n in range(1, NUM_VARIANTS + 1)]
    for one in varied:
        assert np.abs(one - plain).mean() > 0.01
        assert 0.3 < one.sum() / plain.sum() < 2
    glyph.cache_clear()
    assert np.array_equal(glyph("DejaVuSans+1", "R", 8, 16), varied[0])


@pytest.mark.parametrize("task", ["ocr", "doc"])
def test_long_answers_are_of_their_split(task):
    for split in SPLITS:
        for seed in range(COUNT):
            for _, answer in make_sample(task, split, seed, 3).turns:
                if answer.isalnum() and len(answer) > 3:
                    assert split_of(answer) == split


def test_every_held_out_scene_has_a_pair_never_trained_on():
    for seed in range(COUNT):
        for split in SPLITS:
            rng = np.random.default_rng(seed)
            _, things = scenes.draw_scene(rng, split, 3, 5)
            held_out = [t for t in things if split_of(t.name) == "test"]
            assert bool(held_out) == (split == "test")


def test_yes_and_no_are_balanced_in_every_kind_of_question():
    rng = np.random.default_rng(0)
    for kind in ("exists", "relation", "more"):
        answers = []
        for _ in range(400):
            _, things = scenes.draw_scene(rng, "test", 3, 5)
            turn = scenes.ask(rng, things, kind)
            answers += [turn[1]] if turn else []
        assert 0.4 < answers.count("yes") / len(answers) < 0.6, kind


def test_the_shares_of_question_kinds_are_whole():
    assert sum(VQA_SHARES.values()) == pytest.approx(1)
    assert set(VQA_SHARES) == set(scenes.QUESTIONS)


def test_a_caption_names_every_object_in_40_to_80_tokens():
    lengths = []
    for seed in range(COUNT):
        sample = make_sample("caption", "test", seed)
        lengths.append(len(sample.turns[0][1].replace(",", " ,").split()) + 1)
    assert min(lengths) >= 35
    assert max(lengths) <= 80


def test_labels_say_what_is_drawn():
    rng = np.random.default_rng(3)
    picture, prints = sheets.draw_sheet(rng, "train", 3, 3)
    shown = picture.labels["character"] > 0
    assert shown.sum() >= sum(2 * len(p.text) for p in prints)
    assert picture.shown[shown].all()
    assert not picture.shown.all()
