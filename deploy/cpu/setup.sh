#!/usr/bin/env bash
# Builds .venv in the repository's root: vLLM's CPU build, this package (editable), test tools.
# Run again at will: nothing is installed twice. PYTHON names the interpreter (3.11 or 3.12).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=deploy/cpu
venv=.venv
stamp=$venv/.setup-stamp

find_python() {
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: Python 3.11 or 3.12 is needed; install one or set PYTHON=/path/to/python" >&2
  return 1
}

# An image has the plug-in alone.
projects=(.)
[ ! -e benchmarks ] || projects+=(./benchmarks)
wanted=$(cat "$here"/requirements.txt "$here"/setup.sh "$here"/torchvision_cpu.py \
  "$here"/vllm_metadata/pyproject.toml "${projects[@]/%//pyproject.toml}" | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi

python=$(find_python)
started=$(date +%s)
step() { echo "setup [$1/5] $2 ($(($(date +%s) - started)) s)"; }

step 1 "virtual environment with $("$python" --version)"
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# torch first and exactly: a range would take the CUDA build.
step 2 "torch (CPU)"
"${pip[@]}" install -q --no-deps --no-compile "$(grep '^torch==' "$here/requirements.txt")"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
grep -q '^cuda.*= None' "$site/torch/version.py" || {
  echo "setup: pip found no CPU build of torch for $("$python" --version); use Python 3.11, or name" \
    "PyTorch's CPU package index in PIP_EXTRA_INDEX_URL, then: rm -rf $venv" >&2
  exit 1
}
step 3 "vLLM and $(grep -c == "$here/requirements.txt") pinned packages"
"${pip[@]}" install -q --no-deps --no-compile -r "$here/requirements.txt"
step 4 "torchvision beside a CPU torch"
cp "$here/torchvision_cpu.py" "$site/torchvision_cpu.py"
echo "import torchvision_cpu" >"$site/torchvision_cpu.pth"
step 5 "vllm-avl (editable)"
"${pip[@]}" install -q --no-deps --no-compile --no-build-isolation "./$here/vllm_metadata"
"${pip[@]}" install -q --no-deps --no-compile --no-build-isolation "${projects[@]/#/--editable=}"
rm -rf "$here"/vllm_metadata/build "$here"/vllm_metadata/*.egg-info

"$venv/bin/python" -c 'import vllm, torchvision, vllm_avl'
echo "$wanted" >"$stamp"
step 5 "ready: .venv/bin/vllm"
