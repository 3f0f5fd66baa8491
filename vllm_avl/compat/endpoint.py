"""vLLM's endpoint plug-in: loads the routes where `VLLM_PLUGINS` names `avl`."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from starlette.datastructures import State
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import get_prometheus_registry

from vllm_avl.compat.platform import block_size, is_chosen
from vllm_avl.config import AVLConfig, parse_config
from vllm_avl.front_end.pieces import pieces
from vllm_avl.front_end.routes import ProblemError, attach
from vllm_avl.metrics.collectors import totals

SECONDS_TO_ANSWER = 30.0


class Engine:
    """The engine as the routes see it."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._vllm_config = client.vllm_config

    def check_back_end(self) -> None:
        """Refuse to answer for another back end.

        Raises:
            ProblemError: the server was started with one.
        """
        if not is_chosen(self._vllm_config):
            raise ProblemError(404, "the server runs without --attention-backend avl")

    @property
    def config(self) -> AVLConfig:
        """The settings."""
        return parse_config(self._vllm_config.additional_config)

    @property
    def model(self) -> str:
        """The name the model is served under."""
        return self._vllm_config.model_config.served_model_name

    @property
    def hf_config(self) -> Any:
        """The model's configuration."""
        return self._vllm_config.model_config.hf_config

    @property
    def block_size(self) -> int:
        """Tokens a KV block of the adapted layers holds."""
        return block_size(self._vllm_config)

    @property
    def num_blocks(self) -> int | None:
        """Blocks of a pool that requests can hold: all but the null block."""
        num_blocks = self._vllm_config.cache_config.num_gpu_blocks
        return num_blocks and num_blocks - 1

    @property
    def vllm_version(self) -> str:
        """Of the installed vLLM."""
        return version("vllm")

    def metrics(self) -> dict[str, float]:
        """Return what /metrics shows of ours."""
        return totals(get_prometheus_registry())

    async def ask(self, method: str, *args: Any) -> list[list[Any]]:
        """Call a worker method; return one list a rank of answers, for each engine.

        Raises:
            ProblemError: there is no answer.
        """
        call = self._client.engine_core.call_utility_all_async(
            "collective_rpc", method, None, args, None
        )
        try:
            return await asyncio.wait_for(call, SECONDS_TO_ANSWER)
        except EngineDeadError:
            raise ProblemError(503, "the engine has died") from None
        except TimeoutError:
            raise ProblemError(
                503, f"the engine took longer than {SECONDS_TO_ANSWER:g} s to answer"
            ) from None

    def decode(self, token_ids: Sequence[int]) -> list[str]:
        """Return each token's part of the text."""
        return pieces(self._client.renderer.tokenizer.decode, token_ids)

    def external_id(self, request_id: str) -> str:
        """Return the id that an answer carries, of an engine's own."""
        if envs.VLLM_DISABLE_REQUEST_ID_RANDOMIZATION:
            return request_id
        return request_id.rpartition("-")[0]


class AVLEndpoints:
    """Routes below /avl."""

    name = "avl"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes, behind the server's API key."""
        keys = app.state.args.api_key or [envs.VLLM_API_KEY]
        tokens = [key for key in keys if key]
        # vLLM's own middleware guards fixed prefixes, and ours is not among them.
        guard = AuthenticationMiddleware(app, tokens)

        def may_read(request: Request) -> bool:
            return not tokens or guard.verify_token(request.headers)

        attach(app, may_read)

    async def init_state(
        self, engine_client: Any, state: State, args: Namespace
    ) -> None:
        """Hand the engine to the routes."""
        state.avl_engine = Engine(engine_client)
