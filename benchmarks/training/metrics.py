"""Scores of answers, one each, from the libraries that published results use."""

import importlib
import shutil
import sys
from collections.abc import Sequence

MISSING = "{what} needs the package {package}: pip install --no-deps {package}"


def exact_match(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """Returns 100 for each answer that equals the truth but for spaces and case.

    With one truth a question, as here, VQA accuracy is the mean of this.
    """
    return [
        100.0 * (_normal(answer) == _normal(truth))
        for answer, truth in zip(answers, truths, strict=True)
    ]


def anls(answers: Sequence[str], truths: Sequence[str]) -> list[float]:
    """Returns each normalised Levenshtein similarity, times 100 (package `anls`)."""
    anls_score = _module("anls", "ANLS", "anls").anls_score
    return [
        100 * anls_score(prediction=answer, gold_labels=[truth])
        for answer, truth in zip(answers, truths, strict=True)
    ]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns each caption's CIDEr as pycocoevalcap computes it, times 100.

    Without Java its PTB tokenizer does not run: the captions are then split at spaces
    with punctuation taken off, and a message says so. CIDEr itself is Python.
    """
    module = _module("pycocoevalcap.cider.cider", "CIDEr", "pycocoevalcap")
    truths = {str(n): list(texts) for n, texts in enumerate(references)}
    given = {str(n): [text] for n, text in enumerate(captions)}
    _, scores = module.Cider().compute_score(_tokenized(truths), _tokenized(given))
    return (100 * scores).tolist()


def _tokenized(texts: dict[str, list[str]]) -> dict[str, list[str]]:
    if shutil.which("java"):
        name = "pycocoevalcap.tokenizer.ptbtokenizer"
        tokenizer = _module(name, "CIDEr", "pycocoevalcap").PTBTokenizer()
        return tokenizer.tokenize(
            {n: [{"caption": t} for t in given] for n, given in texts.items()}
        )
    print("no java: captions are split at spaces, not by PTB", file=sys.stderr)
    return {
        n: [" ".join(w.strip(".,:;?!") for w in t.lower().split()) for t in given]
        for n, given in texts.items()
    }


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _module(name: str, what: str, package: str):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(MISSING.format(what=what, package=package)) from error
