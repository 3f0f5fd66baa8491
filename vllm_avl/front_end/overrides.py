"""Refuses a request's bad `vllm_xargs`, which vLLM then answers with a 400."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_avl.config import AVLConfig, parse_config, parse_overrides
from vllm_avl.support import check_drafted_request


def check(vllm_config: VllmConfig, xargs: Mapping[str, Any] | None) -> AVLConfig:
    """Return the server's settings if a request's own fit them.

    Raises:
        VLLMValidationError: names the field, the value and what is allowed.
    """
    config = parse_config(vllm_config.additional_config)
    try:
        overrides = parse_overrides(xargs)
        settings = overrides.apply(config)
        if overrides.avl and vllm_config.speculative_config is not None:
            check_drafted_request(settings)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return config
