"""What is not supported is refused by name, in one sentence with the way out."""

import re
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import vllm
from vllm.config.cache import CacheDType
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    RSWASpec,
    SlidingWindowSpec,
)
from vllm_avl.kernels.cpu.vectors import ELEMENTS

from vllm_avl import drafters, layers, support
from vllm_avl.compat import platform
from vllm_avl.config import AVLConfig
from vllm_avl.front_end import request_settings
from vllm_avl.scheduler.spec import AVLSpec, our_group
from vllm_avl.support import UnsupportedError


@pytest.fixture(autouse=True, scope="module")
def _plugins():
    load_general_plugins()


EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def start(checkpoints, **options):
    args = EngineArgs(
        str(checkpoints("llava")),
        attention_backend="avl",
        max_model_len=2048,
        **options,
    )
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"pipeline_parallel_size": 2, "kv_transfer_config": EXAMPLE},
            "drop one of --kv-transfer-config and --pipeline-parallel-size",
        ),
        (
            {
                "speculative_config": {
                    "method": "extract_hidden_states",
                    "num_speculative_tokens": 1,
                }
            },
            "does not support speculative decoding by 'extract_hidden_states', which",
        ),
        (
            {"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"},
            "KV offloading by lmcache; choose --kv-offloading-backend native",
        ),
        ({"kv_cache_dtype": "fp8_e5m2"}, "does not support a KV cache of fp8_e5m2"),
        ({"scheduler_cls": "my.Scheduler"}, "drop --scheduler-cls"),
        ({"worker_cls": "my.Worker"}, "drop --worker-cls"),
        (
            {"max_num_batched_tokens": 64, "max_num_seqs": 64},
            "needs --max-num-batched-tokens of at least 95",
        ),
        (
            {
                "max_num_batched_tokens": 64,
                "max_num_seqs": 4,
                "additional_config": {"avl": {"observation_window": 64}},
            },
            "at least 67 (--max-num-seqs 4 and observation_window 64), not 64",
        ),
        (
            {"additional_config": {"avl": {"store_ratio": 1.5}}},
            "additional_config.avl.store_ratio = 1.5: must be a number in",
        ),
        (
            {"additional_config": {"avl": {"stored": 1}}},
            "additional_config.avl.stored: unknown setting",
        ),
        (
            {"additional_config": {"avl": {"attention": "flash"}}},
            "has additional_config.avl.attention = 'flash' on CUDA devices only; leave",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_start_up_options(checkpoints, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        start(checkpoints, **options)


def settings(**changes):
    """A configuration that is supported, but for `changes` (dotted names)."""
    config = {
        "model_config": {
            "use_mla": False,
            "is_encoder_decoder": False,
            "uses_mrope": False,
            "is_hybrid": False,
        },
        "device_config": {"device_type": "cuda"},
        "speculative_config": None,
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "kv_transfer_config": None,
        "cache_config": {
            "cache_dtype": "auto",
            "kv_sharing_fast_prefill": False,
            "kv_cache_dtype_skip_layers": [],
        },
        "scheduler_config": {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 2048,
            "long_prefill_token_threshold": 0,
            "max_num_scheduled_tokens": None,
            "async_scheduling": False,
        },
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    return SimpleNamespace(
        **{
            name: SimpleNamespace(**value) if isinstance(value, dict) else value
            for name, value in config.items()
        }
    )


def connecting(name, module=None, **extra):
    named = SimpleNamespace(
        kv_connector=name,
        kv_connector_module_path=module,
        kv_connector_extra_config=extra,
    )
    return {"kv_transfer_config": named}


def test_the_supported_configuration_starts():
    support.check_config(settings(), AVLConfig())
    for name in ("ExampleConnector", "NixlConnector"):
        support.check_config(settings(**connecting(name)), AVLConfig())


def drafting(method, device="cuda", **more):
    plain = {
        "parallel_drafting": False,
        "attention_backend": None,
        "kv_cache_dtype": None,
        "use_heterogeneous_vocab": False,
        "draft_model_config": draft_model(),
    }
    drafts = SimpleNamespace(method=method, **(plain | more))
    config = {"device_config__device_type": device, "speculative_config": drafts}
    return settings(**config)


def draft_model(sliding_window=None, **changes):
    plain = {
        "architectures": ["GlmOcrMTPModel"],
        "is_hybrid": False,
        "is_attention_free": False,
        "uses_mrope": False,
        "get_sliding_window": lambda: sliding_window,
    }
    return SimpleNamespace(**(plain | changes))


METHODS = {
    name for part in get_args(SpeculativeMethod) for name in (get_args(part) or (part,))
}


def test_drafts_beside_recurrent_layers_are_for_cpus():
    on_cpu, on_cuda = (drafting("ngram", device) for device in ("cpu", "cuda"))
    for config in (on_cpu, on_cuda):
        drafters.check_drafts(config, AVLConfig())
        config.model_config.is_hybrid = True
    drafters.check_drafts(on_cpu, AVLConfig())
    with pytest.raises(UnsupportedError, match="beside recurrent layers on cuda"):
        drafters.check_drafts(on_cuda, AVLConfig())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_drafters_go_by_whether_they_have_a_cache(method, device):
    if method in drafters.CACHELESS_DRAFTERS + drafters.ADAPTED_DRAFTERS:
        drafters.check_drafts(drafting(method, device), AVLConfig())
        return
    with pytest.raises(UnsupportedError, match=f"speculative decoding by '{method}'"):
        drafters.check_drafts(drafting(method, device), AVLConfig())


@pytest.mark.parametrize("method", drafters.ADAPTED_DRAFTERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallel_drafting", True),
        ("attention_backend", AttentionBackendEnum.CPU_ATTN),
        ("kv_cache_dtype", "fp8"),
        ("use_heterogeneous_vocab", True),
    ],
)
def test_what_an_adapted_drafter_may_not_have(method, field, value):
    config = drafting(method, "cpu", **{field: value})
    with pytest.raises(UnsupportedError, match=re.escape(f"{field} = {value!r}")):
        drafters.check_drafts(config, AVLConfig())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 64}, "other layers than full attention"),
        ({"is_hybrid": True}, "other layers than full attention"),
        ({"is_attention_free": True}, "other layers than full attention"),
        ({"uses_mrope": True}, "rotary positions in several axes"),
    ],
)
def test_what_a_draft_model_may_not_be(changes, named):
    config = drafting("draft_model", "cpu", draft_model_config=draft_model(**changes))
    with pytest.raises(UnsupportedError, match=named):
        drafters.check_drafts(config, AVLConfig())


