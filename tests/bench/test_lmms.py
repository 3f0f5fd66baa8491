"""The bundled tasks as lmms-eval task files, and the script that runs them."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from benchmarks import lmms
from benchmarks.training.evaluate import ALL_TASKS, questions
from vllm_avl.bundled import WEIGHTS
from vllm_avl.bundled.tokens import prompt

TASKS = Path(__file__).parents[2] / "benchmarks" / "lmms_tasks"


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's `!function` as the name of a function."""


Loader.add_constructor("!function", Loader.construct_scalar)


def load(name):
    return yaml.load((TASKS / name).read_text(), Loader)


@pytest.fixture
def functions(monkeypatch):
    monkeypatch.syspath_prepend(TASKS)
    monkeypatch.delitem(sys.modules, "bundled", raising=False)
    import bundled

    yield bundled
    del sys.modules["bundled"]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_chat_says_what_the_accuracy_table_asks(functions, task):
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    for number, asked in enumerate(questions(task, 3)):
        doc = {"task": task, "number": number}
        messages = functions.messages(doc)
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text == asked.request(tokenizer)["prompt"]
        assert text == prompt(asked.text, len(asked.images), asked.earlier)
        shown = [part["url"] for part in messages[0]["content"] if "url" in part]
        assert [p.tobytes() for p in shown] == [p.tobytes() for p in asked.images]
        assert functions.target(doc) == asked.truths[0]


@pytest.mark.parametrize("task", ALL_TASKS)
def test_right_answers_score_full_and_empty_ones_nothing(functions, task):
    config = load("_bundled_template_yaml") | load(f"avl_{task}.yaml")
    (metric,) = [entry["metric"] for entry in config["metric_list"]]
    assert metric in lmms.METRICS
    assert config["dataset_kwargs"]["data_files"]["test"] == f"{task}.jsonl"
    for key in ("doc_to_messages", "doc_to_target", "process_results"):
        assert hasattr(functions, config[key].removeprefix("bundled."))
    docs = [{"task": task, "number": number} for number in range(3)]
    totals = []
    for answer in (functions.target, lambda doc: ""):
        found = [functions.results(doc, [answer(doc)])[metric] for doc in docs]
        totals.append(functions.cider(found) if task == "caption" else sum(found) / 3)
    right, empty = totals
    # A caption has several references, and CIDEr is the mean over them.
    assert right > 500 if task == "caption" else right == pytest.approx(100)
    assert empty == 0


def test_the_papers_metric_is_picked():
    found = {"alias": "x", "anls,none": 61.5, "anls_stderr,none": 1.5}
    row = lmms.score(found)
    assert row == {"metric": "anls", "score": 61.5, "stderr": 1.5}
    with pytest.raises(SystemExit, match="none of cider"):
        lmms.score({"alias": "x", "bleu,none": 1.0})


def test_an_answer_that_never_came_is_no_wrong_answer(tmp_path):
    """A stand-in for lmms-eval writes what it writes when requests fail."""
    program = tmp_path / "python"
    answers = {"doc_id": 0, "resps": [f"[{lmms.FAILED} after 5 retries] timeout"]}
    program.write_text(f"""#!/bin/sh
mkdir -p answers/m
echo '{{"results": {{}}}}' > answers/m/1_results.json
echo '{json.dumps(answers)}' > answers/m/1_samples_avl_ocr.jsonl
""")
    program.chmod(0o755)
    args = lmms.BENCHMARK.parse(["--python", str(program), "--tasks", "avl_ocr"])
    with pytest.raises(SystemExit, match="requests failed"):
        lmms.ask("http://nowhere", tmp_path, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--python", "/nowhere/python"], "lmms_eval.sh makes it"),
        (["--policies", "h20"], "--policies h20: known are avl"),
    ],
)
def test_what_cannot_run_is_refused_at_once(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        lmms.BENCHMARK.parse(options)
    assert message in capsys.readouterr().err
