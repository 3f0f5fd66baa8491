"""Settings: what is refused, and in which words."""

import pytest

from vllm_avl.config import AVLConfig, parse_config, parse_overrides


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"vision_store_ratio": 1.5}, "vision_store_ratio = 1.5: must be a number in"),
        ({"vision_store_ratio": 0}, "vision_store_ratio = 0: must be a number in (0,"),
        ({"vision_store_ratio": -1}, "vision_store_ratio = -1: must be"),
        ({"vision_store_ratio": "0.5"}, "vision_store_ratio = '0.5': must be a number"),
        ({"vision_store_ratio": float("nan")}, "vision_store_ratio = nan: must be"),
        ({"vision_store_ratio": True}, "vision_store_ratio = True: must be a number"),
        (
            {"observation_window": 0},
            "observation_window = 0: must be an integer from 1",
        ),
        ({"observation_window": 1.5}, "observation_window = 1.5: must be an integer"),
        ({"ratio": 0.5}, "ratio: unknown setting; known are vision_store_ratio"),
        ([], "additional_config.avl = []: must be an object"),
    ],
)
def test_bad_settings_name_field_value_and_range(settings, line):
    with pytest.raises(ValueError, match="additional_config.avl") as caught:
        parse_config({"avl": settings})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_all_named():
    with pytest.raises(ValueError, match="vision_store_ratio.*observation_window"):
        parse_config({"avl": {"vision_store_ratio": 2, "observation_window": 0}})


def test_defaults_and_others_settings():
    assert parse_config({}) == AVLConfig()
    assert parse_config({"another": 1, "avl": {}}) == AVLConfig()
    # JSON has no floats without a point.
    assert parse_config({"avl": {"vision_store_ratio": 1}}).vision_store_ratio == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"avl": 2}, "vllm_xargs.avl = 2: must be 0 or 1"),
        ({"avl": "yes"}, "vllm_xargs.avl = 'yes': must be 0 or 1"),
        ({"avl": "0"}, "vllm_xargs.avl = '0': must be 0 or 1"),
        ({"avl": 1.0}, "vllm_xargs.avl = 1.0: must be 0 or 1"),
        ({"AVL": 0}, "vllm_xargs.AVL: unknown setting; known are avl"),
        ({"avl_store_ratio": True}, "vllm_xargs.avl_store_ratio = True: must be"),
        ({"avl_store_ratio": 0}, "vllm_xargs.avl_store_ratio = 0: must be a number in"),
        ({"avl_store_ratio": "x"}, "vllm_xargs.avl_store_ratio = 'x': must be"),
        ({"avl_stor_ratio": 1}, "vllm_xargs.avl_stor_ratio: unknown setting; known"),
    ],
)
def test_bad_overrides_name_field_value_and_range(arguments, line):
    with pytest.raises(ValueError, match="vllm_xargs") as caught:
        parse_overrides(arguments)
    assert line in str(caught.value)


def test_overrides():
    config = AVLConfig()
    assert parse_overrides(None).apply(config) is config
    assert parse_overrides({"kv_transfer_params": {}, "avlanche": 1}).avl
    assert not parse_overrides({"avl": 0}).avl
    assert parse_overrides({"avl_store_ratio": 0.2}).apply(config) == AVLConfig(
        vision_store_ratio=0.2
    )
