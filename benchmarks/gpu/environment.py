"""Makes a Python environment with vLLM and this plug-in, without a network.

    environment.py FOLDER [--bundle DIR] [--wheels DIR]

The machine has PyTorch, Triton and more, in the Python that runs this. A bundle holds
what it lacks, vLLM's wheel for one: an archive of site-packages in pieces, called
*.tar.xz.00 and so on, beside a SHA256SUMS of them. FOLDER becomes a virtual environment
that finds, in this order: this repository's packages, copied; wheels; the bundle; the
machine's own. The last line printed is JSON that says what there is.

Without a bundle and wheels nothing is made: this Python is described, which must have
vLLM and the plug-in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUMS = "SHA256SUMS"
COMPLETE = ".complete"
PACKAGES = ("torch", "triton", "vllm", "vllm-avl", "transformers", "xformers")
VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = "none"
print(json.dumps(found))
"""
VLLM_SCRIPT = """\
#!{python}
import sys
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the environment unless this Python is to be used; describe it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--wheels", type=Path)
    args = parser.parse_args(argv)
    python = python_of(args.folder, args.bundle, args.wheels)
    if args.bundle or args.wheels:
        make(args.folder, args.bundle, args.wheels)
    print(json.dumps(describe(python)))


def python_of(folder: Path, bundle: Path | None, wheels: Path | None) -> Path:
    """Return the interpreter that steps use."""
    return folder / "bin" / "python" if bundle or wheels else Path(sys.executable)


def make(folder: Path, bundle: Path | None, wheels: Path | None) -> None:
    """Make the environment; what was unpacked before is not unpacked again."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (site,) = folder.glob("lib/python3.*/site-packages")
    found = site_packages()
    if bundle:
        found.insert(0, unpack(bundle, folder / "bundle"))
    if wheels:
        found.insert(0, unzip(wheels, folder / "wheels"))
    # Added behind this environment's own, with the start-up hooks of each.
    added = "; ".join(f"site.addsitedir({str(path)!r})" for path in found)
    (site / "others.pth").write_text(f"import site; {added}\n")
    install(ROOT, site)
    install(ROOT / "benchmarks", site)
    # Benchmarks start servers by this name, beside their interpreter.
    script = folder / "bin" / "vllm"
    script.write_text(VLLM_SCRIPT.format(python=folder / "bin" / "python"))
    script.chmod(0o755)


def site_packages() -> list[Path]:
    """Where the Python that runs this has its packages, Debian's included."""
    names = ("site-packages", "dist-packages")
    return [Path(path) for path in sys.path if Path(path).name in names]


def unpack(bundle: Path, target: Path) -> Path:
    """Unpack a bundle whose pieces are all there and whole; return `target`.

    Raises:
        SystemExit: a piece is missing or another one.
    """
    sums = (bundle / SUMS).read_text()
    complete = target / COMPLETE
    if complete.exists() and complete.read_text() == sums:
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    archive = target.with_suffix(".tar.xz")
    with archive.open("wb") as joined:
        for line in sums.splitlines():
            expected, name = line.split()
            piece = bundle / name
            if not piece.exists():
                raise SystemExit(f"{bundle} has no {name}, which {SUMS} names")
            content = piece.read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise SystemExit(f"{piece} is not what {SUMS} says")
            joined.write(content)
    with tarfile.open(archive) as packed:
        packed.extractall(target, filter="data")
    archive.unlink()
    complete.write_text(sums)
    return target


def unzip(wheels: Path, target: Path) -> Path:
    """Unpack the wheels of a folder; return `target`."""
    shutil.rmtree(target, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


def install(project: Path, site: Path) -> None:
    """Copy a project's packages, as setuptools would, and write what names them.

    Copied, because PyPI has a package with the name of a folder of ours: our packages
    must be found under their own names only, and nothing else of the clone.
    """
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    elsewhere = settings["tool"]["setuptools"]["package-dir"]
    for package in settings["tool"]["setuptools"]["packages"]:
        path = package.replace(".", "/")
        source, target = project / elsewhere.get(package, path), site / path
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    write_metadata(settings["project"], site)


def write_metadata(project: Mapping[str, Any], site: Path) -> None:
    """Write the folder in which Python finds a project's version and entry points."""
    stem = project["name"].replace("-", "_")
    info = site / f"{stem}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    names = {"Name": project["name"], "Version": project["version"]}
    lines = [f"{key}: {value}" for key, value in names.items()]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
    entries = []
    for group, targets in project.get("entry-points", {}).items():
        entries.append(f"[{group}]")
        entries += [f"{name} = {target}" for name, target in targets.items()]
    (info / "entry_points.txt").write_text("\n".join(entries) + "\n")


def describe(python: Path) -> dict[str, str]:
    """Return the GPU, its driver, and the versions that `python` has."""
    command = [str(python), "-c", VERSIONS, *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {**gpu(), "python": sys.version.split()[0], **json.loads(done.stdout)}


def gpu() -> dict[str, str]:
    """Return the first GPU and its driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"gpu": "none", "driver": "none"}
    command = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, driver = lines.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver}


if __name__ == "__main__":
    main()
