import pytest

from standin import checkpoint
from standin.process import Series


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint small enough for interpreted kernels."""
    return checkpoint.build(tmp_path_factory.mktemp("standin") / "llava")


@pytest.fixture(scope="module")
def answer():
    """Answer specifications as `generate` does, in one process for equal options."""
    started = {}

    def answer(model, spec, *options, **environment):
        key = options, tuple(sorted(environment.items()))
        if key not in started or started[key].has_ended:
            started[key] = Series(*options, **environment)
        return started[key].answer(model, spec)

    yield answer
    for series in started.values():
        series.end()
