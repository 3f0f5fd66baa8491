"""The name `avl` on the command line."""

import pytest
from vllm.engine.arg_utils import EngineArgs


@pytest.mark.parametrize("name", ["avl", "AVL", "Avl"])
def test_the_name_is_accepted_in_any_case(checkpoints, name):
    args = EngineArgs(model=str(checkpoints("llava")), attention_backend=name)
    backend = args.create_engine_config().attention_config.backend
    assert backend is not None
    assert backend.name == "AVL"
