"""Many tiny models of one shape, trained as one: tensors have a leading dimension of models that never mix.

A tiny model's update is mostly the cost of starting operations; R models in one set of operations share that cost. The
mathematics is that of ``model.network``, torch's clip_grad_norm_ and torch's AdamW, model by model.

Shape legend: R models, B cells, G genes, K masked genes, D width, O output width of a map (of the head: per gene),
H heads, P parameters of a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from scaling_ray.model.dropout import attention, dropout
from scaling_ray.model.network import MaskedGeneTransformer, visible_and_hidden
from scaling_ray.rules import TrainingRules
from scaling_ray.sizes import Shape

ADAM_BETA1, ADAM_EPSILON = 0.9, 1e-8
CLIP_EPSILON = 1e-6
"""The constants of torch's AdamW and clip_grad_norm_."""


class StackedTransformer:
    """R networks of one shape; ``flat`` (R, P) holds all weights, ``parts`` are leaf views into it by name.

    Args:
        shape: of each.
        genes: of each.
        rate: dropout while training.
        seeds: one for each model's weights, as in ``MaskedGeneTransformer.initialise``.
        device: where they live.
        outputs_per_gene: values that each one's head gives for a gene.
    """

    def __init__(
        self,
        shape: Shape,
        genes: int,
        rate: float,
        seeds: list[int],
        device: torch.device,
        outputs_per_gene: int = 1,
    ) -> None:
        self.shape, self.genes, self.rate, self.training = shape, genes, rate, True
        models = []
        for seed in seeds:
            model = MaskedGeneTransformer(shape, genes, outputs_per_gene=outputs_per_gene)
            model.initialise(seed)
            models.append(nn.utils.parameters_to_vector(model.parameters()).detach())
        self.flat = torch.stack(models).to(device)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.parts = {name: self._view(self.flat, name).requires_grad_() for name in self.shapes}

    def __len__(self) -> int:
        return len(self.flat)

    def _view(self, flat: Tensor, name: str) -> Tensor:
        start = 0
        for earlier, shape in self.shapes.items():
            if earlier == name:
                return flat.detach()[:, start : start + shape.numel()].view(len(flat), *shape)
            start += shape.numel()
        raise KeyError(name)

    def named(self, flat: Tensor, member: int) -> dict[str, Tensor]:
        """Copies of one model's tensors by name, out of a tensor (R, P)."""
        return {name: self._view(flat, name)[member].clone() for name in self.shapes}

    def flattened(self, tensors: Mapping[str, Tensor], kind: str) -> Tensor:
        """(P,) of one model's tensors, named ``kind.name``: the inverse of ``named`` for one row of (R, P)."""
        return torch.cat([tensors[f"{kind}.{name}"].flatten() for name in self.shapes])

    def gradients(self) -> Tensor:
        """(R, P), gathered from the parts and cleared there."""
        gathered = torch.cat([part.grad.flatten(1) for part in self.parts.values() if part.grad is not None], dim=1)
        for part in self.parts.values():
            part.grad = None
        return gathered

    def _linear(self, x_RND: Tensor, name: str) -> Tensor:
        return torch.baddbmm(self.parts[f"{name}.bias"][:, None, :], x_RND, self.parts[f"{name}.weight"].mT)

    def _normed_linear(self, normed_RND: Tensor, norm: str, name: str, rows: slice = slice(None)) -> Tensor:
        """A linear map after a LayerNorm, with the norm's scale and shift folded in: they are small, the cells many."""
        weight_ROD, bias_RO = self.parts[f"{name}.weight"][:, rows], self.parts[f"{name}.bias"][:, rows]
        scale_RD, shift_RD = self.parts[f"{norm}.weight"], self.parts[f"{norm}.bias"]
        folded_RO = torch.baddbmm(bias_RO[:, :, None], weight_ROD, shift_RD[:, :, None])[:, :, 0]
        return torch.baddbmm(folded_RO[:, None, :], normed_RND, (weight_ROD * scale_RD[:, None, :]).mT)

    def _norm(self, x_RND: Tensor) -> Tensor:
        return functional.layer_norm(x_RND, (self.shape.width,))

    def _heads(self, x_RND: Tensor, cells: int) -> Tensor:
        return x_RND.reshape(len(self) * cells, -1, self.shape.heads, x_RND.shape[2] // self.shape.heads).transpose(
            1, 2
        )

    def forward(self, values_RBG: Tensor, hidden_RBG: Tensor, positions_RBK: Tensor) -> Tensor:
        """(R, B, G) values, (R, B, G) bool hidden, (R, B, K) positions -> (R, B, K, O) outputs."""
        models, cells, genes = values_RBG.shape
        masked, width = positions_RBK.shape[2], self.shape.width
        parts = self.parts
        bias = parts["value_projection.bias"]
        rows_R2D = torch.stack([parts["value_projection.weight"][:, :, 0], parts["mask_token"] - bias], 1)
        told = torch.bmm(visible_and_hidden(values_RBG, hidden_RBG).view(models, cells * genes, 2), rows_R2D)
        x = told.view(models, cells, genes, width) + (parts["gene_embedding"] + bias[:, None])[:, None]
        x = x.view(models, cells * genes, width)
        rate = self.rate if self.training else 0.0
        # where a cell's masked genes lie among the tokens of its model
        tokens = (positions_RBK + torch.arange(cells, device=x.device)[:, None] * genes).view(models, -1, 1)
        index = tokens.expand(-1, -1, width)
        for layer in range(self.shape.layers):
            name, last = f"blocks.{layer}", layer == self.shape.layers - 1
            into, before, after = f"{name}.query_key_value", f"{name}.norm_attention", f"{name}.norm_feedforward"
            normed = self._norm(x)
            asking = normed.gather(1, index) if last else normed
            query = self._normed_linear(asking, before, into, slice(0, width))
            key, value = self._normed_linear(normed, before, into, slice(width, None)).split(width, dim=2)
            mixed = attention(self._heads(query, cells), self._heads(key, cells), self._heads(value, cells), rate)
            mixed = mixed.transpose(1, 2).reshape(models, -1, width)
            kept = x.gather(1, index) if last else x
            kept = kept + dropout(self._linear(mixed, f"{name}.attention_out"), rate)
            inner = functional.gelu(self._normed_linear(self._norm(kept), after, f"{name}.feedforward_in"))
            x = kept + dropout(self._linear(dropout(inner, rate), f"{name}.feedforward_out"), rate)
        return self._linear(x, "head").view(models, cells, masked, -1)


