"""Settings: what is refused, and in which words."""

import pytest

from vllm_avl.config import PRESETS, AVLConfig, parse_config, settings_of_request


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"store_ratio": 1.5}, "store_ratio = 1.5: must be a number in"),
        ({"store_ratio": 0}, "store_ratio = 0: must be a number in (0,"),
        ({"store_ratio": -1}, "store_ratio = -1: must be"),
        ({"store_ratio": "0.5"}, "store_ratio = '0.5': must be a number"),
        ({"store_ratio": float("nan")}, "store_ratio = nan: must be"),
        ({"store_ratio": True}, "store_ratio = True: must be a number"),
        (
            {"preset": "fat"},
            "additional_config.avl.preset = 'fat': must be one of balanced, lean, or",
        ),
        ({"preset": ["lean"]}, "preset = ['lean']: must be one of balanced, lean"),
        (
            {"observation_window": 0},
            "observation_window = 0: must be an integer from 1",
        ),
        ({"observation_window": 1.5}, "observation_window = 1.5: must be an integer"),
        (
            {"ratio": 0.5},
            "ratio: unknown setting; known are preset, policy, store_",
        ),
        ({"policy": "best"}, "policy = 'best': must be one of avl, fastv, full, h2o"),
        ({"policy": []}, "policy = []: must be one of avl"),
        ({"core_ratio": 0}, "core_ratio = 0: must be a number in (0, 1]"),
        (
            {"core_ratio": 0.6},
            "core_ratio = 0.6: must be at most the store ratio 0.5",
        ),
        ({"refresh_interval": -1}, "refresh_interval = -1: must be an int"),
        ({"refresh_interval": 1.5}, "refresh_interval = 1.5: must be an int"),
        ({"refresh_interval": True}, "refresh_interval = True: must be an"),
        ({"text_keep_ratio": 1.1}, "text_keep_ratio = 1.1: must be a number in (0, 1]"),
        ({"head_reduction": "sum"}, "head_reduction = 'sum': must be mean or max"),
        ({"executor": "pack"}, "executor: unknown setting; known are preset, policy"),
        ({"attention": "fa3"}, "attention = 'fa3': must be auto, flash or triton"),
        (
            {"refresh_all_ranks": "no"},
            "refresh_all_ranks = 'no': must be true or",
        ),
        ({"introspection": -1}, "introspection = -1: must be an integer from 0 to"),
        ([], "additional_config.avl = []: must be an object"),
    ],
)
def test_bad_settings_name_field_value_and_range(settings, line):
    with pytest.raises(ValueError, match="additional_config.avl") as caught:
        parse_config({"avl": settings})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_all_named():
    with pytest.raises(ValueError, match="store_ratio.*observation_window"):
        parse_config({"avl": {"store_ratio": 2, "observation_window": 0}})


def test_defaults_and_others_settings():
    assert parse_config({}) == AVLConfig()
    assert parse_config({"another": 1, "avl": {}}) == AVLConfig()
    # JSON has no floats without a point.
    assert parse_config({"avl": {"store_ratio": 1}}).store_ratio == 1


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
        ({"avl_policy": "h20"}, "vllm_xargs.avl_policy = 'h20': must be one of avl, f"),
        ({"avl_core_ratio": 1.2}, "vllm_xargs.avl_core_ratio = 1.2: must be a number"),
        ({"avl_refresh_interval": -2}, "vllm_xargs.avl_refresh_interval = -2: must be"),
        ({"avl_refresh_interval": 2.5}, "avl_refresh_interval = 2.5: must be an int"),
        ({"avl_text_keep_ratio": "1"}, "avl_text_keep_ratio = '1': must be a number"),
        ({"avl_preset": "fat"}, "avl_preset = 'fat': must be one of balanced, lean"),
        ({"avl_preset": 1}, "vllm_xargs.avl_preset = 1: must be one of balanced"),
        ({"avl_stor_ratio": 1}, "vllm_xargs.avl_stor_ratio: unknown setting; known"),
    ],
)
def test_bad_arguments_name_field_value_and_range(arguments, line):
    with pytest.raises(ValueError, match="vllm_xargs") as caught:
        settings_of_request(arguments, AVLConfig())
    assert line in str(caught.value)


