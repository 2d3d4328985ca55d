"""Correction without training: what a rank lacks, predicted from what it has (beyond the paper).

In a dropped block rank `i` feeds its MLP with `X + P_i + b` and lacks `M_i = sum_{j != i} P_j`. From calibration data
alone, in closed form, the least-squares prediction

    constant    M_i ~ c_i
    scale       M_i ~ c_i + a_i P_i
    linear_x    M_i ~ c_i + B_i A_i norm1(X)
    linear_p    M_i ~ c_i + B_i A_i P_i
    linear      M_i ~ c_i + B_i A_i [norm1(X), P_i]
    shift       M_i ~ c_i + B_i A_i [norm1(X), P_i, norm1(X) of the token before]

is added to the MLP's input; the block's output formula stays as it is. `shift` is for the heads that look one token
back, which are many; the rank has that token's `X` as well, and when decoding keeps it in the cache. `B_i A_i` is the
ridge regression's solution of rank at most `r` (reduced-rank regression: the full solution, projected on the first `r`
principal directions of its own predictions). With `M_i` itself in its place the dropped block would be the TP block.

Legend: S samples, B batch, T tokens, D hidden size, N ranks, n ranks of this process, E features (D, 2D or 3D), r rank.
"""

import functools
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicLayer

from spd.config import CorrectionConfig, CorrectionKind
from spd.errors import UserError

if TYPE_CHECKING:
    from spd.block import Block

CORRECTION_FILE = "spd_correction.safetensors"
"""Name of the corrections inside a saved checkpoint: tensors `<block>.<name>`, their first dimension the rank."""

_NAMES = ("constant", "scale", "down_x", "down_p", "down_b", "up")
_FEATURES = {
    CorrectionKind.constant: "",
    CorrectionKind.scale: "p",
    CorrectionKind.linear_x: "x",
    CorrectionKind.linear_p: "p",
    CorrectionKind.linear: "xp",
    CorrectionKind.shift: "xpb",
}
"""x: norm1(X), p: P_i, b: norm1(X) of the token before."""


class Correction(nn.Module):
    """The prediction of `M_i` for the ranks of this process.

    Args:
        tensors: `constant` [n, D], and as the kind has them `scale` [n], `up` (B_i) [n, D, r], and `down_x`, `down_p`
            and `down_b` (the parts of A_i) [n, r, D].
    """

    constant: Tensor
    scale: Tensor | None
    down_x: Tensor | None
    down_p: Tensor | None
    down_b: Tensor | None
    up: Tensor | None

    cache_slot = 0
    """Where in a Hugging Face cache the token before is kept."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name in _NAMES:
            self.register_buffer(name, tensors.get(name), persistent=False)

    def forward(self, rank: int, normed: Tensor, partial: Tensor, before: Tensor | None) -> Tensor:
        """`M_i` [B, T, D], of a constant [D], of the process's `rank`-th rank from `norm1(X)`, `P_i` and `norm1(X)` of
        the token before, all [B, T, D]."""
        missing = self.constant[rank]
        if self.scale is not None:
            missing = missing + self.scale[rank] * partial
        if self.up is not None:
            parts = ((self.down_x, normed), (self.down_p, partial), (self.down_b, before))
            inner = [F.linear(z, down[rank]) for down, z in parts if down is not None and z is not None]  # [B, T, r]
            missing = missing + F.linear(functools.reduce(operator.add, inner), self.up[rank])
        return missing

    def before(self, normed: Tensor, position_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor | None:
        """`norm1(X)` of the token before each token, [B, T, D], zero before the first; None if the kind needs none.

        Args:
            normed: `norm1(X)` [B, T, D].
            position_ids: [1 or B, T]; 0 marks the first token of a padded prompt.
            cache: has the last token of the forward before, and is given this one's.
        """
        if self.down_b is None:
            return None
        slot: Any = None if cache is None else cache.layers[self.cache_slot]
        last = torch.zeros_like(normed[:, :1]) if slot is None or slot.keys is None else slot.keys[:, 0]
        before = torch.cat([last, normed[:, :-1]], dim=1)
        if slot is not None:
            slot.update(normed[:, None, -1:], normed[:, None, -1:])
        return before if position_ids is None else before * (position_ids > 0).unsqueeze(-1)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors it was made of."""
        return {name: tensor for name in _NAMES if (tensor := getattr(self, name)) is not None}

    def cost(self) -> int:
        """Numbers a rank stores for it, which is also about the multiplications a token costs the rank."""
        return sum(tensor[0].numel() for tensor in self.tensors().values())

    @classmethod
    def load(
        cls, file: Path, block: int, ranks: list[int], dtype: torch.dtype, device: torch.device
    ) -> "Correction | None":
        """The correction of one block from a file, for the given ranks only; None if the file has none for it."""
        with safe_open(file, framework="pt") as stored:
            names = [name for name in _NAMES if f"{block}.{name}" in stored.keys()]  # noqa: SIM118 - no mapping
            # Ranks of a process are neighbours: one of N, or all.
            part = slice(ranks[0], ranks[-1] + 1)
            read = {name: stored.get_slice(f"{block}.{name}")[part].to(device, dtype) for name in names}
        return cls(read) if read else None


