"""The name `avl` in every process, and nothing at all where nobody asked for it."""

import pickle
import subprocess
import sys
from abc import ABC, abstractmethod

import preloaded
import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_avl.compat import patches, platform, registry, versions, worker_patches
from vllm_avl.compat.seam import Patch, Seam, unmet_by
from vllm_avl.plugin import register
from vllm_avl.support import UnsupportedError


@pytest.fixture(autouse=True, scope="module")
def _plugins():
    load_general_plugins()


def run(code):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def test_importing_the_package_imports_no_vllm():
    code = "import vllm_avl.plugin, vllm_avl.plan, vllm_avl.config, vllm_avl.support"
    assert run(f"{code}, sys; print('vllm' in sys.modules)") == "False"


def test_leaves_know_no_vllm():
    kernels = "vllm_avl.kernels.cpu, vllm_avl.kernels.cpu.reference"
    code = f"import {kernels}, vllm_avl.kernels.cuda.reference, vllm_avl.plan, sys"
    assert run(f"{code}; print('vllm' in sys.modules)") == "False"


def test_registering_imports_no_worker():
    """Processes that configure or inspect may see no device that one could use."""
    code = "import sys, vllm_avl.plugin as p; p.register()"
    assert run(f"{code}; print('vllm.v1.worker.gpu_worker' in sys.modules)") == "False"


def test_a_worker_refuses_a_vllm_that_does_not_fit(monkeypatch):
    gone = Seam(object, "gone", (), "")
    monkeypatch.setattr(worker_patches, "SEAMS", (gone,))
    worker_patches.apply_all.cache_clear()
    with pytest.raises(UnsupportedError, match=r"object.gone is gone; install a"):
        worker_patches.apply_all()


def test_a_worker_refuses_a_vllm_that_asks_for_more(monkeypatch):
    monkeypatch.setattr(worker_patches, "OURS", (Subclass,))
    worker_patches.apply_all.cache_clear()
    with pytest.raises(UnsupportedError, match="Subclass lacks new; install a"):
        worker_patches.apply_all()


def test_registering_again_changes_nothing():
    before = [getattr(patch.owner, patch.name) for patch in patches.PATCHES]
    register()
    register()
    assert [getattr(patch.owner, patch.name) for patch in patches.PATCHES] == before
    assert registry.is_registered()


def test_the_name_unpickles_before_plugins_load():
    data = pickle.dumps(AttentionBackendEnum["AVL"])
    code = f"import pickle; print(pickle.loads({data!r}).name)"
    assert run(code).splitlines()[-1] == "AVL"
    assert pickle.loads(data) is AttentionBackendEnum["AVL"]


@pytest.mark.parametrize("name", ["avl", "AVL", "Avl"])
def test_the_name_in_any_case(name, checkpoints):
    args = EngineArgs(str(checkpoints("llava")), attention_backend=name)
    config = args.create_engine_config()
    assert platform.is_chosen(config)
    assert config.scheduler_config.scheduler_cls == platform.SCHEDULER
    assert config.parallel_config.worker_cls == platform.CPU.worker
    assert config.cache_config.block_size == 32


def test_a_block_size_of_the_users_stays(checkpoints):
    args = EngineArgs(str(checkpoints("llava")), attention_backend="avl", block_size=64)
    assert args.create_engine_config().cache_config.block_size == 64


def test_blocks_that_are_counted_are_those_of_full_attention(checkpoints):
    config = EngineArgs(str(checkpoints("llava"))).create_engine_config()
    # As an engine with a group of smaller blocks beside ours reports them.
    config.cache_config.block_size = 16
    config.cache_config.effective_attention_block_size = 64
    assert platform.block_size(config) == 64


