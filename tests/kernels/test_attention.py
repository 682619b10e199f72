"""The kernels against the plain way, the plain way against torch's, and both inside models of transformers.

The kernels' tests run on a GPU (`-m gpu`) and, started once more by test_interpreted.py, under Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from interpreting import INTERPRETED, on_cpu, on_kernels
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from conftest import greedy
from redrafter import RedrafterError
from redrafter.core import tree_attention as attention
from redrafter.core.tree import DraftTree, ancestors_of, chain, tree_mask
from redrafter.core.tree_attention import bit_mask, from_bit_mask, reference, tree_attention
from redrafter.targets.target import Target
from test_families import WORKS, build


def random_tree(batch: int, size: int, *, padding: int = 0, seed: int = 0) -> DraftTree:
    """Every node below any earlier one; the last `padding` nodes of the last row are padding."""
    draw = torch.Generator().manual_seed(seed)
    parents = (torch.rand(batch, size, generator=draw) * torch.arange(size)).long()
    valid = torch.ones(batch, size, dtype=torch.bool)
    if padding:
        valid[-1, -padding:] = False
    parents[~valid] = 0
    ancestors = ancestors_of(parents, max_depth=size)
    depth = (ancestors.sum(-1) - 1).where(valid, 0)
    return DraftTree(parents, parents, depth, valid, ancestors)


def inputs(heads, kv_heads, size, value_size, slots, tree, length, *, device="cpu", dtype=torch.float32, seed=1):
    """Queries as models give them, a transposed view; keys and values sliced from longer ones, NaN where unwritten."""
    torch.manual_seed(seed)
    batch, nodes = tree.depth.shape
    query = torch.randn(batch, nodes, heads, size).to(device, dtype).transpose(1, 2)
    key, value = (
        torch.randn(batch, kv_heads, slots + 5, x).to(device, dtype)[:, :, :slots] for x in (size, value_size)
    )
    unwritten = (torch.arange(slots) >= length[:, None] + nodes)[:, None, :, None].to(device)
    return query, key.masked_fill(unwritten, torch.nan), value.masked_fill(unwritten, torch.nan)


def doubles(*tensors):
    return [tensor.double().cpu() for tensor in tensors]


def distance(found, wanted) -> float:
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm())


@on_cpu
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 70, 130])
def test_a_bit_mask_contains_the_tree_that_attention_reads(size):
    tree, length = random_tree(3, size), torch.tensor([0, 7, 123_456])
    for rows in (None, torch.tensor([5, 0, 5])):
        mask = bit_mask(tree, length, rows)
        assert mask.shape == (3, 1, size, 3 + (size + 31) // 32)
        assert mask.dtype == torch.int64
        again, lengths, cached = from_bit_mask(mask)
        assert lengths.equal(length)
        assert cached.tolist() == ([0, 1, 2] if rows is None else [5, 0, 5])
        assert again.depth.equal(tree.depth)
        assert again.ancestors.equal(tree.ancestors)


@on_cpu
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("size", [1, 9, 40])
def test_the_plain_way_is_masked_attention(size, window):
    tree, length, slots = random_tree(2, size, padding=size // 4), torch.tensor([0, 13]), 60
    query, key, value = inputs(6, 2, 8, 12, slots, tree, length, dtype=torch.float64)
    visible = tree_mask(tree, length, slots=slots, window=window)[:, None]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key.nan_to_num(), value.nan_to_num(), visible, scale=0.3, enable_gqa=True
    )
    found = reference(query, key, value, bit_mask(tree, length), scaling=0.3, window=window)
    assert found.shape == (2, size, 6, 12)
    assert distance(found, wanted.transpose(1, 2)) < 1e-12


CASES = [
    # heads, of keys, nodes, key size, value size, slots, lengths, what else
    ((1, 1, 1, 64, 64, 40, [0]), {}),
    ((4, 4, 1, 64, 64, 200, [199, 0, 77]), {}),
    ((8, 1, 5, 64, 64, 200, [130]), {}),
    ((3, 1, 33, 80, 80, 150, [0, 117]), {}),
    ((7, 1, 5, 96, 96, 150, [31, 32]), {}),
    ((4, 1, 64, 128, 128, 200, [136]), {}),
    ((2, 2, 70, 64, 128, 180, [110]), {}),
    ((2, 1, 130, 128, 64, 200, [70]), {}),
    ((2, 1, 5, 256, 256, 100, [90]), {}),
    ((2, 1, 5, 192, 128, 100, [64]), {}),
    ((1, 1, 3, 20, 12, 50, [40]), {}),
    ((4, 2, 5, 64, 64, 200, [190, 0]), {"window": 1}),
    ((3, 1, 33, 64, 64, 200, [150, 3]), {"window": 7}),
    ((4, 1, 33, 64, 64, 200, [160]), {"window": 70}),
    ((4, 1, 33, 64, 64, 200, [160]), {"window": 4096}),
    ((4, 2, 9, 64, 64, 200, [160, 5]), {"softcap": 3.0}),
    ((4, 2, 9, 64, 64, 200, [160, 0]), {"sinks": True}),
    ((4, 4, 1, 64, 64, 40, [20, 3, 9, 30]), {"sinks": True}),
    ((6, 2, 9, 80, 64, 200, [160, 2]), {"sinks": True, "softcap": 2.0, "window": 11}),
]


TYPED = [(*case, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16) for case in CASES]
if INTERPRETED:  # which is slow, and multiplies bfloat16 as whole numbers
    TYPED = TYPED[: len(CASES)] + TYPED[len(CASES) : 2 * len(CASES) : 3]


@on_kernels
@pytest.mark.parametrize(("shape", "what", "dtype"), TYPED, ids=str)
def test_the_kernels_give_what_the_plain_way_gives(shape, what, dtype, device):
    heads, kv_heads, nodes, size, value_size, slots, lengths = shape
    tree, length = random_tree(len(lengths), nodes, padding=nodes // 5), torch.tensor(lengths)
    query, key, value = inputs(heads, kv_heads, size, value_size, slots, tree, length, device=device, dtype=dtype)
    what = dict(what)
    if "sinks" in what:
        what["sinks"] = torch.randn(heads).to(device, dtype)
    mask = bit_mask(tree, length).to(device)
    found = tree_attention(query, key, value, mask, scaling=0.25, **what)
    assert found.dtype == dtype
    if "sinks" in what:
        (what["sinks"],) = doubles(what["sinks"])
    wanted = reference(*doubles(query, key, value), mask.cpu(), scaling=0.25, **what)
    assert distance(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@on_kernels
@pytest.mark.parametrize("slots", [50, 300])
def test_rows_may_be_any_rows_of_the_cache(slots, device):
    tree, length = random_tree(4, 9), torch.tensor([slots - 9, 0, 17, 31])
    query, key, value = inputs(4, 2, 64, 64, slots, tree, length, device=device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    wanted = reference(*doubles(query, key, value), bit_mask(tree, length), scaling=0.2)
    mask = bit_mask(tree, length, order.argsort().cpu()).to(device)
    assert distance(tree_attention(query, key[order], value[order], mask, scaling=0.2), wanted) < 1e-5


@on_kernels
@pytest.mark.parametrize("sinks", [False, True])
def test_any_number_of_parts_gives_the_same(sinks, device):
    from redrafter.kernels.triton import attention as kernels

    tree, length = random_tree(2, 20), torch.tensor([0, 100])
    query, key, value = inputs(2, 1, 64, 64, 130, tree, length, device=device)
    mask = bit_mask(tree, length).to(device)
    sink = torch.randn(2) if sinks else None
    wanted = reference(*doubles(query, key, value), mask.cpu(), scaling=0.2, sinks=sink)
    sink = sink.to(device) if sinks else None
    for keys, splits in ((16, 1), (16, 3), (16, 17), (64, 1), (64, 2), (128, 2)):  # up to more than there are blocks
        tile = kernels.Tiling(32, keys, 4, 2)
        found = kernels.launch(query, key, value, mask, 0.2, None, None, sink, tiling=tile, splits=splits)
        assert distance(found, wanted) < 1e-5


@on_kernels
def test_a_node_depends_on_nothing_that_it_does_not_see(device):
    tree, length = random_tree(2, 20), torch.tensor([30, 64])
    query, key, value = inputs(4, 2, 64, 64, 120, tree, length, device=device)
    mask = bit_mask(tree, length).to(device)
    before = tree_attention(query, key, value, mask, scaling=0.2)
    node = 11
    unseen = ~tree_mask(tree, length, slots=120)[:, node].to(device)
    unseen &= torch.arange(120, device=device) < (length[:, None] + 20).to(device)
    other = tree_attention(
        query,
        key.masked_fill(unseen[:, None, :, None], 1e4),
        value.masked_fill(unseen[:, None, :, None], -1e4),
        mask,
        scaling=0.2,
    )
    assert unseen.any()
    assert other[:, node].equal(before[:, node])
    assert not other.equal(before)


@pytest.mark.gpu
def test_a_graph_follows_rows_that_grow():
    slots, nodes = 300, 40
    query, key, value = inputs(8, 2, 64, 64, slots, random_tree(2, nodes), torch.tensor([260, 260]), device="cuda")
    tree = random_tree(2, nodes)
    held = DraftTree(**{name: field.cuda() for name, field in vars(tree).items() if field is not None})
    length = torch.tensor([0, 5], device="cuda")
    tree_attention(query, key, value, bit_mask(held, length), scaling=0.2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tree_attention(query, key, value, bit_mask(held, length), scaling=0.2)
    for lengths in ([0, 5], [260, 31], [100, 259]):
        length.copy_(torch.tensor(lengths))
        graph.replay()
        wanted = reference(*doubles(query, key, value), bit_mask(tree, torch.tensor(lengths)), scaling=0.2)
        assert distance(found, wanted) < 1e-5


def prefilled(target: Target, prompts: list[list[int]], slots: int):
    """A cache that holds the prompts, and their lengths."""
    cache, length = target.new_cache(batch=len(prompts), slots=slots), torch.tensor([len(p) for p in prompts])
    width = int(length.max())
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    target.forward(chain(tokens), torch.zeros_like(length), cache)
    return cache, length


def have_kernels(monkeypatch) -> None:
    """Targets are probed as if kernels ran; the PyTorch reference replaces them."""
    for module in ("target", "probe"):
        monkeypatch.setattr(f"redrafter.targets.{module}.has_kernels", lambda *_: True)


OWN_ATTENTION = {"falcon", "gptj", "codegen"}
"""Families whose attention transformers lets nobody replace."""
FAMILIES = ["llama", "gemma2", "gpt_oss", "deepseek_v3"] if INTERPRETED else WORKS  # a family of each kind of attention


@pytest.mark.filterwarnings("default")  # some families warn of themselves
@pytest.mark.parametrize("family", FAMILIES)
def test_models_accept_the_bit_mask(family, monkeypatch):
    model = build(family, WORKS[family][1], "eager")
    target = Target(model)
    monkeypatch.setattr(target, "tree_kernels", False)
    torch.manual_seed(2)
    calls = []
    forward = attention.tree_attention
    monkeypatch.setattr(attention, "tree_attention", lambda *a, **k: calls.append(1) or forward(*a, **k))
    with torch.no_grad():
        cache, length = prefilled(target, [[9, 8, 7], list(range(3, 20))], slots=40)
        tree = random_tree(2, 12, padding=3)
        tree = DraftTree(torch.randint(3, 60, (2, 12)), tree.parents, tree.depth, tree.valid, tree.ancestors)
        states, logits = target.forward(tree, length, cache)
        assert not calls
        attention.register()
        monkeypatch.setattr(target, "tree_kernels", True)
        if family in OWN_ATTENTION:
            return
        again, logits_again = target.forward(tree, length, cache)
    assert len(calls) == model.config.num_hidden_layers
    assert model.config._attn_implementation == "eager"
    assert distance(again[tree.valid], states[tree.valid]) < 1e-4
    assert distance(logits_again[tree.valid], logits[tree.valid]) < 1e-4


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_target_finds_out_whether_the_kernels_serve(family, monkeypatch):
    have_kernels(monkeypatch)
    assert Target(build(family, WORKS[family][1], "eager")).tree_kernels == (family not in OWN_ATTENTION)


@on_cpu
def test_kernels_that_fail_do_not_serve_but_full_memory_says_nothing_of_them(monkeypatch):
    class TritonError(Exception):
        """As triton's own, which are no RuntimeError: of blocks that its GPU has no room for, say."""

    def fails(*_, **__):
        raise error

    have_kernels(monkeypatch)
    monkeypatch.setattr("redrafter.targets.target.bit_mask", fails)
    error = TritonError("out of resource: shared memory")
    assert not Target(build("llama", WORKS["llama"][1], "eager")).tree_kernels
    error = torch.OutOfMemoryError("CUDA out of memory")
    model = build("llama", WORKS["llama"][1], "eager")
    with pytest.raises(torch.OutOfMemoryError):
        Target(model)
    monkeypatch.undo()
    assert Target(model).vocab_size > 0, "it is asked anew"


