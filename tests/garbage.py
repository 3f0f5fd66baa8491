"""Garbage collections that do not look at vLLM's modules again and again."""

import gc

unfreeze = gc.unfreeze


def keep_modules_out() -> None:
    """Freeze what there is until the process ends.

    vLLM collects all garbage several times while an engine starts, freezes what there
    is, and unfreezes it in the end: its own modules would be looked at every time.
    """
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
