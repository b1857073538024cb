"""Embedding tables whose gradient is the same bits each time, without the price that this has in PyTorch.

The gradient of a row is the sum over the places that looked it up. In a compiled step PyTorch adds it up by
atomic additions in any order, or under `use_deterministic_algorithms` by a sort after which the places of a
row are added one after the other: of 27 letters or 11 classes these are many.
"""

import torch
from torch import Tensor, nn

FEW = 1024
"""Rows up to which the gradient is a matrix product: with more it costs more than a sort."""


def one_hot_sum(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """The gradient of a table as a product with one-hot rows.

    Args:
        gradient: (n, dim) of what was looked up.
        rows: (n,) int64, from 0 to `count` - 1.
        count: rows of the table.

    Returns:
        (count, dim), in the gradient's precision, or where TF32 is allowed in that.
    """
    with torch.autocast(gradient.device.type, enabled=False):
        chosen = rows == torch.arange(count, device=rows.device)[:, None]
        return chosen.to(gradient.dtype) @ gradient


@torch.library.custom_op("dbtrain::sorted_sum", mutates_args=())
def sorted_sum(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    """The same as `one_hot_sum`, by PyTorch's own kernel: it sorts the rows and adds partial sums of each.

    It is an operation of its own because the compiler would replace the kernel by an `index_put`.
    """
    return torch.ops.aten.embedding_dense_backward(gradient, rows, count, -1, False)


@sorted_sum.register_fake
def _(gradient: Tensor, rows: Tensor, count: int) -> Tensor:
    return gradient.new_empty(count, gradient.shape[-1])


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        table, rows = inputs
        ctx.save_for_backward(rows)
        ctx.count = len(table)  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors  # type: ignore[attr-defined]
        count = ctx.count  # type: ignore[attr-defined]
        add_up = one_hot_sum if count <= FEW else sorted_sum
        return add_up(gradient.flatten(0, -2), rows.flatten(), count), None


class Embedding(nn.Embedding):
    """A table of `num_embeddings` vectors, looked up by whole numbers."""

    def reset_parameters(self) -> None:
        """Normal numbers; none on the meta device, where PyTorch 2.11 would load its compiler first."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, rows: Tensor) -> Tensor:
        """(...,) int64 -> (..., dim)."""
        # on a CPU PyTorch's own gradient is deterministic and fast
        if not rows.is_cuda:
            return super().forward(rows)
        found: Tensor = _Lookup.apply(self.weight, rows)  # type: ignore[no-untyped-call]
        return found
