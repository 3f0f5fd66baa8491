"""Models whose weights the server makes up, and the client that asks about pictures."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.testing.models import ModelSize, random_image
from benchmarks.testing.models.architectures import llava_next_parts, llava_parts
from benchmarks.testing.models.tokens import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    PLACEHOLDERS,
)
from vllm_avl.demo.server import (
    ENVIRONMENT,
    Server,
    ServerError,
    picture_url,
    user_message,
)

PREEMPTIONS = "vllm:num_preemptions_total"
TILE, PATCH = 336, 14
TILE_TOKENS = (TILE // PATCH) ** 2
# What the chat template adds to text and pictures, generously.
TEMPLATE_TOKENS = 48
IMAGE = "<image>"
VICUNA_7B = ModelSize(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    intermediate_size=11008,
    max_position_embeddings=4096,
    vision_hidden_size=1024,
    vision_num_layers=24,
    vision_num_heads=16,
    vision_intermediate_size=4096,
)
TINY = ModelSize(
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_size=32,
    intermediate_size=256,
    max_position_embeddings=4096,
    vision_hidden_size=32,
    vision_num_heads=1,
    vision_intermediate_size=64,
)


@dataclass(frozen=True)
class ServedModel:
    """A LLaVA of CLIP-L/14-336's tiles, and the pictures it is asked about."""

    size: ModelSize
    vocab_size: int
    images: int
    """Of a prompt, unless told."""
    image_side: int = TILE
    any_resolution: bool = False
    """Whether a picture larger than a tile is cut into tiles, as LLaVA-NeXT does."""

    @property
    def tokens_per_image(self) -> int:
        """Vision tokens: the tiles', and at any resolution a newline a row."""
        if not self.any_resolution:
            return TILE_TOKENS
        rows = self.image_side // PATCH
        return TILE_TOKENS + rows * (rows + 1)

    def bytes_per_token(self, dtype: str) -> int:
        """Return the size of a token's keys and values in all layers."""
        row = self.size.num_kv_heads * self.size.head_size
        return 2 * self.size.num_layers * row * getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class Workload:
    """Requests of one length to one model: `images` and random text in, text out."""

    model: ServedModel
    images: int
    text_tokens: int
    output_tokens: int
    block_size: int
    dtype: str

    def __post_init__(self) -> None:
        limit = self.model.size.max_position_embeddings
        if self._num_blocks * self.block_size > limit:
            raise ValueError(
                f"images={self.images}, text_tokens={self.text_tokens} and "
                f"output_tokens={self.output_tokens} do not fit into {limit} tokens"
            )

    @property
    def _num_blocks(self) -> int:
        """Blocks of a request's prompt and answer; a newline follows each picture."""
        vision = self.images * (self.model.tokens_per_image + 1)
        text = TEMPLATE_TOKENS + self.text_tokens + self.output_tokens
        return -(-(vision + text) // self.block_size)

    def server_options(self, pool_requests: float, max_num_seqs: int) -> list[str]:
        """Return the options of a server whose pool holds so many of these requests."""
        # The null block is one more.
        pool_blocks = int(pool_requests * self._num_blocks) + 1
        block_bytes = self.block_size * self.model.bytes_per_token(self.dtype)
        return [
            *("--load-format", "dummy", "--dtype", self.dtype),
            *("--block-size", str(self.block_size)),
            *("--kv-cache-memory-bytes", str(pool_blocks * block_bytes)),
            *("--max-model-len", str(self._num_blocks * self.block_size)),
            *("--max-num-seqs", str(max_num_seqs)),
            *("--limit-mm-per-prompt", json.dumps({"image": self.images})),
        ]

    def client_options(self) -> list[str]:
        """Return the options of `vllm bench serve` that make these requests."""
        side = self.model.image_side
        return [
            *("--dataset-name", "random-mm", "--ignore-eos", "--temperature", "0"),
            *("--random-input-len", str(self.text_tokens)),
            *("--random-output-len", str(self.output_tokens)),
            *("--random-mm-base-items-per-request", str(self.images)),
            *("--random-mm-limit-mm-per-prompt", json.dumps({"image": self.images})),
            *("--random-mm-bucket-config", str({(side, side, 1): 1.0})),
        ]

    def question(self) -> dict[str, Any]:
        """Return a chat message of this workload's pictures, always the same."""
        side = self.model.image_side
        pictures = [random_image(seed, side, side) for seed in range(self.images)]
        return user_message("What do they show?", list(map(picture_url, pictures)))


MODELS = {
    "tiny": ServedModel(TINY, vocab_size=1024, images=1),
    "llava-1.5-7b": ServedModel(VICUNA_7B, vocab_size=32064, images=4),
    "llava-next-7b": ServedModel(
        VICUNA_7B, vocab_size=32064, images=1, image_side=672, any_resolution=True
    ),
}


@dataclass(frozen=True)
class Run:
    """What the client and /metrics said about one run."""

    facts: Mapping[str, Any]
    """The client's result file."""
    preemptions: float
    running: Sequence[tuple[float, float]]
    """(seconds, running requests), while any ran or waited."""

    @property
    def peak_running(self) -> float:
        """The most requests seen running."""
        return max(count for _, count in self.running)

    @property
    def mean_running(self) -> float:
        """Running requests, averaged over the samples."""
        return statistics.fmean(count for _, count in self.running)


@dataclass(frozen=True)
class Client:
    """Runs `vllm bench serve` against a server that it watches meanwhile."""

    server: Server
    xargs: Mapping[str, float]
    concurrency: int
    scrape_seconds: float
    limit_seconds: float

    def run(self, workload: Workload, count: int, seed: int, stem: Path) -> Run:
        """Send `count` requests; leave the client's log and result at `stem`.

        Raises:
            ServerError: the client or a request of it failed, or took too long.
        """
        log, result = stem.with_name(stem.name + ".log"), Path(f"{stem}.json")
        result.unlink(missing_ok=True)
        before = self.server.metric(PREEMPTIONS)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._command(count, seed, result), *workload.client_options()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT},
            )
            try:
                running = self._watch(process)
            finally:
                process.kill()
                process.wait()
        facts = json.loads(result.read_text()) if result.exists() else {}
        if (
            not running
            or facts.get("total_output_tokens") != count * workload.output_tokens
        ):
            raise ServerError(
                f"{facts.get('completed', 0)} of {count} requests were answered, "
                f"{len(running)} looks at /metrics saw some: "
                f"see {log} and {self.server.log}"
            )
        return Run(facts, self.server.metric(PREEMPTIONS) - before, running)

    def _command(self, count: int, seed: int, result: Path) -> list[str]:
        return [
            *(str(Path(sys.executable).with_name("vllm")), "bench", "serve"),
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", self.server.url, "--model", self.server.model),
            *("--num-prompts", str(count), "--seed", str(seed)),
            *("--max-concurrency", str(self.concurrency)),
            *("--extra-body", json.dumps({"vllm_xargs": dict(self.xargs)})),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "90"),
            *("--save-result", "--disable-tqdm", "--result-dir", str(result.parent)),
            *("--result-filename", result.name),
        ]

    def _watch(self, process: subprocess.Popen[bytes]) -> list[tuple[float, float]]:
        """Read /metrics until the client ends; return what was seen while it asked."""
        seen = []
        start = time.monotonic()
        end = start + self.limit_seconds
        while process.poll() is None and time.monotonic() < end:
            metrics = self.server.metrics()
            running = metrics.total("vllm:num_requests_running")
            if running or metrics.total("vllm:num_requests_waiting"):
                seen.append((time.monotonic() - start, running))
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.scrape_seconds)
        return seen


def write(name: str, folder: Path) -> Path:
    """Write the files of `MODELS[name]` into `folder`, for `--load-format dummy`."""
    model = MODELS[name]
    architecture = "llava_next" if model.any_resolution else "llava"
    tokenizer = _tokenizer(model.vocab_size, PLACEHOLDERS[architecture])
    config: transformers.PretrainedConfig
    if model.any_resolution:
        config, processor = llava_next_parts(model.size, tokenizer, TILE)
        config.architectures = ["LlavaNextForConditionalGeneration"]
    else:
        config, processor = llava_parts(model.size, tokenizer)
        config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int, placeholder: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and made-up words: each id decodes to some text."""
    special = [BOS, EOS, PAD, IMAGE]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = _words(vocab_size - len(alphabet) - len(special))
    vocab = {token: index for index, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    fast.add_tokens([IMAGE], special_tokens=True)
    fast.chat_template = CHAT_TEMPLATE.replace("IMAGE", repr(placeholder))
    return fast


def _words(count: int) -> Sequence[str]:
    """Return words of four letters with the space before them, as vocabularies do."""
    letters = itertools.product(string.ascii_lowercase, repeat=4)
    return ["Ġ" + "".join(word) for word in itertools.islice(letters, count)]
