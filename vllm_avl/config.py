"""The settings: what the server takes and what a request may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from vllm_avl.policies import POLICIES


@dataclass(frozen=True)
class Allowed:
    """What a field takes, in the words of an error."""

    text: str


def _among(text: str, holds: Callable[[Any], bool]) -> tuple[AfterValidator, Allowed]:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    return AfterValidator(check), Allowed(text)


def _no_switch(value: object) -> object:
    """Refuse true and false, which pydantic takes for 1.0 and 0.0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _is_switch(value: object) -> bool:
    """Whether it is 0, 1, true or false: pydantic also takes "yes" and "off"."""
    return isinstance(value, int) and value in (0, 1)


def _only_switch(value: object) -> object:
    if not _is_switch(value):
        raise ValueError("not a switch")
    return value


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "balanced": {
        "policy": "avl",
        "store_ratio": 0.5,
        "core_ratio": None,
        "text_keep_ratio": 1.0,
    },
    "lean": {
        "policy": "avl",
        "store_ratio": 0.45,
        "core_ratio": None,
        "text_keep_ratio": 1.0,
    },
}
"""Settings that go together; what is set beside them wins. docs/accuracy.md has what
they lose."""

Strict = Field(strict=True)
MOST = 256
Ratio = Annotated[
    float,
    Strict,
    BeforeValidator(_no_switch),
    *_among("a number in (0, 1]", lambda ratio: 0 < ratio <= 1),
]
Count = Annotated[
    int,
    Strict,
    BeforeValidator(_no_switch),
    *_among("an integer from 0 to 2147483647", lambda count: 0 <= count < 2**31),
]
Rows = Annotated[
    int, Strict, *_among(f"an integer from 1 to {MOST}", lambda n: 1 <= n <= MOST)
]
Requests = Annotated[
    int, Strict, *_among(f"an integer from 0 to {MOST}", lambda n: 0 <= n <= MOST)
]
Switch = Annotated[bool, BeforeValidator(_only_switch), Allowed("true or false")]
PolicyName = Annotated[
    str, *_among(f"one of {', '.join(POLICIES)}", lambda name: name in POLICIES)
]
PresetName = Annotated[
    str, *_among(f"one of {', '.join(PRESETS)}", lambda name: name in PRESETS)
]

Model = TypeVar("Model", bound=BaseModel)

SERVER_PREFIX = "additional_config.avl."
REQUEST_PREFIX = "vllm_xargs."
SWITCH, ARGUMENT = "avl", "avl_"
"""Of a request: what turns adaptation off, and what its settings begin with."""


