import pytest

from standin import checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint small enough for interpreted kernels."""
    return checkpoint.build(tmp_path_factory.mktemp("standin") / "llava")
