"""Puts messages of ours into fields of vLLM's that belong to KV connectors."""

from __future__ import annotations

from typing import Any

FIELD = "avl"


def put_into(theirs: dict[str, Any] | None, ours: Any) -> dict[str, Any]:
    """Return a field with a message of ours beside what is in it."""
    return (theirs or {}) | {FIELD: ours}


def take_from(field: dict[str, Any] | None) -> tuple[Any, dict[str, Any] | None]:
    """Return our message, None where there is none, and the field as it was."""
    if field is None or FIELD not in field:
        return None, field
    theirs = {name: value for name, value in field.items() if name != FIELD}
    return field[FIELD], theirs or None
