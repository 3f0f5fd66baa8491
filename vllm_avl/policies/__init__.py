"""The rules that rank tokens, by the name that settings and requests use.

To add one, subclass `Policy` and enter it here; being here means being tested. Other
packages add theirs as entry points of the group `vllm_avl.policies`.
"""

from importlib.metadata import entry_points
from types import MappingProxyType

from vllm_avl.policies.avl import AVLPolicy
from vllm_avl.policies.base import Policy, TokenView
from vllm_avl.policies.fastv import FastVPolicy
from vllm_avl.policies.full import FullPolicy
from vllm_avl.policies.h2o import H2OPolicy
from vllm_avl.policies.keydiff import KeyDiffPolicy
from vllm_avl.policies.mixkv import MixKVPolicy
from vllm_avl.policies.random import RandomPolicy
from vllm_avl.policies.snapkv import SnapKVPolicy
from vllm_avl.policies.streaming import StreamingPolicy

OURS = {
    "avl": AVLPolicy(),
    "fastv": FastVPolicy(),
    "full": FullPolicy(),
    "h2o": H2OPolicy(),
    "keydiff": KeyDiffPolicy(),
    "mixkv": MixKVPolicy(),
    "random": RandomPolicy(),
    "snapkv": SnapKVPolicy(),
    "streaming": StreamingPolicy(),
}


def installed() -> dict[str, Policy]:
    """Return the policies of other packages.

    Raises:
        ValueError: a name is taken, or is that of something else.
    """
    found: dict[str, Policy] = {}
    for entry in entry_points(group="vllm_avl.policies"):
        kind = entry.load()
        if entry.name in OURS or entry.name in found:
            raise ValueError(
                f"policy {entry.name!r} of {entry.value}: the name is taken"
            )
        if not (isinstance(kind, type) and issubclass(kind, Policy)):
            raise ValueError(
                f"policy {entry.name!r}: {entry.value} is no subclass of "
                "vllm_avl.policies.base.Policy"
            )
        found[entry.name] = kind()
    return found


POLICIES = MappingProxyType(OURS | installed())

__all__ = ["POLICIES", "Policy", "TokenView"]
