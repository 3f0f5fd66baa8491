"""Lets PyPI's torchvision be imported beside a CPU build of torch.

PyPI's torchvision is a CUDA build: its operators do not load without CUDA, and its own
import then fails for the two operators it registers fake kernels for. Defining their
schemas first is enough for vLLM and transformers (transforms, not operators).
Installed by setup.sh as a `.pth` start-up hook; torchvision's CPU build needs none.
"""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DefineSchemasFirst(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            library.define(schema)
        # A Library takes its definitions back when it is collected.
        module._cpu_schemas = library  # type: ignore[attr-defined]
        self._loader.exec_module(module)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DefineSchemasFirst(spec.loader)
        return spec


sys.meta_path.insert(0, _TorchvisionFinder())
