"""Finds what all benchmarks share, one folder up."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from figures import save
from report import (
    RESULTS,
    append_rows,
    machine,
    print_heading,
    print_table,
    spread,
)

__all__ = [
    "RESULTS",
    "append_rows",
    "machine",
    "print_heading",
    "print_table",
    "save",
    "spread",
]
