"""What `vllm serve` says when it must not start."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from preloaded import serve

from vllm_avl.demo.server import ONE_THREAD, ServerError, json_option

CASES = {
    "ratio": (
        json_option("--additional-config", {"avl": {"store_ratio": 1.5}}),
        "additional_config.avl.store_ratio = 1.5: must be a number in (0, 1]",
    ),
    "unknown": (
        json_option("--additional-config", {"avl": {"stored_ratio": 0.5}}),
        "additional_config.avl.stored_ratio: unknown setting; known are "
        "preset, policy, store_ratio",
    ),
    "speculative": (
        (
            *json_option(
                "--speculative-config",
                {"method": "extract_hidden_states", "num_speculative_tokens": 1},
            ),
        ),
        "--attention-backend avl does not support speculative decoding by "
        "'extract_hidden_states', which has",
    ),
}
LAST_LINES = 4


@pytest.fixture(scope="module")
def failures(checkpoints, tmp_path_factory) -> dict[str, str]:
    """How each start failed; they run side by side."""
    model, logs = checkpoints("llava"), tmp_path_factory.mktemp("logs")

    def start(name: str) -> str:
        options = ["--attention-backend", "avl", *CASES[name][0]]
        with (
            pytest.raises(ServerError) as failure,
            serve(model, options, log=logs / name, environment=ONE_THREAD),
        ):
            pass
        return str(failure.value)

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(start, CASES), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_refused_start_ends_with_one_line_that_says_why(failures, name):
    failure = failures[name]
    assert "vllm serve ended with exit status 1;" in failure, failure
    last = failure.splitlines()[-LAST_LINES:]
    assert sum(CASES[name][1] in line for line in last) == 1, failure
