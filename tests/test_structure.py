"""How modules depend on each other."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLAIN = (
    "vllm_avl/plan.py",
    "vllm_avl/config.py",
    "vllm_avl/support.py",
    "vllm_avl/drafters.py",
)
MOST_LINES = 400


def modules():
    """Paths of the package's modules by name; kernels lie beside it."""
    found = {}
    for path in [*ROOT.glob("vllm_avl/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("vllm_avl", *parts) if parts[0] == "kernels" else parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join(parts)] = path
    return found


MODULES = modules()


def imported(path):
    """Names that a file imports, in functions, too; not those for types alone."""
    tree = ast.parse(path.read_text())
    for node in list(ast.walk(tree)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        name: {other for other in imported(path) if other in MODULES} - {name}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_knows_nothing_of_vllm():
    paths = [*map(ROOT.joinpath, PLAIN), *ROOT.glob("kernels/**/*.py")]
    for path in paths:
        found = {name for name in imported(path) if name.split(".")[0] == "vllm"}
        assert not found, path


def test_the_package_imports_without_vllm():
    shows = "import sys, vllm_avl; print('vllm' in sys.modules, 'torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", shows], capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["False", "False"]


def test_modules_are_short():
    lines = sorted(len(path.read_text().splitlines()) for path in MODULES.values())
    assert lines[len(lines) // 2] <= 110
    assert lines[-1] <= MOST_LINES