def test_a_draft_model_beside_rotary_positions_in_several_axes():
    config = drafting("draft_model", "cpu")
    config.model_config.uses_mrope = True
    with pytest.raises(UnsupportedError, match="rotary positions in several axes"):
        drafters.check_drafts(config, AVLConfig())


def test_untried_multi_token_prediction():
    config = drafting(
        "mtp", "cpu", draft_model_config=draft_model(architectures=["Qwen3_5MTP"])
    )
    with pytest.raises(UnsupportedError, match="by GlmOcrMTPModel, not yet by Qwen3_5"):
        drafters.check_drafts(config, AVLConfig())


READS_ALL = ({}, {"core_ratio": 0.5}, {"core_ratio": 0.2, "refresh_interval": 0})
READS_LESS = ({"core_ratio": 0.2}, {"text_keep_ratio": 0.7})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("method", "can_read_less"),
    [
        ("ngram", True),
        ("suffix", True),
        ("medusa", True),
        ("custom_class", True),
        ("ngram_gpu", False),
        *[(name, False) for name in drafters.ADAPTED_DRAFTERS],
    ],
)
def test_drafts_where_not_all_that_is_stored_is_read(method, can_read_less, device):
    config = drafting(method, device)
    for settings in READS_ALL + (READS_LESS if can_read_less else ()):
        drafters.check_drafts(config, AVLConfig(**settings))
    for settings in () if can_read_less else READS_LESS:
        with pytest.raises(UnsupportedError, match=f"by {method!r} where all that"):
            drafters.check_drafts(config, AVLConfig(**settings))
    # What vLLM 0.33 takes unless it is told otherwise, on its second runner.
    config.scheduler_config.async_scheduling = True
    way_out = "serve with --no-async-scheduling" if can_read_less else "drop --spec"
    for settings in READS_LESS:
        with pytest.raises(UnsupportedError, match=f"by {method!r} .*{way_out}"):
            drafters.check_drafts(config, AVLConfig(**settings))


