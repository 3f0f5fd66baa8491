"""Marks the attention layers whose blocks are ours to manage."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, replace_as


@dataclass(frozen=True, kw_only=True)
class AVLSpec(FullAttentionSpec):
    """Full attention, stored in the layout of vLLM's own back end."""


def adapt(spec: AttentionSpec) -> AttentionSpec:
    """Return `spec` as ours; anything but plain full attention passes unchanged."""
    return replace_as(spec, AVLSpec) if type(spec) is FullAttentionSpec else spec
