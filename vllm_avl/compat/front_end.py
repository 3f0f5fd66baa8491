"""Meets requests where they enter the front end, and where their answers leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_avl.cache.admission import embedded_ranges, is_vision
from vllm_avl.compat import facts, overrides
from vllm_avl.compat.platform import is_chosen
from vllm_avl.compat.responses import asked_pictures
from vllm_avl.config import AVLConfig
from vllm_avl.endpoints.records import RECORDS


def check_request(original: Callable[..., EngineCoreRequest]) -> Callable[..., Any]:
    """Wrap `process_inputs`: refuse bad overrides, serve n > 1 as stock."""

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        if not is_chosen(self.vllm_config) or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        try:
            config = overrides.check(self.vllm_config, params.extra_args)
        except VLLMValidationError:
            _forget_pictures(self, prompt)
            raise
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if params.n > 1:
            # The children share their prompt's blocks, so none may write to them.
            own = request.sampling_params
            assert own is not None
            own.extra_args = {**(own.extra_args or {}), "avl": False}
        if config.introspection and request.mm_features:
            _remember(request, config)
        return request

    return process_inputs


def _remember(request: EngineCoreRequest, config: AVLConfig) -> None:
    """Keep what the page will want to know of a request."""
    pictures = [f for f in request.mm_features or () if is_vision(f)]
    record = RECORDS.add(request.request_id)
    record.picture_ranges = [list(embedded_ranges(f)) for f in pictures]
    if config.show_content:
        urls = asked_pictures.get()
        RECORDS.keep_content(request.request_id, urls, config.introspection)


def receive_decisions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `process_outputs`: take out what the scheduler decided of a request."""

    @functools.wraps(original)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            if output.kv_transfer_params is not None:
                decision = facts.receive(output)
                state = self.request_states.get(output.request_id)
                if decision is not None and state is not None:
                    RECORDS.add(state.external_req_id).decision = decision
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def keep_answer(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_finish_request`: the page may show the answer."""

    @functools.wraps(original)
    def _finish_request(self: Any, req_state: Any) -> None:
        record = RECORDS.find(req_state.external_req_id)
        if record is not None and record.content is not None:
            said = req_state.detokenizer
            record.content.answer = said.output_text
            record.content.answer_token_ids = tuple(said.output_token_ids)
        original(self, req_state)

    return _finish_request


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
