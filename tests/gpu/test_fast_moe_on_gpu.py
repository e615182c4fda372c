"""Grouped experts as a GPU runs them: against the stock path there, without a wait, and without memory of its own."""

import itertools
from typing import Any

import pytest
import torch
from helpers_fast_moe import FAMILIES, blocks, build
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, apply_rotary_pos_emb

from tunescope import accelerate_moe
from tunescope.kernels.frozen_norm import frozen_rms_norm
from tunescope.kernels.rotary import rotate
from tunescope.models import fast_moe_ops as ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Wide enough for whole tiles of the 4-bit kernels; both ways to multiply by 4-bit weights lie between these tokens.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 384}
TOKENS = (1, 40, 8192)
MIB = 2**20


def run(block: Any, hidden_BLD: Tensor, upstream: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Output, router logits and all gradients of one block under autocast; zeros where there is no gradient."""
    block.zero_grad()
    leaf = hidden_BLD.detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        out, logits = block(leaf)
    torch.autograd.backward([out, logits], [one.to(out.dtype) for one in upstream])
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in block.named_parameters()
        if parameter.requires_grad
    }
    assert leaf.grad is not None
    return {"out": out.detach(), "logits": logits.detach(), "input": leaf.grad} | gradients


def case(family: str, num_tokens: int) -> tuple[Any, Any, Tensor, tuple[Tensor, Tensor]]:
    model = build(FAMILIES[family] | WIDE, dtype=torch.bfloat16, device=DEVICE).to(DEVICE)
    block = blocks(model)[0]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    hidden = normal(1, num_tokens, 256).bfloat16()
    return model, block, hidden, (normal(1, num_tokens, 256), 0.01 * normal(num_tokens, len(block.experts)))


@pytest.mark.parametrize(("family", "num_tokens"), itertools.product(FAMILIES, TOKENS))
def test_as_the_stock_path(family: str, num_tokens: int) -> None:
    """One token leaves most experts idle: their gradients must be zeros, not what was in memory."""
    model, block, hidden, upstream = case(family, num_tokens)
    stock = run(block, hidden, upstream)
    accelerated = accelerate_moe(model)
    trash = [torch.full((64 * MIB,), float("nan"), device=DEVICE) for _ in range(4)]
    del trash  # so that fresh memory is full of NaN
    grouped = run(block, hidden, upstream)
    torch.testing.assert_close(grouped["logits"], stock["logits"], rtol=0, atol=0)
    for name, wanted in stock.items():
        found = grouped[name]
        assert found.isfinite().all(), name
        assert found.dtype == wanted.dtype
        error, size = (found - wanted).float().norm(), wanted.float().norm()
        assert error <= 0.04 * size + 1e-6, f"{name}: {float(error / size):.3f}"
        assert bool(found.any()) == bool(wanted.any()), name
    accelerated.restore()
    again = run(block, hidden, upstream)
    assert torch.equal(again["out"], stock["out"])


@pytest.mark.parametrize(("family", "num_tokens"), itertools.product(FAMILIES, TOKENS))
def test_the_host_never_waits(family: str, num_tokens: int) -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch's grouped matmul waits on this GPU")
    model, block, hidden, upstream = case(family, num_tokens)
    accelerate_moe(model)
    run(block, hidden, upstream)  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(block, hidden, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_is_told_from_forward(reentrant: bool) -> None:
    """Backward runs in a thread of its own here."""
    model = build(FAMILIES["mixtral"] | WIDE, dtype=torch.bfloat16, device=DEVICE, reentrant=reentrant).to(DEVICE)
    ids = torch.randint(3, 1000, (2, 64), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    kept = accelerate_moe(model, recompute="none")
    wanted = gradients()
    kept.restore()
    recomputed = accelerate_moe(model)
    assert recomputed.checkpointed_layers == (0, 1)
    for one, other in zip(gradients(), wanted, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (77, 2048), (4096, 4096)])
def test_the_norm_rounds_where_transformers_rounds(shape: tuple[int, int], weight_dtype: torch.dtype) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, dy = (torch.randn(shape, device=DEVICE, generator=generator).bfloat16() for _ in range(2))
    stock = MixtralRMSNorm(shape[1], eps=1e-5).to(DEVICE)
    stock.weight.data = (1 + 0.3 * torch.randn(shape[1], device=DEVICE, generator=generator)).to(weight_dtype)
    found = []
    for norm in (stock, lambda leaf: frozen_rms_norm(leaf, stock.weight, 1e-5)):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.backward(dy.to(y.dtype))
        found.append((y.detach(), leaf.grad))
    (y, dx), (our_y, our_dx) = found
    assert our_y.dtype == y.dtype
    assert (our_y != y).float().mean() < 0.01  # a sum in another order may round otherwise
    assert (our_dx.float() - dx.float()).norm() <= 4e-3 * dx.float().norm()


@pytest.mark.parametrize("heads", [4, 32])
def test_rotary_is_transformers_up_to_its_roundings(heads: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, dy = (torch.randn(3, 77, heads, 128, device=DEVICE, generator=generator).bfloat16() for _ in range(2))
    angle = torch.randn(1, 77, 64, device=DEVICE, generator=generator).repeat(1, 1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    found = []
    for function in (lambda q: apply_rotary_pos_emb(q, q, cos, sin)[0], lambda q: rotate(q, cos, sin)):
        leaf = x.transpose(1, 2).detach().requires_grad_()
        y = function(leaf)
        y.backward(dy.transpose(1, 2))
        found.append((y.detach().float(), leaf.grad.float()))
    for stock, ours in zip(*found, strict=True):
        assert (ours - stock).norm() <= 6e-3 * stock.norm()


def test_replayed_steps_are_the_steps() -> None:
    """CUDA graphs for real: three shapes, accumulation, and the losses of training with and without."""
    curves = []
    for graphs in (True, False):
        model = build(FAMILIES["mixtral"] | WIDE, dtype=torch.bfloat16, device=DEVICE, reentrant=False).to(DEVICE)
        accelerated = accelerate_moe(model, graphs=graphs)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
        losses = []
        for step in range(12):
            for micro in range(1 + step % 2):
                ids = torch.randint(3, 1000, (2, (32, 40, 64)[step % 3]), generator=torch.Generator().manual_seed(step))
                ids = ids.roll(micro, 1).to(DEVICE)
                mask = torch.ones_like(ids)
                mask[0, -5:] = 0
                with torch.autocast(DEVICE, torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
                loss.backward()
                losses.append(loss.detach().clone())
                del loss  # a graph that is still alive would keep where gradients are added on its own stream
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        curves.append(torch.stack(losses))
        if accelerated.graphs is not None:
            assert accelerated.graphs.why_not is None
            assert (accelerated.graphs.num_shapes, accelerated.graphs.num_replays) == (3, 15)
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=0.02)
    assert curves[0][-1] < curves[0][0]


def test_layout_takes_no_memory() -> None:
    model = build(FAMILIES["mixtral"] | WIDE | {"intermediate_size": 4096}, device=DEVICE).to(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    accelerated = accelerate_moe(model)
    assert torch.cuda.memory_allocated() <= before + MIB
    accelerated.restore()
    assert torch.cuda.memory_allocated() <= before + MIB


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 768), (77, 1000), (4096, 14336)])
def test_kernels_between_the_matmuls(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Against plain torch in fp32."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    gate, up, grad = (torch.randn(shape, device=DEVICE, generator=generator).to(dtype) for _ in range(3))
    weight = torch.rand(shape[0], device=DEVICE, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    exact = [tensor.float() for tensor in (gate, up, grad, weight)]
    found = (ops.gated_silu(gate, up), *ops.gated_silu_backward(gate, up, grad, weight))
    wanted = (ops.gated_silu_ref(*exact[:2]), *ops.gated_silu_backward_ref(*exact))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.float() - other).norm() <= tolerance * other.norm()
    if shape[0] % 7 == 0:
        order = torch.randperm(shape[0], device=DEVICE).view(-1, 7)
        share = torch.rand(order.shape, device=DEVICE).to(dtype)
        summed = ops.gather_sum(gate, order, share)
        assert (summed.float() - ops.gather_sum_ref(exact[0], order, share.float())).norm() <= tolerance * summed.norm()
