"""A-VL's prefill selection, read off the method and run on Hugging Face weights.

Eager, batch 1, no paging, no blocks: attention maps are materialised, eviction deletes
rows of a cache. It shares no code with the product; only the NUMBER of vision tokens
to keep, which the plan rounds up to whole blocks, is handed in.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


@dataclass
class Answer:
    kept: list[set[int]]
    """Per layer, the vision positions that stay."""
    scores: list[torch.Tensor]
    """Per layer, [num_prompt_tokens] score of every position."""
    tokens: list[int]
    logprobs: list[torch.Tensor]


class Oracle:
    def __init__(self, checkpoint):
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, attn_implementation="eager", dtype=torch.float32
        ).eval()

    @torch.no_grad()
    def answer(self, text, images, num_full_tokens, num_kept, num_new, window=1):
        """Greedy answer after evicting all but `num_kept` vision tokens a layer.

        Only vision tokens before `num_full_tokens` are ranked; later ones stay.
        """
        inputs = self.processor(
            text=text, images=images, return_tensors="pt", add_special_tokens=False
        )
        output = self.model(**inputs, output_attentions=True, use_cache=True)
        is_image = inputs["input_ids"][0] == self.model.config.image_token_id
        ranked = is_image & (torch.arange(len(is_image)) < num_full_tokens)
        cache, kept, scores = output.past_key_values, [], []
        for layer, attention in enumerate(output.attentions):
            score = attention[0, :, -window:].sum((0, 1))
            value = score.tolist()
            vision = ranked.nonzero().flatten().tolist()
            order = sorted(vision, key=lambda i: (-value[i], i))
            minor = set(order[num_kept:])
            stays = [i for i in range(len(is_image)) if i not in minor]
            rows = cache.layers[layer]
            rows.keys, rows.values = rows.keys[:, :, stays], rows.values[:, :, stays]
            kept.append(set(order[:num_kept]))
            scores.append(score)
        return Answer(
            kept, scores, *self._decode(output.logits, cache, len(is_image), num_new)
        )

    def _decode(self, logits, cache, position, num_new):
        tokens, logprobs = [], []
        for step in range(num_new):
            row = logits[0, -1].float().log_softmax(-1)
            logprobs.append(row)
            tokens.append(int(row.argmax()))
            if step + 1 < num_new:
                # Positions go on from the original length, not from the cache's.
                output = self.model.model.language_model(
                    input_ids=torch.tensor([[tokens[-1]]]),
                    position_ids=torch.tensor([[position + step]]),
                    past_key_values=cache,
                    use_cache=True,
                )
                logits = self.model.lm_head(output.last_hidden_state)
        return tokens, logprobs