class RequestSettings(BaseModel):
    """Settings that one request may have for itself, `avl_` in front of each.

    Ratios are fractions kept; docs/method.md has the paper's symbols.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: PresetName | None = Field(
        None, description="balanced or lean: settings that go together"
    )
    policy: PolicyName = Field("avl", description="the rule that ranks tokens")
    store_ratio: Ratio = Field(
        0.5, description="vision tokens whose KV cache stays stored after prefill"
    )
    core_ratio: Ratio | None = Field(
        None,
        description="vision tokens that ordinary decode steps read, at most "
        "store_ratio; null reads all that is stored",
    )
    refresh_interval: Count = Field(
        3, description="decode steps between two selections of core; 0 reads all"
    )
    text_keep_ratio: Ratio = Field(
        1.0, description="text tokens kept as they age; 1 evicts no text"
    )

    @property
    def read_ratio(self) -> float:
        """`core_ratio`, or all that is stored."""
        return self.store_ratio if self.core_ratio is None else self.core_ratio

    @property
    def has_core(self) -> bool:
        """Whether ordinary steps are to read less than what is stored."""
        return self.refresh_interval > 1 and self.read_ratio < self.store_ratio

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


class AVLConfig(RequestSettings):
    """All settings, from `--additional-config '{"avl": {...}}'`."""

    head_reduction: Literal["mean", "max"] = Field(
        "mean", description="how the scores of a layer's heads become one"
    )
    observation_window: Rows | None = Field(
        None,
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
    show_content: Switch = Field(
        False,
        description="keep the remembered requests' pictures and answers, for whoever "
        "may open the page",
    )
    introspection: Requests = Field(
        0,
        description="finished requests to remember which rows they stored; 0 is off",
    )


def parse_config(additional_config: Mapping[str, Any]) -> AVLConfig:
    """Read the server's settings.

    Raises:
        ValueError: one line a fault, each with field, value and what is allowed.
    """
    settings = additional_config.get("avl", {})
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"additional_config.avl = {settings!r}: must be an object such as "
            '{"store_ratio": 0.5}'
        )
    names = {name: f"{SERVER_PREFIX}{name}" for name in settings}
    config = _validate(AVLConfig, settings, names)
    if config.preset is not None:
        changes = {
            name: value
            for name, value in PRESETS[config.preset].items()
            if name not in settings
        }
        config = config.model_copy(update=changes)
    _check_core(config, f"{SERVER_PREFIX}core_ratio")
    return config


def settings_of_request(
    extra_args: Mapping[str, Any] | None, config: AVLConfig
) -> AVLConfig | None:
    """Return what holds for one request, None if it is to be served as stock.

    Args:
        extra_args: its `vllm_xargs`; ours are those whose names begin with `avl`.
        config: the server's.

    Raises:
        ValueError: one line a fault, each with field, value and what is allowed; or
            core would be larger than what is stored.
    """
    # Whatever the case: {"AVL": 0} must be refused, not silently served adaptively.
    ours = {
        name: value
        for name, value in (extra_args or {}).items()
        if isinstance(name, str) and f"{name.lower()}_".startswith(ARGUMENT)
    }
    if not ours:
        return config
    switch = ours.pop(SWITCH, True)
    if not _is_switch(switch):
        raise ValueError(f"{REQUEST_PREFIX}{SWITCH} = {switch!r}: must be 0 or 1")
    given = {name.removeprefix(ARGUMENT): value for name, value in ours.items()}
    names = dict(zip(given, (f"{REQUEST_PREFIX}{name}" for name in ours), strict=True))
    own = _validate(RequestSettings, given, names)
    changes = dict(PRESETS[own.preset]) if own.preset else {}
    changes |= {name: getattr(own, name) for name in given}
    changed = config.model_copy(update=changes)
    _check_core(changed, names.get("core_ratio", "the server's core_ratio"))
    return changed if switch else None


def allowed(model: type[BaseModel], name: str) -> str:
    """Say what a field takes, by its type."""
    field = model.model_fields[name]
    parts = get_args(field.annotation)
    metadata = [*field.metadata, *(text for part in parts for text in get_args(part))]
    for text in metadata:
        if isinstance(text, Allowed):
            return f"{text.text}, or null" if NoneType in parts else text.text
    *others, last = parts
    return f"{', '.join(others)} or {last}"


def _validate(
    model: type[Model], values: Mapping[str, Any], names: Mapping[str, str]
) -> Model:
    """Make a model; `names` are those of the values in errors."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        lines = [_describe(model, fault, names) for fault in error.errors()]
        raise ValueError("; ".join(lines)) from None


def _describe(model: type[BaseModel], fault: Any, names: Mapping[str, str]) -> str:
    field = fault["loc"][0]
    if fault["type"] == "extra_forbidden":
        known = [*model.model_fields]
        if model is RequestSettings:
            known = [SWITCH, *(f"{ARGUMENT}{name}" for name in known)]
        return f"{names[field]}: unknown setting; known are {', '.join(known)}"
    return f"{names[field]} = {fault['input']!r}: must be {allowed(model, field)}"


def _check_core(config: AVLConfig, name: str) -> None:
    if config.read_ratio > config.store_ratio:
        raise ValueError(
            f"{name} = {config.read_ratio!r}: must be at most the store ratio "
            f"{config.store_ratio!r}; core is a part of what is stored"
        )
