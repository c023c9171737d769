"""A fusedrnn layer as a part of PyTorch's autograd, beside torch.nn.LSTM from the same weights.

`Fused` is a torch.nn.Module: gradients flow through it to whatever made its input, and its one parameter is
the layer's own buffer, which any optimiser of PyTorch updates in place. On the CPU tensors and numpy arrays
share their memory; on a GPU the layer takes tensors as they are. Neither is copied.

Gradients of gradients are an error. To move or to copy a `Fused`, move or copy its layer and make another.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

import fusedrnn as fr

I, H, T, B = 6, 32, 40, 16


def given(tensor: torch.Tensor) -> Any:
    """What a layer takes for a tensor, without the graph that PyTorch keeps."""
    tensor = tensor.detach()
    return tensor if tensor.is_cuda else tensor.numpy()


class Call(torch.autograd.Function):
    """One forward pass and its backward pass. Of the final state nothing is differentiated here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, flat: torch.Tensor, layer: fr.LSTM) -> torch.Tensor:
        y, _, ctx.tape = layer.forward(given(x))
        ctx.layer = layer
        return torch.as_tensor(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wrt = [name for name, needed in zip(("x", "params"), ctx.needs_input_grad, strict=False) if needed]
        grads = ctx.layer.backward(ctx.tape, given(dy), wrt=wrt)
        return *(None if g is None else torch.as_tensor(g) for g in (grads.x, grads.flat)), None


class Fused(torch.nn.Module):
    """A layer of fusedrnn. x (T, B, I) to y (T, B, D*H), as the layer itself."""

    def __init__(self, layer: fr.LSTM) -> None:
        super().__init__()
        self.layer = layer
        self.flat = torch.nn.Parameter(torch.from_dlpack(layer.flat_params))  # its memory, not a copy
        self.memory = self.flat.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.flat.data_ptr() != self.memory:  # so after deepcopy, .to() and unpickling
            raise RuntimeError("Fused: its parameter is the layer's memory no longer: make another Fused")
        if not torch.is_grad_enabled():
            return torch.as_tensor(self.layer(given(x))[0])  # keeps no tape, and drops nothing
        return Call.apply(x, self.flat, self.layer)


def draw(generator: torch.Generator, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and for each step from the eighth on what its eight last steps' means add up to."""
    x = torch.randn(T, B, I, generator=generator)
    target = x.mean(-1).unfold(0, 8, 1).sum(-1)  # (T-7, B)
    return x.to(device), target.to(device)


def loss_of(stack: torch.nn.ModuleList, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A linear map, a recurrent layer, a linear map: what comes before and after learns as well."""
    before, recurrent, after = stack
    y = recurrent(before(x))
    y = y[0] if isinstance(y, tuple) else y  # torch.nn.LSTM gives its state too
    return torch.nn.functional.mse_loss(after(y)[7:, :, 0], target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer updates, for a test")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # as here
    before, recurrent, after = torch.nn.Linear(I, I), torch.nn.LSTM(I, H, num_layers=2), torch.nn.Linear(H, 1)
    layer = fr.LSTM(I, H, num_layers=2)
    layer.load_state_dict(recurrent.state_dict())
    fused = Fused(layer.to(args.device))
    theirs = torch.nn.ModuleList([before, recurrent, after])
    ours = torch.nn.ModuleList([copy.deepcopy(before), fused, copy.deepcopy(after)])
    for stack in (theirs, ours):
        stack.to(args.device)

    generator = torch.Generator().manual_seed(1)
    x, target = draw(generator, args.device)
    for stack in (theirs, ours):
        loss_of(stack, x, target).backward()
    want = torch.cat([p.grad.flatten() for p in theirs.parameters()])
    got = torch.cat([p.grad.flatten() for p in ours.parameters()])
    apart = float((got - want).norm() / want.norm())
    print(f"gradients of {len(want):,} parameters differ by {apart:.1e} of their norm")

    optimisers = [torch.optim.Adam(stack.parameters(), lr=1e-2) for stack in (theirs, ours)]
    updates = 60 if args.quick else 400
    for update in range(updates + 1):
        x, target = draw(generator, args.device)
        losses = []
        for stack, optimiser in zip((theirs, ours), optimisers, strict=True):
            optimiser.zero_grad()
            loss = loss_of(stack, x, target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        if update % (updates // 4) == 0:
            print("update {:4}: loss {:.4f} torch.nn.LSTM, {:.4f} fusedrnn".format(update, *losses))


if __name__ == "__main__":
    main()
