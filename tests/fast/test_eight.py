"""Products of 8-bit weights: what is rounded, and the kernel against the plain way.

The kernel runs on a GPU (`-m gpu`) and, started once more by test_interpreted.py, under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from interpreting import INTERPRETED, on_cpu, on_kernels
from torch import nn

from conftest import rooted, tiny_model
from redrafter import RecurrentDrafter
from redrafter.core.rows import SamplingNoise
from redrafter.heads.eight import ROWS, EightBit
from redrafter.kernels.product import plain
from redrafter.proposers import RecurrentProposer
from redrafter.targets.target import Target

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = DTYPES[:2] if INTERPRETED else DTYPES  # it multiplies bfloat16 as whole numbers
SIZES = [(1, 1), (16, 256), (37, 70), (64, 300), (130, 512), (70, 33)]  # out, in


def layer_of(columns: int, inner: int, dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    """Rows of very different sizes, one of them of zeros where there are several."""
    torch.manual_seed(0)
    layer = nn.Linear(inner, columns, bias=bias)
    with torch.no_grad():
        layer.weight *= torch.logspace(-1, 1, columns)[:, None]
        if columns > 2:
            layer.weight[1] = 0
    return layer.to(dtype)


def exact(layer: EightBit, x: torch.Tensor) -> torch.Tensor:
    """In double precision."""
    weight = layer.weight.double() * layer.scale.double()[:, None]
    return nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


def assert_near(found: torch.Tensor, layer: EightBit, x: torch.Tensor) -> None:
    """Within a few steps of the format of the largest that a sum could be."""
    assert found.shape == (*x.shape[:-1], len(layer.weight))
    assert found.dtype == x.dtype
    bias = 0 if layer.bias is None else layer.bias.double().abs()
    reach = (x.double().abs() @ layer.weight.double().abs().T) * layer.scale.double() + bias
    far = (found.double() - exact(layer, x)).abs() / reach.clamp(min=1e-30)
    assert far.max() < 4 * torch.finfo(x.dtype).eps


@on_kernels
@pytest.mark.parametrize("dtype", KERNELS, ids=str)
@pytest.mark.parametrize("rows", [1, 10, 50, 130])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_the_kernel(size, rows, dtype, device, monkeypatch):
    monkeypatch.setattr("redrafter.kernels.product.plain", None)
    layer = EightBit.of(layer_of(*size, dtype, bias=rows != 10)).to(device)
    x = torch.randn(rows, size[1]).to(device, dtype)
    assert_near(layer(x), layer, x)


@on_kernels
@torch.no_grad()
def test_rows_however_they_lie(device, monkeypatch):
    monkeypatch.setattr("redrafter.kernels.product.plain", None)
    layer = EightBit.of(layer_of(20, 48, torch.float32)).to(device)
    whole = torch.randn(3, 5, 96, device=device)
    for x in (
        whole[..., 48:],
        whole[..., ::2],
        whole[0, 0, 1:49],
        whole[:, :1, :48].expand(-1, 4, -1),
        whole[:0, :, :48],
    ):
        assert layer(x).shape == (*x.shape[:-1], 20)
        if x.numel():
            assert_near(layer(x), layer, x)


@on_kernels
@torch.no_grad()
def test_wide_layers_take_other_blocks(device, monkeypatch):
    from redrafter.kernels.triton import product

    monkeypatch.setattr("redrafter.kernels.product.plain", None)
    monkeypatch.setattr(product, "MANY_COLUMNS", 100)
    layer = EightBit.of(layer_of(130, 140, torch.float32)).to(device)
    x = torch.randn(3, 140, device=device)
    assert_near(layer(x), layer, x)


def of_sixteen_bits(*given, scale=None, **told):
    """The plain way of the products that are not in 8 bits."""
    assert scale is None
    return plain(*given, **told)


@on_kernels
@torch.no_grad()
def test_proposals(device, monkeypatch):
    """The kernels' drafts of a drafter in 8 bits, joined products and all, are its plain ones."""
    model = tiny_model().to(device)
    with monkeypatch.context() as patch:
        patch.setattr("redrafter.targets.target.has_kernels", lambda *_: False)  # the target takes no part
        drafter = RecurrentDrafter.for_target(model, num_draft_layers=3)
        for parameter in drafter.parameters():
            nn.init.normal_(parameter, std=0.3)
        proposer = RecurrentProposer(drafter.to_eight_bits(), Target(model), 6, 4)
    context, root = torch.randn(2, 32).to(device), torch.tensor([5, 9], device=device)
    told = (None, rooted(root), context[:, None], SamplingNoise((), None))
    quick = proposer.prepare()
    assert quick.fused is not None
    with monkeypatch.context() as patch:
        patch.setattr("redrafter.kernels.product.plain", of_sixteen_bits)
        found = quick.propose(*told)
    for name in ("beam", "fast.fused", "fast.product", "fast.top", "tree"):
        monkeypatch.setattr(f"redrafter.{name}.has_kernels", lambda *_: False)
    wanted = proposer.propose(*told)
    assert found.tokens.equal(wanted.tokens)
    assert found.parents.equal(wanted.parents)


@on_cpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_is_rounded(size, dtype):
    layer = layer_of(*size, dtype)
    found = EightBit.of(layer)
    assert found.weight.dtype == torch.int8
    assert found.dtype == dtype
    weight = layer.weight.detach().double()
    scale = found.scale.double()[:, None]
    assert ((found.weight * scale - weight).abs() <= scale * 0.5001).all()
    assert (found.scale.double() * 127 <= weight.abs().amax(1).clamp(min=127) * 1.001).all()
    largest = found.weight.abs().amax(1)
    assert set(largest.tolist()) <= {127, 0}
    assert largest.eq(0).equal(weight.eq(0).all(1))
    for rows in (1, 10, 50):
        x = torch.randn(rows, size[1]).to(dtype)
        assert_near(found(x), found, x)
        wanted = layer(x).double()
        assert (found(x).double() - wanted).norm() < 0.02 * wanted.norm()


@on_cpu
def test_large_weights_are_rounded_in_parts():
    weight = torch.randn(2 * ROWS + 3, 2)
    found = EightBit(weight)
    assert (found.weight * found.scale[:, None] - weight).abs().max() <= found.scale.max() * 0.5001


@on_cpu
def test_sums_that_float16_could_not_hold_unscaled():
    layer = EightBit(torch.full((2, 1000), 0.01, dtype=torch.float16))
    assert_near(layer(torch.full((1, 1000), 8.0, dtype=torch.float16)), layer, torch.full((1, 1000), 8.0).half())


@on_cpu
def test_a_conversion_leaves_the_weights_alone():
    layer = EightBit.of(layer_of(20, 30, torch.float32))
    before = {name: part.clone() for name, part in layer.named_buffers()}
    layer.to(torch.bfloat16).half().double()
    assert layer.dtype == layer.bias.dtype == torch.double
    assert layer.weight.equal(before["weight"])
    assert layer.scale.equal(before["scale"])
    assert layer.to("meta").scale.device.type == "meta"


@on_cpu
def test_no_kernel_takes_part_where_gradients_are_asked(monkeypatch):
    monkeypatch.setattr("redrafter.kernels.product.has_kernels", lambda *_: pytest.fail("it was asked"))
    layer = EightBit.of(layer_of(20, 30, torch.float32))
    x = torch.randn(4, 30, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, (layer.weight * layer.scale[:, None]).sum(0).expand_as(x))
