"""A-VL, read off the method and run on Hugging Face weights.

Eager, batch 1, fp32; no paging, no blocks, no moves: the cache keeps every token, and
what a step reads is a mask for each layer and KV head. It shares no code with the
product. Handed in are the COUNTS that follow from whole blocks, and the tokens.

Where two scores are too close for two implementations to agree on, the product's choice
is taken over, so that everything behind it can be compared too; any other difference is
an error.
"""

from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal

import torch
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor

CLOSE = 1e-5
"""Scores that differ by less, relative to the largest, cannot be told apart."""


@dataclass
class Settings:
    """What the oracle needs to know of a request."""

    policy: str = "avl"
    interval: int = 3
    text_keep: float = 1.0
    text_heavy: float = 0.7
    text_min: int = 20
    reduction: str = "mean"
    window: int = 1
    block_size: int = 32
    num_full_tokens: int = 0
    """Tokens of whole prompt blocks: only they are ranked."""
    num_stored_rows: int = 0
    """Of those, how many stay stored."""
    num_core_rows: int = 0
    """Of those, how many an ordinary step reads."""

    @property
    def any_token(self):
        return self.policy in ("h2o", "snapkv", "streaming")

    @property
    def per_head(self):
        return self.policy in ("h2o", "snapkv")

    @property
    def reads_rows(self):
        return self.policy in ("keydiff", "mixkv")

    @property
    def reselects(self):
        return self.policy in ("avl", "h2o", "keydiff", "mixkv", "random")


@dataclass
class Memory:
    """One layer and KV head: which positions are stored, which of them are core."""

    stored: set = field(default_factory=set)
    core: set = field(default_factory=set)
    sums: dict = field(default_factory=dict)
    num_aged: int = 0


