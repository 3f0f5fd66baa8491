"""Answers one specification after another, and imports vLLM once for all of them.

    python -m standin.series - - --runner v2

run in the folder tests, reads a line of JSON for each, as `standin.generate` takes it
and with a "model" besides, and writes a line with its report.
"""

from __future__ import annotations

import json
import sys

from standin import generate

REPORT = "REPORT "


def main() -> None:
    """Answer every line until there is none."""
    args = generate.parse()
    generate.set_up(args)
    for line in sys.stdin:
        spec = json.loads(line)
        args.model = spec.pop("model")
        print(REPORT + json.dumps(generate.run(args, spec)), flush=True)


if __name__ == "__main__":
    main()
