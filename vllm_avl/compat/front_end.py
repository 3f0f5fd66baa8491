"""Checks a request's `vllm_xargs` where it enters, so that bad ones are a 400."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_avl.compat.platform import is_chosen
from vllm_avl.config import parse_config, parse_overrides


def check_request(original: Callable[..., EngineCoreRequest]) -> Callable[..., Any]:
    """Wrap `process_inputs`: refuse bad overrides, serve n > 1 as stock."""

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        if not is_chosen(self.vllm_config) or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        try:
            config = parse_config(self.vllm_config.additional_config)
            parse_overrides(params.extra_args).apply(config)
        except ValueError as error:
            _forget_pictures(self, prompt)
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if params.n > 1:
            # The children share their prompt's blocks, so none may write to them.
            own = request.sampling_params
            assert own is not None
            own.extra_args = {**(own.extra_args or {}), "avl": False}
        return request

    return process_inputs


def _forget_pictures(input_processor: Any, prompt: Any) -> None:
    """Take a refused request's pictures out of the front end's cache.

    They were entered when the prompt was rendered, and the engine will never see them:
    the next request would send their hashes alone, and fail.
    """
    cache = input_processor.renderer.mm_processor_cache
    hashes = prompt.get("mm_hashes", {}) if isinstance(prompt, dict) else {}
    if cache is not None:
        for of_modality in hashes.values():
            for mm_hash in of_modality:
                cache.invalidate(mm_hash)