STOCK_RUN = """
import os, sys
os.environ["VLLM_PLUGINS"] = {plugins!r}
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from benchmarks.testing.engine import Ask, Engine

def main():
    engine = Engine({checkpoint!r}, avl=None, block_size=None)
    config = engine.core.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    print("RESULT", "AVL" in AttentionBackendEnum.__members__)
    print("RESULT", config.compute_hash(), config.cache_config.block_size)
    print("RESULT", type(engine.scheduler), type(engine.runner))
    print("RESULT", {{type(getattr(layer, "impl", None)) for layer in layers}})
    print("RESULT", engine.ask([Ask((1,)), Ask((2, 3)), Ask(())]))

main()
"""


def test_inert_when_not_asked_for(checkpoints):
    """A stock run with us installed is the run without us: same parts, same tokens."""

    def stock_run(plugins):
        code = STOCK_RUN.format(checkpoint=str(checkpoints("llava")), plugins=plugins)
        done = preloaded.run([sys.executable, "-c", code], 200)
        assert done.returncode == 0, done.stderr[-2000:]
        output = done.stdout.splitlines()
        return [line for line in output if line.startswith("RESULT")]

    without, with_us = stock_run("none"), stock_run("avl")
    assert without[0] == "RESULT False"
    assert with_us[0] == "RESULT True"
    assert len(with_us) == 5
    assert without[1:] == with_us[1:]


def test_installed_vllm_fits():
    assert patches.mismatches() == []
    assert worker_patches.mismatches() == []
    assert versions.mismatch() is None


def test_changed_and_missing_functions_are_found():
    class Upstream:
        def build(self, one, two): ...

    assert Seam(Upstream, "build", ("self", "one", "two"), "").mismatch() is None
    changed = Seam(Upstream, "build", ("self", "one"), "").mismatch()
    assert "Upstream.build takes ('self', 'one', 'two')" in changed
    assert Seam(Upstream, "gone", (), "").mismatch() == "Upstream.gone is gone"


def test_a_seam_may_fit_several_versions():
    class Upstream:
        def build(self, one, two): ...

    other = (("self", "one", "two"),)
    assert Seam(Upstream, "build", ("self", "one"), "", also=other).mismatch() is None
    neither = Seam(Upstream, "build", ("self",), "", also=(("one",),)).mismatch()
    assert neither.endswith("not ('self',) or ('one',)")


class Upstream(ABC):
    """A class of vLLM's that has got new methods."""

    @abstractmethod
    def old(self): ...

    @abstractmethod
    def new(self): ...


class Subclass(Upstream):
    def old(self): ...


def test_methods_that_vllm_asks_for_anew_are_found():
    assert unmet_by([Upstream, Subclass, int]) == [
        "Upstream lacks new, old",
        "Subclass lacks new",
    ]


@pytest.mark.parametrize("module", [patches, worker_patches])
def test_they_are_looked_for_in_what_is_ours(module, monkeypatch):
    assert module.mismatches() == []
    monkeypatch.setattr(module, "OURS", (*module.OURS, Subclass))
    assert module.mismatches() == ["Subclass lacks new"]


def test_every_seam_says_why_and_every_patch_when_it_can_go():
    ours = patches, worker_patches
    for seam in (s for module in ours for s in (*module.SEAMS, *module.PATCHES)):
        assert seam.why
        if isinstance(seam, Patch):
            assert seam.until


def test_an_unfit_vllm_leaves_us_off_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(registry, "is_registered", lambda: False)
    monkeypatch.setattr(patches, "mismatches", lambda: ["Scheduler.schedule is gone"])
    monkeypatch.setattr(patches, "apply_all", lambda: pytest.fail("patched"))
    with caplog.at_level("ERROR"):
        register()
    assert "Scheduler.schedule is gone" in caplog.text


def test_an_unknown_version_leaves_us_off_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(registry, "is_registered", lambda: False)
    monkeypatch.setattr(versions, "version", lambda name: "0.99.0")
    monkeypatch.setattr(patches, "apply_all", lambda: pytest.fail("patched"))
    with caplog.at_level("ERROR"):
        register()
    assert "vLLM 0.99.0 is installed" in caplog.text


def test_the_platform_is_the_patched_one():
    assert current_platform.device_type == "cpu"
    owner = type(current_platform)
    assert hasattr(owner.check_and_update_config, "__wrapped__")
