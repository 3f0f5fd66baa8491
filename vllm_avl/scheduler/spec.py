"""Marks the attention layers whose blocks are ours to manage."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    iter_layer_specs,
    replace_as,
)

from vllm_avl.layers import find_group

OTHERS = (SlidingWindowSpec, ChunkedLocalAttentionSpec, MambaSpec)
"""Of groups that may lie beside ours, and stay as vLLM has them."""


@dataclass(frozen=True, kw_only=True)
class AVLSpec(FullAttentionSpec):
    """Full attention, stored in the layout of vLLM's own back end."""


def adapt(spec: AttentionSpec) -> AttentionSpec:
    """Return `spec` as ours; anything but plain full attention passes unchanged."""
    return replace_as(spec, AVLSpec) if type(spec) is FullAttentionSpec else spec


def our_group(kv_cache_config: KVCacheConfig) -> int:
    """Return the index of the cache group whose layers are adapted.

    Raises:
        UnsupportedError: there is none, or one beside it that must not be.
    """
    specs = [spec_of(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    return find_group(specs, AVLSpec, OTHERS)


def spec_of(group: KVCacheSpec) -> KVCacheSpec:
    """Return a layer's spec of a group all of whose layers are ours, else the group's.

    A draft model may have other heads than the model, and then each layer has a spec.
    """
    specs = list(iter_layer_specs(group))
    return specs[0] if all(type(spec) is AVLSpec for spec in specs) else group
