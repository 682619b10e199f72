"""Products of a few rows: the kernel against double precision, and who asks it.

The kernel runs on a GPU (`-m gpu`) and, started once more by test_interpreted.py, under Triton's interpreter;
test_eight.py has weights of 8 bits.
"""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from interpreting import INTERPRETED, on_cpu, on_kernels
from redrafter.kernels.product import plain
from torch import nn

from conftest import rooted, tiny_model
from redrafter import RecurrentDrafter, generate
from redrafter.core.rows import SamplingNoise
from redrafter.engine import fused_linear as merged
from redrafter.heads.recurrent import ResidualBlock
from redrafter.kernels import product
from redrafter.proposers import RecurrentProposer
from redrafter.targets.isolation import isolated
from redrafter.targets.target import Target

HALVES = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]  # it multiplies bfloat16 as whole numbers
SIZES = [(1, 1), (16, 256), (37, 70), (130, 512), (70, 33)]  # out, in


def assert_near(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **told) -> None:
    """Within a few steps of the format of the largest that a sum could be: what follows adds no more than a step."""
    wide = {name: one.double() if isinstance(one, torch.Tensor) else one for name, one in told.items()}
    wanted = plain(x.double(), weight.double(), None if bias is None else bias.double(), **wide)
    reach = x.double().abs() @ weight.double().abs().T
    for one in (bias, told.get("onto")):
        reach[..., told.get("begin", 0) :] += 0 if one is None else one.double().abs()
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() / reach.clamp(min=1e-30)).max() < 4 * torch.finfo(x.dtype).eps


@pytest.fixture
def asked(monkeypatch):
    """The kernel is asked wherever its rows are few, of any dtype."""
    for module in (product, merged):
        monkeypatch.setattr(module, "measured", lambda weight: True)