@on_cpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_without_a_tree_transformers_text_is_what_it_was(family):
    attention.register()
    model = build(family, WORKS[family][1], "eager")
    model.generation_config.eos_token_id = None
    prompt = list(range(3, 20))
    padded = {"input_ids": torch.tensor([prompt, [0] * 10 + prompt[:7]])}
    padded["attention_mask"] = (padded["input_ids"] > 0).long()

    def outputs():
        with torch.no_grad():
            return model(torch.tensor([prompt])).logits, model(**padded).logits[:, -1]

    wanted, before = greedy(model, prompt, 8), outputs()
    model.set_attn_implementation(attention.NAME)
    assert greedy(model, prompt, 8) == wanted
    for found, logits in zip(outputs(), before, strict=True):
        assert distance(found, logits) < 1e-5


@on_cpu
def test_what_the_kernel_does_not_compute_is_refused():
    tree, length = random_tree(1, 3), torch.tensor([4])
    query, key, value = inputs(2, 1, 8, 8, 20, tree, length)
    module, mask = torch.nn.Module(), bit_mask(tree, length)
    for asked in ({"dropout": 0.1}, {"position_bias": torch.zeros(1)}):
        with pytest.raises(RedrafterError, match="neither dropout nor position biases, which Module needs"):
            attention.attention_forward(module, query, key, value, mask, **asked)
    with pytest.raises(RedrafterError, match="attn_implementation='eager'"):
        attention.attention_forward(module, query, key, value, None, dropout=0.1, softcap=2.0)


@on_cpu
def test_registering_twice_changes_nothing():
    attention.register()
    attention.register()
    assert ALL_ATTENTION_FUNCTIONS[attention.NAME] is attention.attention_forward


@on_cpu
def test_torch_compile_keeps_it_in_one_piece():
    tree, length = random_tree(2, 6), torch.tensor([4, 2])
    query, key, value = inputs(4, 2, 8, 8, 20, tree, length)
    mask = bit_mask(tree, length)

    def twice(query):
        return torch.ops.redrafter.tree_attention(query, key, value, mask, 0.3, None, None, None) * 2

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert compiled(query).equal(reference(query, key, value, mask, scaling=0.3) * 2)
