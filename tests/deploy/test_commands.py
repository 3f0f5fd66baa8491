"""The commands that deploy/ gives to vLLM, read by vLLM's own parser and by ours."""

import re

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deploy.prometheus import DEPLOY
from vllm_avl.config import parse_config


def compose() -> list[str]:
    text = (DEPLOY / "compose" / "compose.yaml").read_text()
    command = yaml.safe_load(text)["services"]["vllm"]["command"]
    filled = [re.sub(r"\$\{STORE_RATIO:-(.*?)\}", r"\1", part) for part in command]
    return ["MODEL", *filled[1:]]


def kserve() -> list[str]:
    text = (DEPLOY / "kubernetes" / "kserve-runtime.yaml").read_text()
    container = next(yaml.safe_load_all(text))["spec"]["containers"][0]
    program, verb, *rest = container["command"]
    assert (program, verb) == ("vllm", "serve")
    return [*rest, *container["args"]]


def production_stack() -> list[str]:
    text = (DEPLOY / "kubernetes" / "production-stack-values.yaml").read_text()
    (model,) = yaml.safe_load(text)["servingEngineSpec"]["modelSpec"]
    return [model["modelURL"], *model["vllmConfig"]["extraArgs"]]


@pytest.mark.parametrize("command", [compose, kserve, production_stack])
def test_vllm_takes_the_command(command):
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(command())
    assert str(arguments.attention_backend).lower().endswith("avl")
    config = parse_config(arguments.additional_config)
    assert config.store_ratio == 0.5


def test_ray_gives_arguments_that_the_engine_has():
    text = (DEPLOY / "ray" / "app.py").read_text()
    engine = re.search(r"engine_kwargs=\{(.*?)\*\*", text, re.DOTALL).group(1)
    names = set(re.findall(r'^ {12}"(\w+)":', engine, re.MULTILINE))
    assert names == {"attention_backend", "additional_config", "tensor_parallel_size"}
    assert names <= set(AsyncEngineArgs.__dataclass_fields__)
