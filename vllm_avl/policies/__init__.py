"""The rules that rank tokens, by the name that settings and requests use.

To add one, subclass `Policy` and enter it here; being here means being tested.
"""

from types import MappingProxyType

from vllm_avl.policies.avl import AVLPolicy
from vllm_avl.policies.base import Policy, TokenView
from vllm_avl.policies.fastv import FastVPolicy
from vllm_avl.policies.full import FullPolicy
from vllm_avl.policies.h2o import H2OPolicy
from vllm_avl.policies.random import RandomPolicy
from vllm_avl.policies.snapkv import SnapKVPolicy
from vllm_avl.policies.streaming import StreamingPolicy

POLICIES = MappingProxyType(
    {
        "avl": AVLPolicy(),
        "fastv": FastVPolicy(),
        "full": FullPolicy(),
        "h2o": H2OPolicy(),
        "random": RandomPolicy(),
        "snapkv": SnapKVPolicy(),
        "streaming": StreamingPolicy(),
    }
)

__all__ = ["POLICIES", "Policy", "TokenView"]
