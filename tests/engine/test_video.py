"""A video's tokens are vision tokens: kept and evicted as those of pictures are."""

import numpy as np
import pytest
from vllm import SamplingParams

from benchmarks.testing.engine import Engine
from benchmarks.testing.models.tokens import BOS

PLACEHOLDERS = {
    "qwen2_5_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>",
    "llava_onevision": "<video>\n",
}
NUM_FRAMES, SIDE = 6, 168
STORE = {"avl_store_ratio": 0.3}
QUESTIONS = ["What happens here?", "And then? " * 4, "?"]


def video(seed):
    """Frames [NUM_FRAMES, SIDE, SIDE, 3], and what a processor may ask about them."""
    frames = np.random.default_rng(seed).integers(
        0, 256, (NUM_FRAMES, SIDE, SIDE, 3), np.uint8
    )
    about = {
        "fps": 2.0,
        "duration": NUM_FRAMES / 2,
        "total_num_frames": NUM_FRAMES,
        "frames_indices": list(range(NUM_FRAMES)),
        "video_backend": "none",
        "do_sample_frames": False,
    }
    return frames, about


def prompt(name, seed, question):
    return {
        "prompt": f"{BOS}USER:{PLACEHOLDERS[name]}{question}\nASSISTANT:",
        "multi_modal_data": {"video": [video(seed)]},
    }


@pytest.fixture(scope="module", params=PLACEHOLDERS)
def pair(request, checkpoints):
    name = request.param
    options = {"limit_mm_per_prompt": {"video": 1}, "max_num_batched_tokens": 4096}
    engines = [
        Engine(checkpoints(name), name, avl=avl, **options)
        for avl in (None, {"introspection": 4})
    ]
    yield name, *engines
    for engine in engines:
        engine.shutdown()


def answers(name, engine, questions=QUESTIONS, **xargs):
    """Answer questions about videos, a video a question, in one batch."""
    params = SamplingParams(
        max_tokens=12, temperature=0.0, ignore_eos=True, extra_args=xargs or None
    )
    prompts = [prompt(name, len(question), question) for question in questions]
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_videos(pair):
    name, stock, ours = pair
    expected = answers(name, stock)
    assert answers(name, ours, avl=0) == expected
    assert answers(name, ours, avl_store_ratio=1.0) == expected
    ours.llm.reset_prefix_cache()
    together = answers(name, ours, **STORE)
    assert together != expected
    for question, of_batch in zip(QUESTIONS, together, strict=True):
        ours.llm.reset_prefix_cache()
        assert answers(name, ours, [question], **STORE) == [of_batch]
    # A second question about a video that lies in the prefix cache.
    assert answers(name, ours, QUESTIONS[-1:], **STORE) == together[-1:]
    ours.check_integrity()
    check_kept(ours)


def check_kept(engine):
    """Assert that blocks came free, of the last request's video alone."""
    worker = engine.core.model_executor.driver_worker.worker
    report = worker.avl_report(worker.avl_requests()[-1])
    vision = {p for start, end in report.vision_ranges for p in range(start, end)}
    assert len(vision) > 60
    assert report.num_blocks_freed > 0
    for layer in report.layers:
        for gone in layer.evicted:
            assert set(gone) <= vision
            assert len(gone) == 32 * report.num_blocks_freed
