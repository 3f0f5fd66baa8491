"""The model in training: what its patches show, and what it answers."""

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.training.batches import IGNORED, Batch, split_prefix
from vllm_avl.bundled.picture import LABELS, NUM_PATCHES

LINEAR_SHIFT, EMBEDDING_RMS = 4.0, 0.5
POINTERS, NUM_POINTERS = (1, 2), 2
"""Layers, and heads of each, that learn to attend to what a question is about."""


class Learner(nn.Module):
    """LLaVA's own modules, run over some of the patches, with a head for each label.

    A patch that is left out is left out of the tower and of the language model; those
    that stay keep the positions they have in the whole sequence.
    """

    def __init__(self, llava: transformers.LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.llava = llava
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(llava.config.vision_config.hidden_size, classes)
                for name, classes in LABELS.items()
            }
        )

    def look(self, batch: Batch) -> torch.Tensor:
        """Returns the tower's features: [batch · images, kept, hidden]."""
        tower = self.llava.model.vision_tower
        states = tower.embeddings(batch.pixels.flatten(0, 1))
        index = F.pad(batch.keep.flatten(0, 1) + 1, (1, 0))
        states = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
        states = tower.pre_layrnorm(states)
        for layer in tower.encoder.layers:
            states = layer(states, None)
        return states[:, 1:]

    @torch.no_grad()
    def spread(self, batch: Batch) -> None:
        """Starts the projector so that all directions of the features count alike.

        The largest directions of a feature are those of its place; a character's are
        a tenth of them, and a language model that learns by descent finds them last.
        A GELU is linear far from zero: the shift makes the projector linear at first.
        """
        embedding = self.llava.model.language_model.embed_tokens.weight
        if embedding.requires_grad:
            embedding *= EMBEDDING_RMS / embedding.std()
        features = self.look(batch).flatten(0, 1)
        mean = features.mean(0)
        values, vectors = torch.linalg.eigh((features - mean).T.cov())
        floor = values.mean() * 1e-3
        whiten = vectors @ torch.diag((values + floor).rsqrt()) @ vectors.T
        projector = self.llava.model.multi_modal_projector
        width = projector.linear_2.out_features
        whiten = _widening(width, len(mean)).to(whiten) @ whiten
        rms = EMBEDDING_RMS if embedding.requires_grad else embedding.std().item()
        rms *= (width / len(mean)) ** 0.5
        projector.linear_1.weight.copy_(whiten)
        projector.linear_1.bias.copy_(LINEAR_SHIFT - whiten @ mean)
        projector.linear_2.weight.copy_(rms * torch.eye(width))
        projector.linear_2.bias.fill_(-rms * LINEAR_SHIFT)

    def label_losses(
        self, features: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Returns the loss of each label, patches that have one and others alike."""
        losses = {}
        for name, head in self.heads.items():
            labels = batch.labels[name].flatten()
            each = F.cross_entropy(
                head(features).flatten(0, 1), labels, reduction="none"
            )
            has = (labels > 0).float()
            losses[name] = 0.5 * (
                (each * has).sum() / has.sum().clamp(min=1)
                + (each * (1 - has)).sum() / (1 - has).sum().clamp(min=1)
            )
        return losses

    def answer_logits(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Returns the logits behind every text token: [batch, length, vocabulary]."""
        return self.answer(features, batch)[0]

    def answer(
        self, features: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the answers' logits and how badly attention points at evidence."""
        llava = self.llava
        language_model = llava.model.language_model
        rows, length = batch.text.shape
        parts, positions = self._prefix(features, batch)
        start = positions[-1][0, -1] + 1
        parts.append(language_model.embed_tokens(batch.text))
        places = torch.arange(length, device=batch.text.device)
        positions.append(places[None].expand(rows, -1) + start)
        states = torch.cat(parts, 1)
        rotary = language_model.rotary_emb(states, torch.cat(positions, 1))
        pointing = torch.zeros((), device=batch.text.device)
        for number, layer in enumerate(language_model.layers):
            if number in POINTERS and batch.evidence.any():
                first = parts[0].shape[1]
                pointing = pointing + _pointing(layer, states, rotary, batch, first)
            # No mask: SDPA is causal then, and padding is behind everything.
            states = layer(states, attention_mask=None, position_embeddings=rotary)
        return llava.lm_head(language_model.norm(states[:, -length:])), pointing

    def _prefix(
        self, features: torch.Tensor, batch: Batch
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns embeddings and positions of all that stands before the questions."""
        llava, rows = self.llava, len(batch.text)
        pieces = split_prefix(batch.prefix, llava.config.image_token_index)
        parts, positions, start = [], [], 0
        images: tuple[torch.Tensor, ...] = ()
        if batch.keep.numel():
            projected = llava.model.multi_modal_projector(features)
            images = projected.unflatten(0, batch.keep.shape[:2]).unbind(1)
        for number, piece in enumerate(pieces):
            embedded = llava.model.language_model.embed_tokens(piece)
            parts.append(embedded[None].expand(rows, -1, -1))
            places = torch.arange(len(piece), device=piece.device) + start
            positions.append(places[None].expand(rows, -1))
            start += len(piece)
            if number < len(images):
                parts.append(images[number])
                positions.append(batch.keep[:, number] + start)
                start += NUM_PATCHES
        return parts, [p for p in positions if p.shape[1]]


def _widening(rows: int, columns: int) -> torch.Tensor:
    """Returns orthonormal columns: the identity, or mixed where rows are more."""
    if rows == columns:
        return torch.eye(rows)
    mixing = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(mixing)[0]


def _pointing(
    layer: nn.Module,
    states: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    first: int,
) -> torch.Tensor:
    """Returns the mean -log of the attention that a layer's pointers give evidence."""
    _, length, kept = batch.evidence.shape
    attention = layer.self_attn
    normal = layer.input_layernorm(states)
    shape = (*normal.shape[:2], -1, attention.head_dim)
    query, key = (
        project(normal).view(shape).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    query, key = query[:, :NUM_POINTERS, -length:], key[:, :NUM_POINTERS]
    scores = query @ key.transpose(-1, -2) * attention.scaling
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., -length:].masked_fill_(future, -torch.inf)
    log_shares = scores.log_softmax(-1)[..., first : first + kept]
    outside = ~batch.evidence[:, None]
    found = log_shares.masked_fill(outside, -1e9).logsumexp(-1)
    due = batch.evidence.any(-1)[:, None].expand_as(found)
    return -found[due].mean()


def answer_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns the mean loss of the answers' tokens."""
    return F.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED
    )


def characters_read(learner: Learner, features: torch.Tensor, batch: Batch) -> float:
    """Returns the share of patches with a character whose character is seen."""
    labels = batch.labels["character"].flatten()
    seen = learner.heads["character"](features).argmax(-1).flatten()
    return (seen == labels)[labels > 0].float().mean().item()


def exact_answers(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns for each row whether greedy decoding would give all its answers."""
    right = logits.argmax(-1) == batch.targets
    return (right | (batch.targets == IGNORED)).all(-1)
