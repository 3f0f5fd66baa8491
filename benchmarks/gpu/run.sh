#!/usr/bin/env bash
# One prepared run on a machine with a GPU; see run.py --help. PYTHON names the interpreter.
exec "${PYTHON:-python3}" -u "$(dirname "${BASH_SOURCE[0]}")/run.py" "$@"
