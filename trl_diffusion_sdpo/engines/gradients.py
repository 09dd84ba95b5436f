"""Inner products and sums of gradients. A gradient is a list with one tensor for each weight, or with this process's
shards. (`gradient_backends.py` computes them.)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .sharding import local_tensor

CHUNK = 1 << 22  # elements in a float32 product on an accelerator; many, so that few kernels run
CPU_CHUNK = 1 << 16  # the same on a CPU; few, so that they fit into its cache

Gradient = list[torch.Tensor | None]


def inner_products(gradients: list[Gradient]) -> torch.Tensor:
    """Return the inner products of each two of `n` gradients, `(n, n)` in float64: the sum of the products of chunks,
    each in float32. Of sharded gradients, they cover this process's shards only."""
    first = next(tensor for tensor in gradients[0] if tensor is not None)
    places = tuple(torch.triu_indices(len(gradients), len(gradients), device=first.device))
    chunks: list[torch.Tensor] = []
    for pieces in _chunks(gradients, CPU_CHUNK if first.device.type == "cpu" else CHUNK):
        rows = [row[0] if len(row) == 1 else torch.cat(row) for row in pieces]
        rows = [row.float() if row.element_size() < 4 else row for row in rows]
        # One matrix product would be slower for such long rows, and need a stacked copy of them.
        chunks += [row @ other for i, row in enumerate(rows) for other in rows[i:]]
    sums = torch.stack(chunks).view(-1, len(places[0])).sum(0, dtype=exact_dtype(first.device))
    products = sums.new_zeros(len(gradients), len(gradients))
    products[places] = sums
    return products.triu() + products.triu(1).T


def _chunks(gradients: list[Gradient], limit: int) -> Iterator[list[list[torch.Tensor]]]:
    """Yield corresponding pieces of all gradients, with at most `limit` elements of each at a time. `None` counts as
    zeros."""
    pieces: list[list[torch.Tensor]] = [[] for _ in gradients]
    size = 0
    for tensors in zip(*gradients, strict=True):
        flats = [None if tensor is None else local_tensor(tensor).flatten() for tensor in tensors]
        present = next((flat for flat in flats if flat is not None), None)
        if present is None:
            continue
        filled = [torch.zeros_like(present) if flat is None else flat for flat in flats]
        for cut in zip(*(flat.split(limit) for flat in filled), strict=True):
            if size and size + len(cut[0]) > limit:
                yield pieces
                pieces = [[] for _ in gradients]
                size = 0
            for row, piece in zip(pieces, cut, strict=True):
                row.append(piece)
            size += len(cut[0])
    if size:
        yield pieces


def subtract_scaled(winner: Gradient, loser: Gradient, scale: torch.Tensor) -> None:
    """Subtract `scale` times the losers' gradient from the winners', in place: `W = W - lambda L`."""
    for i, (w, loser_tensor) in enumerate(zip(winner, loser, strict=True)):
        if loser_tensor is None:
            continue
        if w is None:
            w = torch.zeros_like(loser_tensor)
            winner[i] = w
        local_tensor(w).addcmul_(local_tensor(loser_tensor), scale.to(w.dtype), value=-1)


def add(into: Gradient, gradient: Iterable[torch.Tensor]) -> Gradient:
    """Add a gradient to `into`, in place, and return `into`."""
    for total, tensor in zip(into, gradient, strict=True):
        assert total is not None  # under ZeRO every weight has a gradient
        total.add_(tensor)
    return into


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for exact sums: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
