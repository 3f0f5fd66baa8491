"""Schedulers driven by hand: no model, no worker, made-up tokens."""

import copy

from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_avl.messages import received_compactions

BLOCK_SIZE = 32


def make_scheduler(
    kind,
    core,
    num_blocks,
    avl,
    max_model_len=4096,
    retention_interval=0,
    **scheduler_config,
):
    """A scheduler of class `kind` with the configuration of a running engine's core."""
    config = copy.copy(core.vllm_config)
    config.model_config = copy.copy(config.model_config)
    config.model_config.max_model_len = max_model_len
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.additional_config = {"avl": avl}
    for name, value in scheduler_config.items():
        setattr(config.scheduler_config, name, value)
    kv_cache_config = copy.deepcopy(core.scheduler.kv_cache_config)
    kv_cache_config.prefix_cache_retention_interval = retention_interval
    kv_cache_config.num_blocks = num_blocks
    return kind(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=core.structured_output_manager,
        block_size=core.scheduler.block_size,
        hash_block_size=core.scheduler.hash_block_size,
        log_stats=False,
    )


def request(request_id, num_images, max_tokens, text=20):
    """A request about pictures 0 to num_images - 1, `text` tokens around each."""
    pictures = [(image, 576, text) for image in range(num_images)]
    return asked(request_id, text, pictures, max_tokens)


def asked(
    request_id,
    in_front,
    pictures,
    max_tokens,
    priority=0,
    hash_block_size=BLOCK_SIZE,
    **xargs,
):
    """A request; of each picture its name, its tokens and those of text behind it."""
    init_none_hash(sha256)
    features, tokens = [], [1] * in_front
    for image, size, behind in pictures:
        features.append(
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier=f"image-{image}",
                mm_position=PlaceholderRange(offset=len(tokens), length=size),
                mm_hash=f"image-{image}",
            )
        )
        tokens += [2] * size + [3] * behind
    return Request(
        request_id,
        tokens,
        SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args=xargs or None
        ),
        None,
        mm_features=features,
        priority=priority,
        block_hasher=get_request_block_hasher(hash_block_size, sha256),
    )


def outputs_of(output):
    ids = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )


def settle(scheduler, output):
    """Hand a step's result back; chunks of a prompt sample nothing."""
    result = outputs_of(output)
    for i, request_id in enumerate(result.req_ids):
        if request_id in output.avl_partial:
            result.sampled_token_ids[i] = []
    scheduler.update_from_output(output, result)


def walk_lengths(scheduler, lengths, behind, size):
    """Let prompts of these lengths end, all queued at once; count adapted ones.

    Args:
        scheduler: made by `make_scheduler`.
        lengths: of prompts, in tokens.
        behind: tokens behind the one picture, cyclically.
        size: of the picture where a prompt has room for it; else it is smaller.

    Raises:
        AssertionError: a step schedules nobody, or somebody is never done.
    """
    for index, length in enumerate(lengths):
        text = min(behind[index % len(behind)], length)
        image = min(size, length - text)
        pictures = [(f"{image}", image, text)] if image else []
        in_front = length - image - (text if image else 0)
        one = asked(
            f"{length}-{text}",
            in_front,
            pictures,
            max_tokens=2,
            hash_block_size=scheduler.hash_block_size,
        )
        assert one.num_prompt_tokens == length
        scheduler.add_request(one)
    num_adapted = 0
    while scheduler.has_unfinished_requests():
        output = scheduler.schedule()
        num_adapted += len(received_compactions(output))
        running = [
            (r.request_id, r.num_computed_tokens)
            for r in (*scheduler.running, *scheduler.waiting)
        ]
        assert output.num_scheduled_tokens, f"nobody progresses: {running[:9]}"
        finish_step(scheduler, output)
    return num_adapted


def finish_step(scheduler, output):
    """Let a step sample, but for chunks of prompts."""
    result = outputs_of(output)
    for i, request_id in enumerate(result.req_ids):
        if scheduler.requests[request_id].is_prefill_chunk:
            result.sampled_token_ids[i] = []
    scheduler.update_from_output(output, result)
