"""The settings: what the server takes and what a request may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError


def _no_switch(value: object) -> object:
    """Refuse true and false, which pydantic takes for 1.0 and 0.0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _only_switch(value: object) -> object:
    """Refuse all but 0 and 1, true and false: pydantic also takes "yes" and "off"."""
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError("not a switch")
    return value


Ratio = Annotated[
    float,
    Field(gt=0, le=1, strict=True, allow_inf_nan=False),
    BeforeValidator(_no_switch),
]
Switch = Annotated[bool, BeforeValidator(_only_switch)]

Model = TypeVar("Model", bound=BaseModel)

SERVER_PREFIX = "additional_config.avl."
REQUEST_PREFIX = "vllm_xargs."


class AVLConfig(BaseModel):
    """Server-wide settings, from `--additional-config '{"avl": {...}}'`.

    Ratios are fractions kept (the paper's S); method.md of the docs has the symbols.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vision_store_ratio: Ratio = Field(
        0.5, description="vision tokens whose KV cache stays stored after prefill"
    )
    observation_window: int = Field(
        1, ge=1, le=256, strict=True, description="last prompt tokens that score vision"
    )


class RequestOverrides(BaseModel):
    """What one request may change, from `vllm_xargs` (`SamplingParams.extra_args`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    avl: Switch = Field(True, description="0 serves the request exactly as stock")
    avl_store_ratio: Ratio | None = Field(None, description="vision_store_ratio")

    def apply(self, config: AVLConfig) -> AVLConfig:
        """Return the settings that hold for this request."""
        if self.avl_store_ratio is None:
            return config
        return config.model_copy(update={"vision_store_ratio": self.avl_store_ratio})


def parse_config(additional_config: Mapping[str, Any]) -> AVLConfig:
    """Read the server's settings.

    Raises:
        ValueError: one line a fault, each with field, value and what is allowed.
    """
    settings = additional_config.get("avl", {})
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"additional_config.avl = {settings!r}: must be an object such as "
            '{"vision_store_ratio": 0.5}'
        )
    return _validate(AVLConfig, settings, SERVER_PREFIX)


def parse_overrides(extra_args: Mapping[str, Any] | None) -> RequestOverrides:
    """Read one request's `avl*` arguments; others are not ours.

    Raises:
        ValueError: one line a fault, each with field, value and what is allowed.
    """
    ours = {key: value for key, value in (extra_args or {}).items() if _is_ours(key)}
    return _validate(RequestOverrides, ours, REQUEST_PREFIX)


def _is_ours(key: str) -> bool:
    # Whatever the case: {"AVL": 0} must be refused, not silently served adaptively.
    return key.lower() == "avl" or key.lower().startswith("avl_")


def _validate(model: type[Model], values: Mapping[str, Any], prefix: str) -> Model:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(model, fault, prefix) for fault in error.errors()]
        raise ValueError("; ".join(lines)) from None


def _describe(model: type[BaseModel], fault: Any, prefix: str) -> str:
    name, value = fault["loc"][0], fault["input"]
    if fault["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return f"{prefix}{name}: unknown setting; known are {known}"
    allowed = ALLOWED[name]
    return f"{prefix}{name} = {value!r}: must be {allowed}"


ALLOWED = {
    "vision_store_ratio": "a number in (0, 1]",
    "observation_window": "an integer from 1 to 256",
    "avl": "0 or 1",
    "avl_store_ratio": "a number in (0, 1]",
}
