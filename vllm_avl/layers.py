"""Refuses layers and cache groups that adaptive attention does not support."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_avl.support import BACKEND, WAY_OUT, UnsupportedError


def check_layer(
    *, alibi: bool, sinks: bool, sliding_window: bool, kv_sharing: bool
) -> None:
    """Refuse decoder layers whose cached rows cannot be moved or dropped freely."""
    found = {
        "ALiBi position biases": alibi,
        "attention sinks": sinks,
        "sliding-window attention": sliding_window,
        "KV-cache sharing between layers": kv_sharing,
    }
    for feature, present in found.items():
        if present:
            raise UnsupportedError(
                f"{BACKEND} does not support models with {feature}; choose another "
                f"model, {WAY_OUT}"
            )


def layer_number(name: str) -> int | None:
    """Return the one number in a layer's name, None where there is not just one."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def check_layer_names(names: Sequence[str]) -> None:
    """Refuse layers of a model that their number does not tell apart.

    A drafter's layers have a number of the model's, and their name begins differently.
    """
    numbers = {(name.split(".")[0], layer_number(name)) for name in names}
    if len(numbers) != len(names) or any(number is None for _, number in numbers):
        raise UnsupportedError(
            f"{BACKEND} supports models whose attention layers are numbered, and the "
            f"names of this one's are {', '.join(names)}; choose another model, "
            f"{WAY_OUT}"
        )


def check_spec(spec: object, ours: type) -> None:
    """Refuse a cache group that vLLM did not leave as we specified it."""
    # Exactly ours: merging specs silently drops subclasses and their fields.
    if type(spec) is not ours:
        raise UnsupportedError(
            f"{BACKEND} adapts layers with plain full attention, and is given ones "
            f"with a {type(spec).__name__}; choose another model, {WAY_OUT}"
        )


def find_group(
    specs: Sequence[object], ours: type, others: tuple[type, ...] = ()
) -> int:
    """Return which cache group is ours, beside groups of `others`, which are vLLM's.

    Raises:
        UnsupportedError: none or several are ours, or one is of another kind.
    """
    kinds = ", ".join(other.__name__ for other in others) or "nothing"
    for spec in specs:
        # Exactly these: subclasses may store something else.
        if type(spec) not in (ours, *others):
            raise UnsupportedError(
                f"{BACKEND} supports plain full attention, and beside it {kinds}; "
                f"this model has a {type(spec).__name__} group; choose "
                f"another model, {WAY_OUT}"
            )
    found = [index for index, spec in enumerate(specs) if type(spec) is ours]
    if len(found) != 1:
        raise UnsupportedError(
            f"{BACKEND} supports models with one KV cache group of full attention, and "
            f"this one has {len(found)}; choose another model, {WAY_OUT}"
        )
    return found[0]
