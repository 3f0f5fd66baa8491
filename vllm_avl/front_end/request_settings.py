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
from vllm_avl.support import check_policy_in_stages


def check(vllm_config: VllmConfig, xargs: Mapping[str, Any] | None) -> AVLConfig:
    """Return the server's settings if a request's own fit them.

    Raises:
        VLLMValidationError: names the field, the value and what is allowed.
    """
    config = _parsed(json.dumps(vllm_config.additional_config.get("avl", {})))
    try:
        settings = settings_of_request(xargs, config)
        if settings is not None:
            _check_beside(vllm_config, settings)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return config


def _check_beside(vllm_config: VllmConfig, settings: AVLConfig) -> None:
    """Refuse a request's settings that the server's other features rule out."""
    drafts = vllm_config.speculative_config
    if drafts is not None:
        is_async = vllm_config.scheduler_config.async_scheduling
        check_drafted_request(settings, drafts.method, is_async)
    check_policy_in_stages(settings, vllm_config.parallel_config.pipeline_parallel_size)


@lru_cache
def _parsed(settings: str) -> AVLConfig:
    """Read a server's settings once, not for every request."""
    return parse_config({"avl": json.loads(settings)})
