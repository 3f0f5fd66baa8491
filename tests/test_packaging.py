"""The wheel: everything of ours, under our name only."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel(tmp_path):
    source = tmp_path / "source"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests")
    shutil.copytree(ROOT, source, ignore=hidden)
    command = ["-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run(
        [sys.executable, *command, str(source)], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("vllm_avl", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            assert path.replace("kernels/", "vllm_avl/kernels/") in names
    for file in (ROOT / "vllm_avl" / "front_end" / "static").iterdir():
        assert file.relative_to(ROOT).as_posix() in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vllm_avl"}
    text = zipfile.ZipFile(wheel).read(
        next(name for name in names if name.endswith("entry_points.txt"))
    )
    assert b"avl = vllm_avl.plugin:register" in text
    assert b"avl = vllm_avl.compat.endpoint:AVLEndpoints" in text
