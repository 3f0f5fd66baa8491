"""The scores on cases whose value is known."""

import shutil

import pytest

from benchmarks.training import metrics


def test_exact_match_ignores_case_and_spaces():
    assert metrics.exact_match(["KOLA", " 12 ", "x"], ["kola", "12", "y"]) == [
        100,
        100,
        0,
    ]


def test_anls_of_one_wrong_letter_in_four():
    assert metrics.anls(["KOLE"], ["KOLA"]) == [pytest.approx(75)]


def test_anls_is_zero_from_half_wrong_on():
    assert metrics.anls(["KOXY"], ["KOLA"]) == [0]


@pytest.mark.parametrize("java", [False, True])
def test_cider_of_the_reference_itself_is_ten(monkeypatch, java):
    if java and not shutil.which("java"):
        pytest.skip("no java")
    if not java:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    texts = ["a red circle at the top left.", "a blue square below, a green star."]
    assert metrics.cider(texts, [[t] for t in texts]) == pytest.approx([1000] * 2)


def test_cider_of_another_picture_is_low(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    texts = ["one red circle here now", "two blue squares there then"]
    assert metrics.cider(texts[::-1], [[t] for t in texts]) == pytest.approx([0] * 2)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "anls", None)
    with pytest.raises(SystemExit, match="pip install --no-deps anls"):
        metrics.anls(["a"], ["a"])