def test_settings_of_requests():
    config = AVLConfig()
    assert settings_of_request(None, config) is config
    others = {"kv_transfer_params": {}, "avlanche": 1}
    assert settings_of_request(others, config) is config
    assert settings_of_request({"avl": 1}, config) == config
    assert settings_of_request({"avl": 0}, config) is None
    assert settings_of_request({"avl_store_ratio": 0.2}, config) == AVLConfig(
        store_ratio=0.2
    )


def test_what_is_set_beside_a_preset_wins():
    assert parse_config({"avl": {"preset": "lean"}}) == AVLConfig(
        preset="lean", **PRESETS["lean"]
    )
    # docs/settings.md says so.
    assert (
        AVLConfig(preset="balanced").model_copy(update={"preset": None}) == AVLConfig()
    )
    settings = {"preset": "lean", "store_ratio": 0.4, "core_ratio": 0.1}
    config = parse_config({"avl": settings})
    assert (config.store_ratio, config.core_ratio) == (0.4, 0.1)


def test_a_requests_preset_takes_nothing_from_the_server_but_what_it_leaves_open():
    server = AVLConfig(
        policy="h2o",
        store_ratio=0.9,
        core_ratio=0.8,
        refresh_interval=7,
        observation_window=3,
    )
    config = settings_of_request({"avl_preset": "lean"}, server)
    expected = {"preset": "lean", **PRESETS["lean"]}
    assert config == server.model_copy(update=expected)
    own = {"avl_preset": "lean", "avl_store_ratio": 0.6}
    changed = settings_of_request(own, server)
    assert (changed.store_ratio, changed.read_ratio) == (0.6, 0.6)


def test_every_setting_of_a_request():
    arguments = {
        "avl_policy": "h2o",
        "avl_store_ratio": 0.4,
        "avl_core_ratio": 0.2,
        "avl_refresh_interval": 5,
        "avl_text_keep_ratio": 0.7,
    }
    assert settings_of_request(arguments, AVLConfig()) == AVLConfig(
        policy="h2o",
        store_ratio=0.4,
        core_ratio=0.2,
        refresh_interval=5,
        text_keep_ratio=0.7,
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"avl_core_ratio": 0.6}, "vllm_xargs.avl_core_ratio = 0.6: must be at most"),
        (
            {"avl_store_ratio": 0.2},
            "the server's core_ratio = 0.3: must be at most the store ratio 0.2",
        ),
    ],
    ids=["core-too-large", "store-below-the-servers-core"],
)
def test_core_is_a_part_of_what_is_stored(arguments, line):
    with pytest.raises(ValueError, match="must be at most") as caught:
        settings_of_request(arguments, AVLConfig(core_ratio=0.3))
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"core_ratio": 0.5}, 0),
        ({"core_ratio": 0.2, "refresh_interval": 1}, 0),
        ({"core_ratio": 0.2}, 1),
        ({"core_ratio": 0.2, "policy": "random"}, 1),
        ({"core_ratio": 0.2, "policy": "h2o"}, 2),
        ({"core_ratio": 0.2, "text_keep_ratio": 0.9}, 2),
        ({"text_keep_ratio": 0.9}, 0),
    ],
    ids=str,
)
def test_lists_of_core_that_a_servers_requests_need(settings, expected):
    assert AVLConfig(**settings).num_lists == expected


def test_core_follows_the_store_ratio_unless_it_is_set():
    assert AVLConfig(store_ratio=0.2).read_ratio == 0.2
    changed = settings_of_request({"avl_store_ratio": 0.1}, AVLConfig())
    assert changed.read_ratio == 0.1
