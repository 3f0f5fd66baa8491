"""Replicas of a vision model on a Ray cluster, by Ray Serve's own support of vLLM.

On a cluster (`ray start --head` on one node, `ray start --address=HEAD:6379` on the
others, this plug-in and the same vLLM installed on each of them), from this folder:

    serve run app:build model=llava-hf/llava-1.5-7b-hf replicas=2 gpus_per_replica=1

Ray places each replica where its GPUs are free; the OpenAI API answers on port 8000 of
every node. `gpus_per_replica` is vLLM's tensor parallel size.
"""

from typing import Any

from pydantic import BaseModel, Json
from ray.serve import Application
from ray.serve.llm import LLMConfig, build_openai_app

# The command line gives text, a Serve configuration file an object.
Object = dict[str, Any]
JsonOrObject = Object | Json[Object]


class Settings(BaseModel):
    """What `serve run app:build name=value ...` takes."""

    model: str
    """Checkpoint name, or a folder that every node has."""
    served_name: str | None = None
    """What clients call it; `model` unless given."""
    replicas: int = 2
    gpus_per_replica: int = 1
    """Tensor parallel size; 0 runs vLLM's CPU build."""
    cpus_per_replica: float = 4
    """Cores that Ray sets aside for a replica that has no GPU."""
    accelerator_type: str | None = None
    """As Ray calls it, such as H100; any GPU unless given."""
    avl: JsonOrObject = {"store_ratio": 0.5}
    """The plug-in's settings."""
    engine: JsonOrObject = {}
    """Any further argument of vLLM's engine, with underscores."""


def build(settings: Settings) -> Application:
    """Return the application: an OpenAI endpoint in front of the replicas."""
    config = LLMConfig(
        model_loading_config={
            "model_id": settings.served_name or settings.model,
            "model_source": settings.model,
        },
        engine_kwargs={
            "attention_backend": "avl",
            "additional_config": {"avl": settings.avl},
            "tensor_parallel_size": max(1, settings.gpus_per_replica),
            **settings.engine,
        },
        accelerator_type=settings.accelerator_type,
        placement_group_config={"bundles": _bundles(settings), "strategy": "PACK"},
        deployment_config={
            "num_replicas": settings.replicas,
            "health_check_period_s": 10,
            "health_check_timeout_s": 30,
        },
        # Of vLLM's plug-ins, each of Ray's workers needs this one and no other.
        runtime_env={"env_vars": {"VLLM_PLUGINS": "avl"}},
    )
    return build_openai_app({"llm_configs": [config]})


def _bundles(settings: Settings) -> list[dict[str, float]]:
    if settings.gpus_per_replica:
        return [{"GPU": 1, "CPU": 1} for _ in range(settings.gpus_per_replica)]
    return [{"CPU": settings.cpus_per_replica}]