class StackedAdamW:
    """AdamW and gradient clipping over (R, P) weights, each model with a rate and a norm of its own."""

    def __init__(self, weights: Tensor, train: TrainingRules) -> None:
        self.first, self.second, self.steps = torch.zeros_like(weights), torch.zeros_like(weights), 0
        self._train = train

    def step(self, weights: Tensor, gradients: Tensor, lr: Tensor, alive: Tensor) -> Tensor:
        """Update ``weights`` in place, except those of models that are not ``alive``.

        Args:
            weights: (R, P).
            gradients: (R, P), changed in place.
            lr: (R,).
            alive: (R,) bool.

        Returns:
            (R,) gradient norms before clipping.
        """
        train = self._train
        norms = torch.linalg.vector_norm(gradients, dim=1)
        gradients.mul_((train.grad_clip / (norms + CLIP_EPSILON)).clamp(max=1.0)[:, None])
        gradients = torch.where(alive[:, None], gradients, 0.0)
        rate = torch.where(alive, lr, 0.0)[:, None]
        self.steps += 1
        weights.mul_(1.0 - rate * train.weight_decay)
        self.first.lerp_(gradients, 1.0 - ADAM_BETA1)
        self.second.mul_(train.adam_beta2).addcmul_(gradients, gradients, value=1.0 - train.adam_beta2)
        root = (self.second.sqrt() / math.sqrt(1.0 - train.adam_beta2**self.steps)).add_(ADAM_EPSILON)
        weights.sub_(self.first / root * (rate / (1.0 - ADAM_BETA1**self.steps)))
        return norms
