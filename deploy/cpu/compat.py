"""Make an environment with another vLLM's Python over the CPU build in .venv.

    python deploy/cpu/compat.py VERSION

Only some versions of vLLM have a CPU build on PyPI. This unpacks the Python of vLLM's
wheel of VERSION into .compat/VERSION, a virtual environment that finds all else in
.venv, the compiled CPU extension included. It prints its interpreter. Exit status 3:
the wheel cannot be had.

What runs there is VERSION's Python and nothing else of it: a smoke test, no build.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = ROOT / ".venv"
HOME = ROOT / ".compat"
NO_WHEEL = 3
SECONDS_TO_DOWNLOAD = 300
COMPILED = re.compile(r"(\.(so|cu|cuh|h|hpp|inl)|/vllm-rs)$")
"""Of the wheel's files those that an interpreter without a GPU has no use for."""


def main() -> None:
    """Make the environment unless it is there."""
    (version,) = sys.argv[1:]
    HOME.mkdir(exist_ok=True)
    with open(HOME / f"{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = HOME / version
        stamp = environment / ".complete"
        if not stamp.exists():
            shutil.rmtree(environment, ignore_errors=True)
            make(environment, version)
            stamp.touch()
    print(environment / "bin" / "python")


def make(environment: Path, version: str) -> None:
    """Make a virtual environment whose vLLM is that of `version`."""
    python = BASE / "bin" / "python"
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        wheel = download(version, Path(folder), python)
        run(python, "-m", "venv", "--without-pip", environment)
        site = site_packages(environment)
        unpack(wheel, site)
    rename(site, version)
    base_site = site_packages(BASE)
    for compiled in (base_site / "vllm").glob("*.so"):
        (site / "vllm" / compiled.name).symlink_to(compiled)
    # Behind this environment's own packages, with the start-up hooks of that one.
    (site / "base.pth").write_text(
        f"import site; site.addsitedir({str(base_site)!r})\n"
    )


def download(version: str, folder: Path, python: Path) -> Path:
    """Return the wheel, or end with the status that says there is none."""
    options = ("--no-deps", "--only-binary=:all:", "--quiet", "--dest", folder)
    try:
        run(python, "-m", "pip", "download", *options, f"vllm=={version}")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"compat: pip cannot download vllm=={version}: {error}", file=sys.stderr)
        raise SystemExit(NO_WHEEL) from None
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def run(*command: object) -> None:
    """Run a command; what it prints is for the eyes only."""
    subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=sys.stderr,
        timeout=SECONDS_TO_DOWNLOAD,
    )


def site_packages(environment: Path) -> Path:
    """Where an environment has its packages."""
    (site,) = environment.glob("lib/python3.*/site-packages")
    return site


def unpack(wheel: Path, site: Path) -> None:
    """Unpack what an interpreter without a GPU can use."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            site, (name for name in archive.namelist() if not COMPILED.search(name))
        )


def rename(site: Path, version: str) -> None:
    """Say that this is a CPU build: vLLM looks for its platform there."""
    (info,) = site.glob("vllm-*.dist-info")
    (info / "RECORD").unlink()
    metadata = info / "METADATA"
    text = metadata.read_text()
    metadata.write_text(
        text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
    )
    info.rename(site / f"vllm-{version}+cpu.dist-info")


if __name__ == "__main__":
    main()
