"""Writes the ten fixed questions: `python tests/bundled/make_questions.py`.

They are held-out questions of all tasks that the weights answer rightly, so that a test
notices when weights, vLLM or this package begin to answer otherwise.
"""

import json
from pathlib import Path

from benchmarks.training.evaluate import Question, answer, make_engine, questions
from vllm_avl.bundled import WEIGHTS

CASES = Path(__file__).parent / "questions"
COUNTS = {"caption": 1, "vqa": 3, "doc": 2, "ocr": 2, "multi": 1, "two_turn": 1}
CANDIDATES = 40


def main() -> None:
    """Replaces the questions by ones that the weights answer rightly."""
    llm = make_engine(WEIGHTS, None)
    CASES.mkdir(exist_ok=True)
    rows: list[dict[str, object]] = []
    for task, count in COUNTS.items():
        asked = questions(task, CANDIDATES)
        given = answer(llm, asked, task)
        right = [
            question
            for question, text in zip(asked, given, strict=True)
            if text == question.truths[0]
        ]
        if len(right) < count:
            raise SystemExit(f"{task}: {len(right)} right of {CANDIDATES}")
        rows += [
            _written(task, n, question) for n, question in enumerate(right[:count])
        ]
    (CASES / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")


def _written(task: str, number: int, question: Question) -> dict[str, object]:
    names = []
    for place, image in enumerate(question.images):
        names.append(f"{task}-{number}-{place}.png")
        image.save(CASES / names[-1])
    return {
        "images": names,
        "question": question.text,
        "answer": question.truths[0],
        "earlier": question.earlier,
    }


if __name__ == "__main__":
    main()