@torch.no_grad()
def fit(
    block: "Block", x: Tensor, inputs: dict[str, Any], settings: CorrectionConfig, batch_size: int = 8
) -> Correction:
    """The correction of a block, fitted to its inputs.

    Args:
        block: of all N ranks, float32.
        x: block inputs `X` of the original model, [S, T, D].
        inputs: what Hugging Face gives a layer beside them.
        settings: kind, rank r and ridge.
        batch_size: samples at a time.

    Returns:
        float32, on the device of `x`.
    """
    moments = _Moments(settings.kind, len(block.ranks.local), x.shape[-1], x.device)
    for batch in x.split(batch_size):
        partials = block.partials(block.attention(batch, **inputs))
        normed = block.norm1(batch)
        before = torch.cat([torch.zeros_like(normed[:, :1]), normed[:, :-1]], dim=1)
        moments.add({"x": normed, "b": before}, partials)
    solved = [moments.solve(rank, settings) for rank in block.ranks.local]
    return Correction({name: torch.stack([one[name] for one in solved]).float() for name in solved[0]})


class _Moments:
    """Sums over tokens from which the least squares of every rank are solved, in float64.

    `M_i = t - P_i` with `t = sum_j P_j`. What all ranks have (t, norm1(X), the token before) is multiplied with itself
    once; a rank adds the products of its `P_i` with these and with itself.
    """

    def __init__(self, kind: CorrectionKind, ranks: int, size: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.features, self.kind = _FEATURES[kind], kind
        self.shared = "t" + self.features.replace("p", "")
        wide = len(self.shared) * size
        self.count, self.sums, self.partial_sums = 0, zeros(wide), zeros(ranks, size)
        if self.features:
            self.products = zeros(wide, wide)
            self.partial_products = zeros(ranks, size, wide + size)  # of P_i with the shared ones, then with itself

    def add(self, values: dict[str, Tensor], partials: Tensor) -> None:
        """Counts the tokens of the shared features [B, T, D] and of every rank's `P_i`, [N, B, T, D]."""
        # The products of one batch in float32, several times faster than in float64; never in a shorter type, in which
        # what has to be inverted is not positive any more.
        with torch.autocast(self.sums.device.type, enabled=False):
            own = partials.flatten(1, 2).float()  # [N, B T, D]
            flat = {name: value.flatten(0, 1).float() for name, value in values.items()} | {"t": own.sum(0)}
            shared = torch.cat([flat[name] for name in self.shared], dim=-1)
            if not self.count:  # about where the values lie: what is summed is to be small
                self.origin, self.partial_origins = shared.mean(0), own.mean(1)
            shared, own = shared - self.origin, own - self.partial_origins[:, None]
            self.count += shared.shape[0]
            self.sums += shared.sum(0)
            self.partial_sums += own.sum(1)
            if self.features:
                self.products += shared.T @ shared
                for rank, p in enumerate(own):
                    self.partial_products[rank] += torch.cat([p.T @ shared, p.T @ p], dim=1)

    def _mean(self, name: str, rank: int) -> Tensor:
        origin = self.partial_origins[rank] if name == "p" else self._part(self.origin, name)
        return origin + self._offset(name, rank)

    def _offset(self, name: str, rank: int) -> Tensor:
        """The mean's distance from the origin."""
        return (self.partial_sums[rank] if name == "p" else self._part(self.sums, name)) / self.count

    def _part(self, values: Tensor, name: str) -> Tensor:
        return values.view(len(self.shared), -1)[self.shared.index(name)]

    def _covariance(self, a: str, b: str, rank: int) -> Tensor:
        """[D, D] of two features: "t", "x", "b" as in `shared`, or "p" for the rank's own."""
        size = self.partial_sums.shape[1]
        columns = (self.shared + "p").index(b) * size
        if a == "p":
            rows = self.partial_products[rank]
        elif b == "p":
            return self._covariance(b, a, rank).T
        else:
            rows = self.products.view(len(self.shared), size, -1)[self.shared.index(a)]
        product = rows[:, columns : columns + size] / self.count
        return product - torch.outer(self._offset(a, rank), self._offset(b, rank))

    def solve(self, rank: int, settings: CorrectionConfig) -> dict[str, Tensor]:
        """A rank's `constant` and what else the kind has."""
        p, m = self._mean("p", rank), self._mean("t", rank) - self._mean("p", rank)
        if self.kind is CorrectionKind.constant:
            return {"constant": m}
        if self.kind is CorrectionKind.scale:
            variance = self._covariance("p", "p", rank).trace()
            scale = (self._covariance("p", "t", rank).trace() - variance) / variance.clamp_min(1e-30)
            return {"constant": m - scale * p, "scale": scale}
        names = self.features
        covariance = torch.cat([torch.cat([self._covariance(a, b, rank) for b in names], dim=1) for a in names])
        with_missing = torch.cat([self._covariance(a, "t", rank) - self._covariance(a, "p", rank) for a in names])
        # By the variance of each kind of feature: P_i varies a hundred times less than norm1(X).
        variances = covariance.diagonal().view(len(names), -1).mean(1).clamp_min(1e-30)
        ridge = settings.ridge * variances.repeat_interleave(len(m))  # [E]
        covariance.diagonal().add_(ridge)
        weights = torch.linalg.solve(covariance, with_missing)  # [E, D]
        # The directions [D, r] in which the predictions vary most: of weights.T @ covariance without ridge @ weights.
        _, vectors = torch.linalg.eigh(weights.T @ with_missing - weights.T @ (ridge[:, None] * weights))
        directions = vectors[:, -min(settings.rank, vectors.shape[1]) :]
        down = (weights @ directions).T.split(len(m), dim=1)  # [r, D] each
        maps = {f"down_{name}": part for name, part in zip(names, down, strict=True)}
        z = torch.cat([self._mean(name, rank) for name in names])
        return {"constant": m - z @ weights @ directions @ directions.T, "up": directions, **maps}


class TokenBefore(DynamicLayer):
    """A cache slot for the last token's `norm1(X)`, as [B, 1, 1, D]; beams are reordered as in any other slot."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes the place of what was there."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def crop(self, max_length: int) -> None:
        """Raises UserError unless nothing is taken back: tokens further back are not kept."""
        if max_length == 0:
            return
        raise UserError("Assisted generation takes tokens back, which strategy.correction.kind=shift cannot.")
