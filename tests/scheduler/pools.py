"""A block manager without an engine: requests are scheduled and settled by hand."""

from collections import Counter

import torch
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_avl.config import AVLConfig
from vllm_avl.plan import make_plan
from vllm_avl.scheduler.manager import AVLManager
from vllm_avl.scheduler.spec import AVLSpec

BLOCK_SIZE = 4
PROMPT = 42
"""2 text, 36 vision, 4 text: 10 full blocks and 2 rows."""
VISION = ((2, 38),)
NUM_FULL = 10


class Pool:
    """A pool of blocks, and the requests that hold some."""

    def __init__(self, num_blocks, caching=True, copies_shared=False):
        load_general_plugins()
        init_none_hash(sha256)
        spec = AVLSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.float32
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self.blocks = KVCacheManager(
            # And the null block.
            KVCacheConfig(num_blocks + 1, [], groups),
            max_model_len=1000,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            enable_caching=caching,
        )
        (self.manager,) = self.blocks.coordinator.single_type_managers
        assert type(self.manager) is AVLManager
        self.manager.copies_shared = copies_shared
        self.pool = self.blocks.block_pool
        self.requests, self.in_flight = {}, []

    # What a scheduler does.

    def add(self, name, first=1, num_prompt=PROMPT, **settings):
        """Make a request; `avl=False` for one that is served as stock."""
        stock = settings.pop("avl", True) is False
        tokens = [first] * VISION[0][0] + [9] * (num_prompt - VISION[0][0])
        request = Request(
            name,
            tokens,
            SamplingParams(max_tokens=900, ignore_eos=True),
            None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
        )
        if stock:
            request.plan = None
        else:
            settings = {"observation_window": 1} | settings
            config = AVLConfig(**settings)
            request.plan = make_plan(num_prompt, VISION, BLOCK_SIZE, config)
            assert request.plan is not None
        self.requests[name] = request
        return request

    def schedule(self, *chunks):
        """Take a step of `(name, new tokens)`; return what workers are told.

        A chunk of a prompt says how much of it is computed then, hits included; None is
        the rest of the prompt, or a token of the answer.
        """
        self.open()
        for name, num_new in chunks:
            assert self.allocate(name, num_new), f"no room for {name}"
        return self.close()

    def open(self):
        """Begin a step."""
        self.blocks.new_step_starts()
        self.scheduled = {}

    def allocate(self, name, num_new=None, must_fit=False):
        """Give a request its blocks in the step; False where there is no room."""
        request = self.requests[name]
        hits, num_hits = None, 0
        if name not in self.manager.req_to_blocks:
            if request.plan is not None:
                self.manager.admit(request, request.plan)
            hits, num_hits = self.look_up(request)
        computed = request.num_computed_tokens + num_hits
        if num_new is None:
            num_new = max(request.num_prompt_tokens - computed, 1)
        elif computed < request.num_prompt_tokens:
            num_new -= computed
        given = self.blocks.allocate_slots(
            request, num_new, num_hits, hits, full_sequence_must_fit=must_fit
        )
        if given is None:
            return False
        request.num_computed_tokens = computed
        self.scheduled[name] = num_new
        return True

    def look_up(self, request):
        """Search the prefix cache as far as the request may."""
        every = request.block_hashes
        if request.plan is not None:
            request.block_hashes = every[: request.plan.max_hit_tokens // BLOCK_SIZE]
        hits, num_hits, _ = self.blocks.get_computed_blocks(request)
        request.block_hashes = every
        return hits, num_hits

    def close(self):
        """End the step; it is in flight from now on."""
        for name, num_new in self.scheduled.items():
            self.requests[name].num_computed_tokens += num_new
            self.requests[name].num_in_flight_tokens += num_new
        self.in_flight.append(self.scheduled)
        told = self.manager.take_compactions(self.scheduled)
        self.check()
        return told

    def settle(self):
        """Let the oldest step have run."""
        for name, num_new in self.in_flight.pop(0).items():
            request = self.requests.get(name)
            if request is not None:
                request.num_in_flight_tokens -= num_new
                if request.num_computed_tokens >= request.num_prompt_tokens:
                    request.append_output_token_ids(7)
        self.check()

    def run(self, *chunks):
        """Take a step, and let it run."""
        told = self.schedule(*chunks)
        self.settle()
        return told

    def preempt(self, name):
        """Take a request's blocks; it may come again."""
        self.blocks.free(self.requests[name])
        self.scheduled.pop(name, None)
        request = self.requests[name]
        request.num_computed_tokens = request.num_in_flight_tokens = 0

    def finish(self, name):
        """A request is over."""
        self.blocks.free(self.requests.pop(name))
        self.check()

    # What tests look at.

    @property
    def num_free(self):
        return self.pool.get_num_free_blocks()

    def ids(self, name):
        """Blocks of a request in their places; 0 where one was given back."""
        return [block.block_id for block in self.manager.req_to_blocks[name]]

    def hashed(self, *block_ids):
        return [self.pool.blocks[i].block_hash is not None for i in block_ids]

    def num_hits(self, name, first=1, **options):
        """Blocks that a request would find in the prefix cache now."""
        probe = self.add(name, first, **options)
        del self.requests[name]
        return self.look_up(probe)[1] // BLOCK_SIZE

    def levels(self):
        """The gauges after a step."""
        return self.manager.tally.take(self.pool, 1, engaged=True).levels

    def check(self):
        """Assert that free and held blocks are all blocks, each counted right."""
        lists = [*self.manager.req_to_blocks.values()]
        lists += [known.private for known in self.manager.adapted.values()]
        held = Counter(b.block_id for blocks in lists for b in blocks if not b.is_null)
        assert self.num_free + len(held) == len(self.pool.blocks) - 1
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], block
        for name, known in self.manager.adapted.items():
            written = [*known.private, *self.manager.req_to_blocks[name][NUM_FULL:]]
            if known.plan.num_full_blocks != NUM_FULL:
                continue
            if known.plan.moves_rows:
                written += known.targets or ()
                if known.retired:
                    written += self.manager.req_to_blocks[name]
            for block in written:
                if not block.is_null:
                    assert block.ref_cnt == 1, f"{name} shares {block}"
                    assert block.block_hash is None, f"{name} shares {block}"