def test_drafters_of_this_vllm_are_known():
    # 0.33 has no Medusa any more.
    gone = set() if vllm.__version__.startswith("0.32") else {"medusa"}
    known = {*drafters.CACHELESS_DRAFTERS, *drafters.ADAPTED_DRAFTERS}
    assert known - gone < METHODS
    assert not gone & METHODS


def served(method="eagle", num_stages=1, is_async=False, **options):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=is_async),
        additional_config={"avl": options},
        speculative_config=method and SimpleNamespace(method=method),
        parallel_config=SimpleNamespace(pipeline_parallel_size=num_stages),
    )


@pytest.mark.parametrize(
    ("options", "xargs", "named"),
    [
        ({}, {"avl_core_ratio": 0.2}, "core_ratio = 0.2 of store_ratio"),
        ({}, {"avl_text_keep_ratio": 0.7}, "text_keep_ratio = 0.7; let avl_core"),
        ({"core_ratio": 0.5}, {"avl_store_ratio": 0.9}, "= 0.5 of store_rat"),
    ],
)
def test_a_request_to_a_server_with_a_drafter_of_layers_reads_all(
    options, xargs, named
):
    with pytest.raises(VLLMValidationError, match=named):
        request_settings.check(served(**options), xargs)
    request_settings.check(served("ngram", **options), xargs)
    with pytest.raises(VLLMValidationError, match="with --no-async-scheduling, or lea"):
        request_settings.check(served("ngram", is_async=True, **options), xargs)
    request_settings.check(served(**options), xargs | {"avl": 0})
    request_settings.check(served(**options), {"avl_store_ratio": 0.5})
    request_settings.check(
        served(**options), {"avl_preset": "lean", "avl_core_ratio": 0.45}
    )


def test_stages_rank_by_their_own_layers():
    support.check_config(settings(**STAGES), AVLConfig())
    named = "policy = 'fastv' with pipeline parallelism"
    with pytest.raises(UnsupportedError, match=named):
        support.check_config(settings(**STAGES), AVLConfig(policy="fastv"))
    with pytest.raises(UnsupportedError, match="--kv-offloading-size"):
        support.check_config(settings(**STAGES), AVLConfig(), support.OFFLOADING)
    with pytest.raises(VLLMValidationError, match=named):
        request_settings.check(served(None, 2), {"avl_policy": "fastv"})
    request_settings.check(served(None, 2), {"avl_policy": "h2o"})
    request_settings.check(served(None, 1), {"avl_policy": "fastv"})


