"""What documents say of figures, files and names is so."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import preloaded
import pytest

from vllm_avl.config import ARGUMENT, SWITCH, AVLConfig, RequestSettings
from vllm_avl.metrics.definitions import COUNTERS, GAUGES, PREFIX
from vllm_avl.plan import make_plan

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "docs" / "method.md"
PROMPT = 600
"""5 text tokens, 576 vision tokens and 19 text tokens."""


def test_the_worked_example_of_text_eviction():
    plan = make_plan(PROMPT, ((5, 581),), 32, AVLConfig(text_keep_ratio=0.7))
    window = plan.text_window

    def first_with(num_blocks):
        """Text tokens, and the window, when that many blocks have gone."""
        num_tokens = PROMPT
        while plan.num_evicted_text_blocks(num_tokens) < num_blocks:
            num_tokens += 1
        num_text = plan.num_text_tokens(num_tokens)
        return num_text, window.size(num_text)

    at_first = plan.num_text_tokens(PROMPT)
    (n, size), second, third = map(first_with, (1, 2, 3))
    expected = (
        f"At the end of the prompt n = {at_first} and R = {window.size(at_first)}. "
        f"At n = {n}, after t = {n - at_first}, R is {size}, of which "
        f"{window.num_recent(n)} are recent; "
        f"the first 32 rows leave, and {n - 32} stay. "
        f"The next blocks go at n = {second[0]} (R = {second[1]}) and "
        f"n = {third[0]} (R = {third[1]})."
    )
    assert expected in " ".join(METHOD.read_text().split())


def test_every_metric_is_in_the_table():
    rows = (ROOT / "docs" / "observing.md").read_text().splitlines()
    for kind, metrics in (("counter", COUNTERS), ("gauge", GAUGES)):
        for metric in metrics:
            assert f"| `{PREFIX}{metric.name}` | {kind} | {metric.help} |" in rows


def test_every_setting_is_in_its_document():
    document = (ROOT / "docs" / "settings.md").read_text()
    own = [f"{ARGUMENT}{name}" for name in RequestSettings.model_fields]
    for name in [*AVLConfig.model_fields, SWITCH, *own]:
        assert f"| `{name}` |" in document


def test_what_blocks_of_a_size_bring():
    script = ROOT / "benchmarks" / "planned.py"
    done = preloaded.run([sys.executable, script], 100)
    assert done.returncode == 0, done.stderr
    assert done.stdout in (ROOT / "docs" / "hybrids.md").read_text()


SOURCES = ("vllm_avl", "kernels", "benchmarks", "tests", "deploy", ".ci")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FILE = re.compile(r"`([\w./-]+\.(?:py|sh|yaml|json|csv|toml))`")
NAME = re.compile(r"`(?:\w+\.)*(\w*[a-z]_[a-z]\w*|(?<=\.)[a-z]\w*)(?:\(\))?`")
"""What has an underscore, or follows a dot."""
ELSEWHERE = {"values.schema.json"}
"""Of the production stack's chart."""


@pytest.fixture(scope="module")
def sources():
    """Texts of all files of the repository but documents and data, by path."""
    files = [ROOT / "pyproject.toml", ROOT / "Makefile"]
    for folder in SOURCES:
        files += (ROOT / folder).rglob("*")
    ends = (".py", ".sh", ".yaml", ".yml", ".json", ".js", ".toml", "", ".cpu", ".csv")
    return {
        f"/{file.relative_to(ROOT).as_posix()}": file.read_text()
        for file in files
        if file.is_file() and file.suffix in ends and "__pycache__" not in file.parts
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_in_documents_exist(document, sources):
    """In the repository, in vLLM, or written by one of our programs."""
    vllm = Path(find_spec("vllm").origin).parent
    text = "".join(sources.values())
    for name in set(FILE.findall(document.read_text())) - ELSEWHERE:
        is_ours = any(path.endswith(f"/{name.lstrip('/')}") for path in sources)
        is_written = name in text
        is_vllms = not is_ours and not is_written and any(vllm.rglob(name))
        assert is_ours or is_written or is_vllms, name


@pytest.fixture(scope="module")
def words(sources):
    """Every word of the repository's sources, and of vLLM's configuration."""
    vllm = Path(find_spec("vllm").origin).parent
    texts = [*sources.values(), *(p.read_text() for p in vllm.glob("config/*.py"))]
    return {word for text in texts for word in re.findall(r"\w+", text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_in_documents_exist(document, words):
    prose = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    names = {name.removeprefix(PREFIX) for name in NAME.findall(prose)}
    assert not names - words


def test_every_feature_that_is_claimed_or_refused_names_its_test():
    rows = (ROOT / "README.md").read_text().split("| feature |")[1].split("\n\n")[0]
    named = {}
    for row in rows.splitlines()[2:]:
        feature, cpu, cuda, how = (cell.strip() for cell in row.split("|")[1:-1])
        if any(cell.startswith(("works", "refused")) for cell in (cpu, cuda)):
            named[feature] = re.findall(r"`tests/\w+/(test_\w+)\.py`", how)
    assert len(named) > 15
    assert all(named.values()), [feature for feature in named if not named[feature]]
