"""Meets requests where they enter the front end, and where their answers leave."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from vllm_avl.compat.platform import is_chosen
from vllm_avl.front_end import picture_cache, request_settings
from vllm_avl.front_end.records import RECORDS
from vllm_avl.messages import take_decision


def check_request(original: Callable[..., EngineCoreRequest]) -> Callable[..., Any]:
    """Wrap `process_inputs`: refuse bad settings, serve n > 1 as stock."""

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> EngineCoreRequest:
        if not is_chosen(self.vllm_config) or not isinstance(params, SamplingParams):
            return original(self, request_id, prompt, params, *args, **kwargs)
        with ExitStack() as refused:
            if isinstance(prompt, dict):
                entered = picture_cache.new_hashes(prompt)
                refused.callback(picture_cache.forget, self.renderer, entered)
            request_settings.check(self.vllm_config, params.extra_args)
            if params.n > 1:
                # The children share their prompt's blocks: none may write to them.
                params = params.clone()
                params.extra_args = {**(params.extra_args or {}), "avl": False}
            request = original(self, request_id, prompt, params, *args, **kwargs)
            refused.pop_all()
        return request

    return process_inputs


def receive_decisions(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `process_outputs`: take out what the scheduler decided of a request."""

    @functools.wraps(original)
    def process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            if output.kv_transfer_params is not None:
                decision = take_decision(output)
                record = RECORDS.find(output.request_id)
                if decision is not None and record is not None:
                    record.decision = decision
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def keep_answer(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `_finish_request`: the answer's length, and the answer where it is kept."""

    @functools.wraps(original)
    def _finish_request(self: Any, req_state: Any) -> None:
        record = RECORDS.find(req_state.request_id)
        if record is not None and req_state.detokenizer is not None:
            said = req_state.detokenizer
            # Nobody computes keys and values of the last token.
            record.num_tokens = req_state.prompt_len + said.num_output_tokens() - 1
            if record.content is not None:
                record.content.answer = said.output_text
                record.content.answer_token_ids = tuple(said.output_token_ids)
        original(self, req_state)

    return _finish_request