STAGES = {"parallel_config__pipeline_parallel_size": 2}
CASES = [
    ({"model_config__use_mla": True}, "multi-head latent attention"),
    ({"model_config__is_encoder_decoder": True}, "cross attention"),
    (STAGES | connecting("ExampleConnector"), "drop one of --kv-transfer-config and"),
    (
        STAGES | {"speculative_config": SimpleNamespace(method="ngram")},
        "drop one of --speculative-config and --pipeline-parallel-size",
    ),
    (
        {"parallel_config__decode_context_parallel_size": 2},
        "--decode-context-parallel-size",
    ),
    (
        {"parallel_config__prefill_context_parallel_size": 2},
        "--prefill-context-parallel-size",
    ),
    ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
    (connecting("LMCacheConnectorV1"), "not LMCacheConnectorV1; drop --kv-transfer"),
    (connecting("NixlPushConnector"), "not NixlPushConnector; drop --kv-transfer"),
    (
        connecting("NixlConnector", bidirectional_kv_xfer=True),
        "drop it from kv_connector_extra_config",
    ),
    (connecting("ExampleConnector", "mine"), "alone, not mine; drop --kv-transfer"),
    (
        connecting("ExampleConnector")
        | {"speculative_config": SimpleNamespace(method="ngram")},
        "drop --kv-transfer-config and --kv-offloading-size, or --speculative-co",
    ),
    (
        {
            "cache_config__cache_dtype": "fp8",
            "cache_config__kv_cache_dtype_skip_layers": ["0"],
        },
        "--kv-cache-dtype-skip-layers",
    ),
    ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    (
        {"scheduler_config__max_num_scheduled_tokens": 16},
        "--max-num-scheduled-tokens of at least",
    ),
    (
        {"scheduler_config__long_prefill_token_threshold": 1},
        "--long-prefill-token-threshold of at least 32",
    ),
]


