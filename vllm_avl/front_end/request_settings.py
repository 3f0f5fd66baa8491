"""Refuses a request's bad `vllm_xargs`, which vLLM then answers with a 400."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError

from vllm_avl.config import AVLConfig, parse_config, settings_of_request
from vllm_avl.drafters import check_drafted_request


def check(vllm_config: VllmConfig, xargs: Mapping[str, Any] | None) -> AVLConfig:
    """Return the server's settings if a request's own fit them.

    Raises:
        VLLMValidationError: names the field, the value and what is allowed.
    """
    config = _parsed(json.dumps(vllm_config.additional_config.get("avl", {})))
    try:
        settings = settings_of_request(xargs, config)
        drafts = vllm_config.speculative_config
        if settings is not None and drafts is not None:
            device_type = vllm_config.device_config.device_type
            check_drafted_request(settings, drafts.method, device_type)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return config


@lru_cache
def _parsed(settings: str) -> AVLConfig:
    """Read a server's settings once, not for every request."""
    return parse_config({"avl": json.loads(settings)})
