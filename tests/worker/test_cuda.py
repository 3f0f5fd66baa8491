"""What the back ends on CUDA say of themselves, whatever they are over."""

from types import SimpleNamespace

import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_avl.compat.platform import OVER


@pytest.mark.parametrize("base", OVER, ids=lambda base: base.name)
def test_ours_come_before_vllms(base):
    backend, theirs = resolve_obj_by_qualname(OVER[base]), base.get_class()
    assert ".".join(backend.full_cls_name()) == OVER[base]
    assert backend.get_name() == "AVL"
    assert issubclass(backend, theirs)
    assert issubclass(backend.get_impl_cls(), theirs.get_impl_cls())
    builder = backend.get_builder_cls()
    assert issubclass(builder, theirs.get_builder_cls())
    # A step with work for Python may be any mixed batch.
    for drafts, graphs in (
        (None, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        # Then no step lists core.
        ("ngram", AttentionCGSupport.UNIFORM_BATCH),
    ):
        config = SimpleNamespace(speculative_config=drafts)
        assert builder.get_cudagraph_support(config, None) is graphs
    assert not builder.supports_update_block_table
    for refused in ("sink", "rswa", "sliding_window"):
        assert not getattr(backend, f"supports_{refused}")()
    # FlashAttention has them where its version and the device do.
    assert backend.supports_mm_prefix() == theirs.supports_mm_prefix()
    for dtype in ("auto", "bfloat16", "fp8"):
        ours = backend.supports_kv_cache_dtype(dtype)
        assert ours == theirs.supports_kv_cache_dtype(dtype)
    assert not backend.supports_kv_cache_dtype("fp8_e5m2")
    assert backend.supports_attn_type("decoder")
    assert not backend.supports_attn_type("encoder_only")