class Oracle:
    def __init__(self, checkpoint):
        self.followed = {}
        AttentionInterface.register("masked", self._attend)
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            attn_implementation={"text_config": "masked", "vision_config": "eager"},
            dtype=torch.float32,
        ).eval()
        config = self.model.config.text_config
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = config.num_key_value_heads

    @torch.no_grad()
    def follow(
        self,
        text,
        images,
        settings,
        tokens,
        product,
        scores_of_random=None,
        replayed=1,
        sizes=None,
    ):
        """Answer with `tokens`; yield each step and its log-probabilities.

        `product(step, layer, head)` gives the positions that the product has stored
        and those it reads, after each step; step 0 is the prompt. The first `replayed`
        tokens are computed at once, as after a preemption. `sizes` are those of the
        steps: of several tokens, all but the first are drafts that were accepted.
        """
        self.settings, self.product = settings, product
        self.random = scores_of_random
        inputs = self.processor(
            text=text, images=images, return_tensors="pt", add_special_tokens=False
        )
        ids = inputs["input_ids"][0]
        self.is_vision = (ids == self.model.config.image_token_id).tolist()
        self.first_vision = self.is_vision.index(True)
        self.num_prompt = len(ids)
        self.length = self.scored = len(ids)
        self.step = 0
        self.memories = [
            [Memory() for _ in range(self.num_kv_heads)] for _ in range(self.num_layers)
        ]
        output = self.model(**inputs, use_cache=True)
        yield 0, output.logits[0, -1].log_softmax(-1)
        done, before = 0, 0
        for size in sizes or [replayed] + [1] * (len(tokens) - 1 - replayed):
            chunk, is_replay = tokens[done : done + size], done == 0 and replayed > 1
            # By its last token a replay scores, and by its first a step with drafts.
            turn = done + size if is_replay else done + 1
            done += size
            self.step, self.length = done, self.num_prompt + done
            self.scored, self.row = self.num_prompt + turn, turn - 1 - done + size
            interval = settings.interval
            self.is_refresh = is_replay or interval <= 0
            self.is_refresh |= turn // max(interval, 1) > before // max(interval, 1)
            before = turn
            output = self.model(
                input_ids=torch.tensor([chunk]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            for row in range(size - 1 if is_replay else 0, size):
                step = done - size + row + 1
                yield step, output.logits[0, row].log_softmax(-1)

    # What a layer does.

    def _attend(self, module, query, key, value, mask, scaling, **kwargs):
        layer, (_, num_heads, rows, _) = module.layer_idx, query.shape
        group = num_heads // key.shape[1]
        keys, values = (x[0].repeat_interleave(group, 0) for x in (key, value))
        logits = query[0] @ keys.transpose(1, 2) * scaling
        reads = self._reads(layer, rows).repeat_interleave(group, 0)
        attention = logits.masked_fill(~reads, -torch.inf).softmax(-1)
        by_head = attention.view(-1, group, rows, self.length)
        if self.step == 0:
            self.rows = key[0], value[0]
            self._after_prompt(layer, by_head[:, :, -self.settings.window :].sum(2))
        else:
            self._after_step(layer, by_head[:, :, self.row])
        return (attention @ values).transpose(0, 1).unsqueeze(0), None

    def _reads(self, layer, rows):
        if self.step == 0:
            return torch.ones(self.num_kv_heads, rows, rows).tril().bool()
        reads = torch.zeros(self.num_kv_heads, rows, self.length, dtype=torch.bool)
        for head, memory in enumerate(self.memories[layer]):
            for row, new in enumerate(range(self.length - rows, self.length)):
                memory.stored.add(new)
                memory.core.add(new)
                read = memory.stored if self.is_refresh else memory.core
                reads[head, row, sorted(read)] = True
        return reads

    def _after_prompt(self, layer, scores):
        s = self.settings
        everything = set(range(self.num_prompt))
        for head, memory in enumerate(self.memories[layer]):
            memory.stored, memory.core = set(everything), set(everything)
            memory.sums = dict(enumerate(scores[head].sum(0).tolist()))
        if s.num_core_rows < s.num_full_tokens:
            ranked = [p for p in everything if self._competes(p)]
            fixed = s.num_full_tokens - len(ranked)
            stored, core = s.num_stored_rows - fixed, s.num_core_rows - fixed
            for head, memory in enumerate(self.memories[layer]):
                if stored < len(ranked):
                    ranking = self._scores(layer, head, scores, ranked, stored)
                    self._choose(layer, head, "stored", ranked, ranking, stored)
                memory.core = set(memory.stored)
                held = [p for p in ranked if p in memory.stored]
                if core < stored:
                    ranking = self._scores(layer, head, scores, held, core)
                    self._choose(layer, head, "core", held, ranking, core)
        self._age(layer)

    def _after_step(self, layer, attention):
        s = self.settings
        if self.is_refresh:
            for head, memory in enumerate(self.memories[layer]):
                received = attention[head].sum(0).tolist()
                memory.sums = {
                    p: memory.sums.get(p, 0.0) + received[p]
                    for p in memory.stored
                    if p < self.scored
                }
            if s.reselects and s.num_core_rows < s.num_stored_rows:
                ranked = [p for p in range(self.num_prompt) if self._competes(p)]
                for head, memory in enumerate(self.memories[layer]):
                    memory.core = set(memory.stored)
                    held = [p for p in ranked if p in memory.stored]
                    keep = len(held) - (s.num_stored_rows - s.num_core_rows)
                    ranking = self._scores(layer, head, attention, held, keep)
                    self._choose(layer, head, "core", held, ranking, keep)
        self._age(layer)

    def _competes(self, position):
        if position >= self.settings.num_full_tokens:
            return False
        return self.settings.any_token or self.is_vision[position]

    # Ranking.

    def _choose(self, layer, head, which, candidates, scores, keep):
        """Leave the best `keep` of the candidates in the head's `which`."""
        order = sorted(candidates, key=lambda p: (-scores[p], p))
        chosen = self._settle(layer, head, which, order, scores, keep)
        members = getattr(self.memories[layer][head], which)
        members -= set(candidates) - chosen

    def _scores(self, layer, head, attention, held, keep):
        policy = self.settings.policy
        if policy == "random":
            ranked = [p for p in range(self.num_prompt) if self._competes(p)]
            return self.random(layer, self.scored, ranked)
        if policy == "streaming":
            return {p: (float("inf") if p < 4 else p) for p in held}
        if policy == "h2o":
            recent = set(sorted(held)[len(held) - round(0.75 * keep) :])
            sums = self.memories[layer][head].sums
            return {p: (float("inf") if p in recent else sums[p]) for p in held}
        if policy == "snapkv":
            observing = self.num_prompt - self.settings.window
            seen = attention[head].sum(0)[: self.settings.num_full_tokens].clone()
            seen[observing:] = 0
            pooled = functional.max_pool1d(seen[None], 7, 1, 3)[0].tolist()
            return {p: (float("inf") if p >= observing else pooled[p]) for p in held}
        if self.settings.reads_rows and self.step == 0:
            return self._scores_of_rows(attention)
        reduce = torch.amax if self.settings.reduction == "max" else torch.mean
        row = reduce(attention.flatten(0, 1), 0)
        if policy == "fastv" and layer > 1 and self.step == 0:
            row = self.layer_1
        self.layer_1 = row
        return dict(enumerate(row.tolist()))

    def _scores_of_rows(self, attention):
        ranked = [p for p in range(self.num_prompt) if self._competes(p)]
        by_head = []
        for head, (key, value) in enumerate(zip(*self.rows, strict=True)):
            unit = functional.normalize(key[ranked], dim=1)
            cosines = unit @ unit.T
            attended = attention[head].sum(0)[ranked]
            diversity = _scaled(-cosines.mean(1))
            norm = _scaled(value[ranked].norm(dim=1))
            if self.settings.policy == "keydiff":
                by_head.append(diversity * norm)
                continue
            diversity = diversity / diversity.mean() * attended.mean()
            norm = norm / norm.mean() * attended.mean()
            alike = cosines[~torch.eye(len(ranked), dtype=torch.bool)].mean()
            alike = alike.clamp(0, 1)
            by_head.append(alike * diversity + (1 - alike) * (attended + norm))
        reduce = torch.amax if self.settings.reduction == "max" else torch.sum
        scores = reduce(torch.stack(by_head), 0)
        return dict(zip(ranked, scores.tolist(), strict=True))

    def _settle(self, layer, head, which, order, scores, keep):
        """The best `keep`, or the product's choice among scores too close to call."""
        ours = set(order[:keep])
        stored, read = self.product(self.step, layer, head)
        theirs = set(order) & (stored if which == "stored" else read)
        if ours == theirs:
            return ours
        if self.settings.any_token and self.settings.text_keep < 1 and theirs < ours:
            # What the product reports has aged since; `_age` compares that.
            return ours
        where = f"{which}, step {self.step}, layer {layer}, head {head}"
        assert len(theirs) == keep, f"{where}: {len(theirs)} tokens, not {keep}"
        finite = [scores[p] for p in order if scores[p] != float("inf")]
        differing = [scores[p] for p in ours ^ theirs]
        gap = max(differing) - min(differing)
        assert gap <= CLOSE * max(finite), f"{where}: scores differ by {gap}"
        # Scores made of keys and values are closer to each other: heads that share a
        # ranking tie once.
        self.num_ties += not (self.settings.reads_rows and head)
        return theirs

    num_ties = 0

    # Text.

    def _age(self, layer):
        s = self.settings
        if s.text_keep >= 1:
            return
        text = [
            p
            for p in range(self.first_vision, self.scored)
            if p >= self.num_prompt or not self.is_vision[p]
        ]
        size = max(_round(s.text_keep, len(text)), s.text_min)
        num_recent = size - _round(s.text_heavy, size)
        for head, memory in enumerate(self.memories[layer]):
            surplus = (len(text) - memory.num_aged - size) // s.block_size
            surplus *= s.block_size
            if surplus <= 0:
                continue
            held = [p for p in text if p in memory.stored]
            if s.any_token:
                behind = range(self.first_vision, self.scored)
                held = [p for p in sorted(memory.core) if p in behind]
            recent = set(held[len(held) - num_recent :])
            scored = [p for p in held if p not in recent and p in memory.sums]
            unscored = [p for p in held if p not in recent and p not in memory.sums]
            # The worst first; of equal ones the higher position leaves.
            order = sorted(scored, key=lambda p: (memory.sums[p], -p)) + unscored
            gone = self._settle_text(layer, head, order, memory.sums, surplus)
            memory.num_aged += surplus
            memory.stored -= gone
            memory.core -= gone
            memory.sums = {p: memory.sums[p] for p in memory.sums if p not in gone}

    def _settle_text(self, layer, head, order, sums, surplus):
        ours = set(order[:surplus])
        stored, _ = self.product(self.step, layer, head)
        theirs = set(order) - stored
        if ours == theirs:
            return ours
        where = f"text, step {self.step}, layer {layer}, head {head}"
        assert len(theirs) == surplus, f"{where}: {len(theirs)} gone, not {surplus}"
        assert ours ^ theirs <= sums.keys(), f"{where}: unscored tokens differ"
        differing = [sums[p] for p in ours ^ theirs]
        gap = max(differing) - min(differing)
        assert gap <= CLOSE * max(sums.values()), f"{where}: sums differ by {gap}"
        self.num_ties += 1
        return theirs


def _scaled(numbers):
    return (numbers - numbers.min()) / (numbers.max() - numbers.min())


def _round(ratio, count):
    return int((Decimal(str(ratio)) * count).to_integral_value(ROUND_HALF_EVEN))