@pytest.mark.parametrize(
    ("change", "named"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_refusal(change, named):
    with pytest.raises(UnsupportedError) as caught:
        support.check_config(settings(**change), AVLConfig())
    message = str(caught.value)
    assert named in message
    assert "or start without --attention-backend avl" in message
    assert "\n" not in message


def test_every_refusal_of_the_table_has_a_case():
    supported, refused = settings(), [settings(**change) for change, _ in CASES]
    for refusal in support.REFUSALS:
        assert not refusal.applies(supported)
        assert any(map(refusal.applies, refused)), refusal.sentence


def test_offloading_by_vllms_own_connectors(monkeypatch):
    def offloading(**options):
        cache = SimpleNamespace(
            **{"kv_offloading_size": 1, "kv_offloading_backend": "native"} | options
        )
        return platform.offloading_connector(cache)

    assert offloading(kv_offloading_size=None) is None
    by_lmcache = offloading(kv_offloading_backend="lmcache")
    with pytest.raises(UnsupportedError, match="by lmcache; choose"):
        support.check_config(settings(), AVLConfig(), by_lmcache)
    assert offloading() == support.OFFLOADING
    hybrid = settings(model_config__is_hybrid=True)
    with pytest.raises(UnsupportedError, match="set VLLM_USE_SIMPLE_KV_OFFLOAD=1"):
        support.check_config(hybrid, AVLConfig(), offloading())
    tiers = {"spec_name": "TieringOffloadingSpec"}
    with pytest.raises(UnsupportedError, match="spec_name = 'Tier.*'; drop it from"):
        support.check_config(
            settings(**connecting("OffloadingConnector", **tiers)), AVLConfig()
        )
    support.check_config(settings(**connecting("OffloadingConnector")), AVLConfig())
    for is_simple in ("0", "1"):
        monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", is_simple)
        support.check_config(settings(), AVLConfig(), offloading())
        with pytest.raises(UnsupportedError, match="drop --kv-transfer-config and"):
            support.check_config(drafting("ngram"), AVLConfig(), offloading())
    assert offloading() == support.SIMPLE_OFFLOADING
    support.check_config(hybrid, AVLConfig(), offloading())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_caches_of_every_dtype_are_served(checkpoints, dtype):
    avl = {"store_ratio": 0.5, "core_ratio": 0.2}
    config = start(checkpoints, dtype=dtype, additional_config={"avl": avl})
    assert config.model_config.dtype in ELEMENTS


def test_other_devices_are_refused(checkpoints, monkeypatch):
    owner = type(current_platform)
    monkeypatch.setattr(owner, "is_cpu", lambda self: False)
    monkeypatch.setattr(owner, "device_name", "tpu", raising=False)
    with pytest.raises(ValueError, match="on CUDA devices, and this platform is tpu"):
        start(checkpoints)


@pytest.mark.parametrize(
    ("feature", "named"),
    [
        ("alibi", "ALiBi"),
        ("sinks", "attention sinks"),
        ("sliding_window", "sliding-window"),
        ("kv_sharing", "KV-cache sharing"),
    ],
)
def test_layers(feature, named):
    features = dict.fromkeys(("alibi", "sinks", "sliding_window", "kv_sharing"), False)
    layers.check_layer(**features)
    with pytest.raises(UnsupportedError, match=named):
        layers.check_layer(**features | {feature: True})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_type": "encoder_decoder"}, "cross attention"),
        ({"use_mla": True}, "MLA"),
        ({"use_per_head_quant_scales": True}, "a scale for each head; choose a"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_attention_types(change, named):
    plain = {
        "attn_type": "decoder",
        "use_mla": False,
        "use_sparse": False,
        "use_per_head_quant_scales": False,
    }
    selector = SimpleNamespace(**plain | change)
    with pytest.raises(UnsupportedError, match=named):
        current_platform.get_attn_backend_cls(AttentionBackendEnum["AVL"], selector)


OUR_CACHES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", get_args(CacheDType))
def test_every_cache_of_vllm_is_supported_or_refused(dtype, device):
    changes = {"cache_config__cache_dtype": dtype, "device_config__device_type": device}
    config = settings(**changes)
    if dtype in OUR_CACHES:
        support.check_config(config, AVLConfig())
        return
    with pytest.raises(UnsupportedError) as caught:
        support.check_config(config, AVLConfig())
    message = str(caught.value)
    assert f"does not support a KV cache of {dtype} on {device} devices" in message
    assert "with --kv-cache-dtype, or start without" in message


def test_models_whose_answers_suffer_from_fp8(caplog):
    for model_type, dtype in (("qwen2_5_vl", "auto"), ("qwen3_vl", "fp8")):
        support.warn_of_quality(model_type, dtype)
    assert not caplog.records
    support.warn_of_quality("qwen2_5_vl", "fp8")
    (record,) = caplog.records
    assert "vllm/issues/41343" in record.message


def spec(kind, **fields):
    import torch

    return kind(
        block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32, **fields
    )


def test_cache_groups():
    ours, plain = spec(AVLSpec), spec(FullAttentionSpec)
    window = spec(SlidingWindowSpec, sliding_window=64)
    assert our_group(groups_of(ours)) == 0
    assert our_group(groups_of(window, ours, window)) == 1
    for config, named in (
        (groups_of(ours, plain), "a FullAttentionSpec group"),
        (groups_of(ours, spec(RSWASpec, rswa_window=64)), "a RSWASpec group"),
        (groups_of(window), "and this one has 0"),
        (groups_of(ours, window, ours), "and this one has 2"),
        (groups_of(), "and this one has 0"),
    ):
        with pytest.raises(UnsupportedError, match=named):
            our_group(config)


def test_windows_chunks_and_recurrent_states_lie_beside_ours():
    window = spec(SlidingWindowSpec, sliding_window=64)
    chunk = spec(ChunkedLocalAttentionSpec, attention_chunk_size=64)
    state = MambaSpec(block_size=32, shapes=((1,),), dtypes=(torch.bfloat16,))
    assert our_group(groups_of(window, state, spec(AVLSpec))) == 2
    assert our_group(groups_of(window, spec(AVLSpec))) == 1
    assert our_group(groups_of(chunk, chunk, spec(AVLSpec))) == 2


def groups_of(*specs):
    groups = [SimpleNamespace(kv_cache_spec=each) for each in specs]
    return SimpleNamespace(kv_cache_groups=groups)


def test_layers_that_are_not_numbered():
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    layers.check_layer_names(names)
    layers.check_layer_names([*names, "draft_model.model.layers.1.attn"])
    for odd in (["attn"], [*names, "model.layers.1.attn"], ["towers.0.layers.1.attn"]):
        with pytest.raises(UnsupportedError, match="attention layers are numbered"):
            layers.check_layer_names(odd)
