#!/usr/bin/env bash
# Builds .cache/lmms-eval: lmms-eval in an environment of its own, for benchmarks/lmms.py.
# It asks a server over HTTP, so torch is there only because lmms-eval imports it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
venv=.cache/lmms-eval

.venv/bin/python -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
torch=$(grep '^torch==' deploy/cpu/requirements.txt)
"${pip[@]}" install -q --no-deps "$torch"
"${pip[@]}" install -q "$torch" "lmms-eval==0.7.3" matplotlib \
  "$(grep '^anls==' deploy/cpu/requirements.txt)" "$(grep '^pycocoevalcap==' deploy/cpu/requirements.txt)"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp deploy/cpu/torchvision_cpu.py "$site/torchvision_cpu.py"
echo "import torchvision_cpu" >"$site/torchvision_cpu.pth"
"$venv/bin/python" -c 'import lmms_eval.evaluator'
echo "ready: $venv/bin/python"
