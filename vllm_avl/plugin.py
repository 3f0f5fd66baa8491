"""The plug-in's entry point: vLLM calls `register` in every process it starts."""

from __future__ import annotations

import logging
from typing import Any


def register() -> None:
    """Make `--attention-backend avl` known; inert until somebody asks for it.

    vLLM calls this several times in a process: only the first call does anything.
    """
    # Not at module level: importing the plug-in must not import vLLM.
    from vllm_avl.compat import patches, registry, versions

    if registry.is_registered():
        return
    out_of_range = versions.mismatch()
    problems = [out_of_range] if out_of_range else patches.mismatches()
    if problems:
        logging.getLogger("vllm.avl").error(
            "vllm-avl stays off, --attention-backend avl is not available: %s; "
            "install a supported vLLM",
            "; ".join(problems),
        )
        return
    # The name last: it is what says that all of this is done.
    patches.apply_all()
    registry.register_all(restore)


def restore() -> Any:
    """Return the name to a process that unpickles it before plug-ins load."""
    from vllm_avl.compat import registry

    register()
    return registry.member()
