"""Garbage collections that do not look at vLLM's modules again and again."""

import gc

unfreeze = gc.unfreeze


def keep_modules_out() -> None:
    """Freeze what there is until the process ends.

    vLLM collects all garbage seven times while an engine starts, freezes what there is,
    and unfreezes it in the end: with its own modules among it, that is most of a start.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
