"""The settings: what the server takes and what a request may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from vllm_avl.policies import POLICIES


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


def _only(names: Mapping[str, object]) -> BeforeValidator:
    """Refuse all but these names."""

    def check(value: object) -> object:
        if not isinstance(value, str) or value not in names:
            raise ValueError("not one of the names")
        return value

    return BeforeValidator(check)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "balanced": {
        "policy": "avl",
        "vision_store_ratio": 0.5,
        "vision_core_ratio": None,
        "text_keep_ratio": 1.0,
    },
    "lean": {
        "policy": "avl",
        "vision_store_ratio": 0.45,
        "vision_core_ratio": None,
        "text_keep_ratio": 1.0,
    },
}
"""Settings that go together; what is set beside them wins. docs/accuracy.md has what
they lose."""

Ratio = Annotated[
    float,
    Field(gt=0, le=1, strict=True, allow_inf_nan=False),
    BeforeValidator(_no_switch),
]
Switch = Annotated[bool, BeforeValidator(_only_switch)]
Count = Annotated[
    int, Field(ge=0, le=2**31 - 1, strict=True), BeforeValidator(_no_switch)
]
PolicyName = Annotated[str, _only(POLICIES)]
PresetName = Annotated[str, _only(PRESETS)]

Model = TypeVar("Model", bound=BaseModel)

SERVER_PREFIX = "additional_config.avl."
REQUEST_PREFIX = "vllm_xargs."


class AVLConfig(BaseModel):
    """Server-wide settings, from `--additional-config '{"avl": {...}}'`.

    Ratios are fractions kept; docs/method.md has the paper's symbols.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: PresetName | None = Field(
        None, description="balanced or lean: settings that go together"
    )
    policy: PolicyName = Field("avl", description="the rule that ranks tokens")
    vision_store_ratio: Ratio = Field(
        0.5, description="vision tokens whose KV cache stays stored after prefill"
    )
    vision_core_ratio: Ratio | None = Field(
        None,
        description="vision tokens that ordinary decode steps read, at most "
        "vision_store_ratio; null reads all that is stored",
    )
    core_refresh_interval: Count = Field(
        3, description="decode steps between two selections of core; 0 reads all"
    )
    text_keep_ratio: Ratio = Field(
        1.0, description="text tokens kept as they age; 1 evicts no text"
    )
    text_heavy_ratio: Ratio = Field(
        0.7, description="part of the text window for the most attended tokens"
    )
    text_min_tokens: Count = Field(20, description="text tokens kept at least")
    text_decay: Ratio = Field(
        1.0, description="what a text token's score keeps from one refresh to the next"
    )
    head_reduction: Literal["mean", "max"] = Field(
        "mean", description="how the scores of a layer's heads become one"
    )
    observation_window: int | None = Field(
        None,
        ge=1,
        le=256,
        strict=True,
        description="last prompt tokens that score; null leaves it to the policy",
    )
    refresh_all_ranks: Switch = Field(
        False, description="tensor parallel: select core by the scores of all ranks"
    )
    attention: Literal["auto", "flash", "triton"] = Field(
        "auto",
        description="on CUDA, which of vLLM's attentions reads what is stored: "
        "FlashAttention (flash), Triton's (triton), or what vLLM chooses (auto)",
    )
    engage: Literal["always", "pressure"] = Field(
        "always",
        description="which requests are adapted: all, or those that arrive while "
        "blocks are short",
    )
    engage_pool_use: Ratio = Field(
        0.8,
        description="part of the pool that running and waiting requests must want "
        "before requests are adapted (engage: pressure)",
    )
    release_pool_use: Ratio = Field(
        0.6,
        description="part of the pool below which requests are left alone again, at "
        "most engage_pool_use",
    )
    show_content: Switch = Field(
        False,
        description="keep the remembered requests' pictures and answers, for whoever "
        "may open the page",
    )
    introspection: int = Field(
        0,
        ge=0,
        le=256,
        strict=True,
        description="finished requests to remember which rows they stored; 0 is off",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, settings: Any) -> Any:
        preset = settings.get("preset")
        known = isinstance(preset, str) and preset in PRESETS
        return {**PRESETS[preset], **settings} if known else settings

    @property
    def has_core(self) -> bool:
        """Whether ordinary steps are to read less than what is stored."""
        return (
            self.core_refresh_interval > 1 and self.core_ratio < self.vision_store_ratio
        )

    @property
    def reads_all(self) -> bool:
        """Whether every step reads all that is stored, and no text is evicted."""
        return not self.has_core and self.text_keep_ratio == 1

    @property
    def num_lists(self) -> int:
        """Lists of core that a server's own requests need in a layer: 2 is many."""
        if not self.has_core:
            return 0
        splits = POLICIES[self.policy].per_head or self.text_keep_ratio < 1
        return 2 if splits else 1

    @property
    def core_ratio(self) -> float:
        """`vision_core_ratio`, or all that is stored."""
        if self.vision_core_ratio is None:
            return self.vision_store_ratio
        return self.vision_core_ratio