def case(size, rows, dtype, device):
    """Two rows of the bias where the rows divide by two, a slice of a wider weight, rows that do not lie densely."""
    torch.manual_seed(0)
    columns, inner = size
    batch = 1 if rows % 2 else 2
    x = torch.randn(batch, rows // batch, inner + 3)[..., 3:]
    weight, bias = torch.randn(columns, 2 * inner)[:, inner:] / inner**0.5, torch.randn(batch, 1, columns)
    return [one.to(device, dtype) for one in (x, weight, bias, torch.randn(batch, rows // batch, columns))]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [1, 10, 16, 50])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_the_kernel(size, rows, dtype, device):
    from redrafter.kernels.triton import product as kernel

    x, weight, bias, onto = case(size, rows, dtype, device)
    begin = size[0] // 3
    for told in ({}, {"silu": True}, {"onto": onto}, {"silu": True, "onto": onto[..., begin:], "begin": begin}):
        added = bias[..., told.get("begin", 0) :]
        for one in (None, added[0, 0] if rows == 16 else added):
            assert_near(kernel.product(x, weight, one, **told), x, weight, one, **told)


@on_kernels
@torch.no_grad()
def test_every_way_to_cut_the_work(device):
    """Rows one by one too, without tensor cores; blocks of which the last ones are not full."""
    from redrafter.kernels.triton import product as kernel

    for rows, tile in ((1, (1, 8, 32, 3, 4)), (3, (1, 4, 64, 1, 4)), (1, (16, 16, 32, 3, 4)), (20, (32, 16, 64, 2, 4))):
        for inner in (128, 100):
            x, weight, bias, onto = case((70, inner), rows, torch.float32, device)
            told = {"silu": True, "onto": onto}
            found = kernel.product(x, weight, bias, **told, tiling=kernel.Tiling(*tile))
            assert_near(found, x, weight, bias, **told)


@on_kernels
def test_blocks_are_the_fastest_measured_and_leave_few_processors_idle(device):
    from redrafter.kernels.triton import product as kernel

    def chosen(rows, columns, inner, dtype=torch.bfloat16):
        return tuple(kernel.tiling_for(rows, torch.empty(columns, inner, dtype=dtype, device="meta")))

    assert chosen(1, 12_288, 4096) == (1, 8, 1024, 3, 8)  # the fastest of an H100, as docs/log.md has them
    assert chosen(1, 4096, 4096) == (1, 16, 256, 4, 4)
    assert chosen(16, 12_288, 4096) == (16, 32, 128, 4, 4)
    assert chosen(16, 4096, 11_008) == (16, 32, 256, 4, 4)
    assert chosen(16, 22_016, 4096) == (16, 64, 128, 4, 4)
    assert chosen(10, 32_000, 8192, torch.int8) == (16, 64, 128, 3, 4)
    assert chosen(50, 4096, 4096, torch.int8) == (64, 64, 128, 3, 4)
    assert chosen(10, 2304, 768) == (16, 32, 128, 3, 4)
    assert chosen(10, 1536, 1536) == (16, 16, 256, 3, 4)
    for columns in (1536, 2304, 3072, 4096, 16_000):
        assert columns / chosen(1, columns, 768)[1] > 128
        assert columns / chosen(10, columns, 768)[1] >= 72


PROPOSALS = [
    ({}, 1, 16),
    ({}, 2, 4),
    ({"exit_dim": 20, "num_draft_layers": 3}, 2, 16),
    ({"exit_dim": 20}, 2, 4),
    ({"rnn": False}, 2, 16),
    ({"gated": True, "exit_dim": 32}, 1, 16),
]


@on_kernels
@pytest.mark.parametrize(("form", "batch", "few"), PROPOSALS, ids=str)
@torch.no_grad()
def test_proposals(form, batch, few, device, asked, monkeypatch):
    """Drafts by the kernel, and where rows are many by torch, are the drafter's plain ones."""
    torch.manual_seed(0)
    model = tiny_model().to(device)
    with monkeypatch.context() as patch:
        patch.setattr("redrafter.targets.target.has_kernels", lambda *_: False)  # the target takes no part
        drafter = RecurrentDrafter.for_target(model, draft_vocabulary=torch.arange(3, 50), **form)
        for parameter in drafter.parameters():
            nn.init.normal_(parameter, std=0.3)
        proposer = RecurrentProposer(drafter, Target(model), 3, 3)
    context, root = torch.randn(2, 32)[:batch].to(device), torch.tensor([5, 9], device=device)[:batch]
    told = (None, rooted(root), context[:, None], SamplingNoise((), None))
    with monkeypatch.context() as patch:
        patch.setattr(product, "FEW", few)
        if 3 * batch <= few:
            patch.setattr(product, "plain", None)
        found = proposer.prepare().propose(*told)
    monkeypatch.setattr(product, "FEW", 0)
    for name in ("beam", "fast.fused", "fast.product", "fast.top", "tree"):
        monkeypatch.setattr(f"redrafter.{name}.has_kernels", lambda *_: False)
    wanted = proposer.propose(*told)
    assert found.tokens.equal(wanted.tokens)
    assert found.parents.equal(wanted.parents)


@on_kernels
@torch.no_grad()
def test_the_operator_of_compiled_code(device):
    x, weight, bias, onto = case((37, 70), 4, torch.float32, device)
    for told in ((x, weight, None, None, None, False, 0), (x, weight, bias[..., 5:], None, onto[..., 5:], True, 5)):
        torch.library.opcheck(product._operator, told)


@pytest.fixture
def launched(monkeypatch, asked):
    """Rows and weights that the kernel is handed, for which torch stands in; every layer is large enough."""
    found = []

    def instead(x, weight, bias, scale, onto, silu, begin):
        found.append((x.numel() // x.shape[-1], tuple(weight.shape)))
        return plain(x, weight, bias, scale=scale, onto=onto, silu=silu, begin=begin)

    monkeypatch.setattr(product, "_launched", instead)
    monkeypatch.setattr(merged, "LARGE", 0)
    return found


@on_cpu
def test_few_rows_of_a_block_are_one_launch(launched, monkeypatch):
    block, x = ResidualBlock(5), torch.randn(4, 4, 5)
    wanted = block(x)
    assert not launched  # for it may be differentiated
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
        block(x[:0])
        block(x.expand(2, 4, 4, 5))
    assert launched == [(16, (5, 5))]
    monkeypatch.setattr(product, "measured", lambda weight: False)
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
    assert len(launched) == 1


@on_cpu
def test_few_rows_of_a_models_layers(launched, monkeypatch):
    model = tiny_model("qwen2")
    few, many = torch.tensor([[5, 9, 12]]), torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted, wanted_of_many = model(few).logits, model(many).logits
        own = isolated(model)
        assert merged.merge(own) == 9  # q, k and v; output; gate and up; down; in two layers, and the head
        torch.testing.assert_close(own(few).logits, wanted)
        assert len(launched) == 9
        assert launched[-1] == (3, (61, 32))
        torch.testing.assert_close(own(many).logits, wanted_of_many)
        assert len(launched) == 9
        with torch.enable_grad():
            own(few)
        assert len(launched) == 9
        monkeypatch.setattr(merged, "LARGE", 61 * 32)
        own = isolated(model)
        assert merged.merge(own) == 5  # without the output and down: the others are large enough together
        own(few)
    assert launched[9:] == [(3, (64, 32)), (3, (96, 32))] * 2 + [(3, (61, 32))]
    assert all(type(one) is not merged._Part for one in model.modules())


@on_cpu
def test_it_was_measured_on_nvidias_hopper_alone(monkeypatch):
    monkeypatch.setattr(product, "has_kernels", lambda *_: True)
    for major, hip, wanted in ((8, None, False), (9, None, True), (9, "7.0", False), (10, None, False)):
        product._known.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        monkeypatch.setattr(torch.version, "hip", hip)
        assert product._known(torch.device("cuda")) is wanted
        assert not product._known(torch.device("cpu"))
    product._known.cache_clear()
    monkeypatch.setattr(product, "_known", lambda _: True)
    half = torch.empty(8, 8, dtype=torch.bfloat16)
    assert product.measured(half)
    assert product.measured(nn.Parameter(half))
    assert not product.measured(half.float())
    assert not product.measured(half.as_subclass(Quantised))


class Quantised(torch.Tensor):
    """As others keep weights: not what it says it holds."""


@on_cpu
def test_an_adapted_layer_of_a_block_is_asked_itself(launched):
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    block, x = ResidualBlock(5), torch.randn(4, 5)
    adapted = Adapted(5, 5)
    adapted.load_state_dict(block.linear.state_dict())
    block.linear = adapted
    with torch.no_grad():
        torch.testing.assert_close(block(x), x + nn.functional.silu(adapted(x)))
    assert not launched


@on_cpu
def test_nothing_is_asked_under_autocast(asked, monkeypatch):
    monkeypatch.setattr(merged, "LARGE", 0)
    weight = torch.empty(8, 8)
    assert merged.few(weight) == merged.FEW
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert merged.few(weight) == 0


@on_cpu
def test_long_sums_of_more_rows_than_one_are_torchs(asked, monkeypatch):
    monkeypatch.setattr(merged, "LARGE", 32)
    few = [merged.few(torch.empty(size)) for size in ((4, 9), (4, 8), (9, 4), (4, 7))]
    assert few == [1, merged.FEW, merged.FEW, 0]
    monkeypatch.setattr(merged, "FEW", 0)
    assert merged.few(torch.empty(4, 9)) == 0


@on_cpu
@pytest.mark.parametrize("weight", [torch.empty(8, 8), torch.empty(8, 8, dtype=torch.bfloat16)], ids=["wide", "half"])
def test_nothing_is_asked_of_it_on_a_cpu(weight):
    assert not product.measured(weight)
    with torch.no_grad():
        assert not product.fused(weight[:1], weight)
    assert merged.few(weight.expand(10**6, 8, 8)) == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("default", "error:Decoding goes on without")  # torch has warnings of its own
@pytest.mark.parametrize("compile", [False, True])
def test_replayed_text_is_plain_text(compile, asked, monkeypatch):
    """In float32, so that no rounding parts them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch does not see through its checks
    monkeypatch.setattr(merged, "LARGE", 0)
    torch._dynamo.reset()
    model = tiny_model("qwen2").cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3)
    for drafting in (None, drafter):
        told = {"max_new_tokens": 40, "batch_size": 2}
        wanted = generate(model, drafting, [[5, 9, 12], [7, 3], [4]], fast=False, **told)
        found = generate(model, drafting, [[5, 9, 12], [7, 3], [4]], compile=compile, **told)
        assert found.new_tokens == wanted.new_tokens


@pytest.mark.gpu
@torch.no_grad()
def test_where_it_was_measured_layers_are_the_kernels():
    if torch.cuda.get_device_capability()[0] != product.CAPABILITY:
        pytest.skip("nothing was measured on this GPU")
    layer = nn.Linear(2048, 2048, device="cuda", dtype=torch.bfloat16)
    assert merged.few(layer.weight) == merged.FEW
    assert merged.few(layer.weight[:8]) == merged.few(layer.weight.float()) == 0
    assert product.fused(layer.weight[:16], layer.weight)
    assert not product.fused(layer.weight[:17], layer.weight)
    model = nn.Sequential(layer)
    x = torch.randn(3, 2048, device="cuda", dtype=torch.bfloat16)
    wanted = model(x).float()
    own = isolated(model)
    assert merged.merge(own) == 1
    assert (own(x).float() - wanted).norm() < 0.01 * wanted.norm()