class RequestOverrides(BaseModel):
    """What one request may change, from `vllm_xargs` (`SamplingParams.extra_args`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    avl: Switch = Field(True, description="0 serves the request exactly as stock")
    avl_preset: PresetName | None = Field(None, description="preset")
    avl_policy: PolicyName | None = Field(None, description="policy")
    avl_store_ratio: Ratio | None = Field(None, description="vision_store_ratio")
    avl_core_ratio: Ratio | None = Field(None, description="vision_core_ratio")
    avl_refresh_interval: Count | None = Field(
        None, description="core_refresh_interval"
    )
    avl_text_keep_ratio: Ratio | None = Field(None, description="text_keep_ratio")

    def apply(self, config: AVLConfig) -> AVLConfig:
        """Return the settings that hold for this request.

        Raises:
            ValueError: core would be larger than what is stored.
        """
        changes = dict(PRESETS[self.avl_preset]) if self.avl_preset else {}
        changes |= {
            setting: value
            for name, setting in SETTING_OF_OVERRIDE.items()
            if (value := getattr(self, name)) is not None
        }
        if not changes:
            return config
        changed = config.model_copy(update=changes)
        core_is_ours = self.avl_core_ratio is not None
        name = "avl_core_ratio" if core_is_ours else "vision_core_ratio"
        prefix = REQUEST_PREFIX if core_is_ours else "the server's "
        _check_core(changed, f"{prefix}{name}")
        return changed


SETTING_OF_OVERRIDE = {
    "avl_preset": "preset",
    "avl_policy": "policy",
    "avl_store_ratio": "vision_store_ratio",
    "avl_core_ratio": "vision_core_ratio",
    "avl_refresh_interval": "core_refresh_interval",
    "avl_text_keep_ratio": "text_keep_ratio",
}


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
    config = _validate(AVLConfig, settings, SERVER_PREFIX)
    _check_core(config, f"{SERVER_PREFIX}vision_core_ratio")
    _check_pressure(config)
    return config


def parse_overrides(extra_args: Mapping[str, Any] | None) -> RequestOverrides:
    """Read one request's `avl*` arguments; others are not ours.

    Raises:
        ValueError: one line a fault, each with field, value and what is allowed.
    """
    ours = {
        key: value
        for key, value in (extra_args or {}).items()
        if isinstance(key, str) and _is_ours(key)
    }
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


def _check_core(config: AVLConfig, name: str) -> None:
    if config.core_ratio > config.vision_store_ratio:
        raise ValueError(
            f"{name} = {config.core_ratio!r}: must be at most the store ratio "
            f"{config.vision_store_ratio!r}; core is a part of what is stored"
        )


def _check_pressure(config: AVLConfig) -> None:
    if config.release_pool_use > config.engage_pool_use:
        raise ValueError(
            f"{SERVER_PREFIX}release_pool_use = {config.release_pool_use!r}: must be "
            f"at most engage_pool_use = {config.engage_pool_use!r}"
        )


RATIO = "a number in (0, 1]"
COUNT = "an integer from 0 to 2147483647"
POLICY = f"one of {', '.join(POLICIES)}"
PRESET = f"one of {', '.join(PRESETS)}"
ALLOWED = {
    "preset": f"{PRESET}, or null",
    "policy": POLICY,
    "vision_store_ratio": RATIO,
    "vision_core_ratio": f"{RATIO}, at most vision_store_ratio, or null",
    "core_refresh_interval": COUNT,
    "text_keep_ratio": RATIO,
    "text_heavy_ratio": RATIO,
    "text_min_tokens": COUNT,
    "text_decay": RATIO,
    "head_reduction": "mean or max",
    "attention": "auto, flash or triton",
    "engage": "always or pressure",
    "engage_pool_use": RATIO,
    "release_pool_use": f"{RATIO}, at most engage_pool_use",
    "show_content": "true or false",
    "observation_window": "an integer from 1 to 256, or null",
    "refresh_all_ranks": "true or false",
    "introspection": "an integer from 0 to 256",
    "avl": "0 or 1",
    "avl_preset": PRESET,
    "avl_policy": POLICY,
    "avl_store_ratio": RATIO,
    "avl_core_ratio": f"{RATIO}, at most the store ratio",
    "avl_refresh_interval": COUNT,
    "avl_text_keep_ratio": RATIO,
}
