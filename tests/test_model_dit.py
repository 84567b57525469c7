"""model_dit.py against closed forms, against brute force and against itself."""

import itertools
import math
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model_dit
from model_dit import (MLP, SIZES, Attention, Before, Block, DiT, KVCache, RMSNorm, attend, causal_mask,
                       grid_positions, patchify, rms, rotate, rotation, sincos, unpatchify)

CONFIGS = {  # odd sides and patches that differ by axis among them
    "2D": (dict(), (2, 3, 8, 12)),
    "2D odd": (dict(channels=(2, 5), patch=(2, 3)), (3, 2, 7, 5)),
    "3D": (dict(dims=3, channels=(2, 1)), (2, 2, 4, 6, 8)),
    "3D odd": (dict(dims=3, patch=(1, 2, 4)), (2, 3, 3, 5, 7)),
    "paper": (dict(qk_norm=False, rope=False), (2, 3, 8, 8)),
    "labels and context": (dict(classes=4, context_dim=6), (4, 3, 6, 8)),
}
F6 = [(32, 160, 8, 8), (128, 160, 4, 4), (512, 160, 2, 2), (4, 40, 64, 64), (8, 7, 5, 9)]  # latent volumes


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(module, std=0.2):
    """Random numbers in every parameter: behind zeros and ones half of a network would hide."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


def build(random=True, **kwargs):
    torch.manual_seed(0)
    model = DiT(**(dict(channels=3, dim=24, depth=2, heads=2, time_dim=16) | kwargs))
    return shake(model) if random else model


def inputs(model, shape):
    g = torch.Generator().manual_seed(1)
    call = dict(x=torch.randn(shape, generator=g), t=torch.rand(shape[0], generator=g))
    if model.label is not None:
        call["label"] = torch.arange(shape[0]) % model.label.num_embeddings
    if model.context_dim:
        call["context"] = torch.randn(shape[0], 5, model.context_dim, generator=g)
        call["mask"] = torch.arange(5)[None] < torch.tensor([5, 1, 3, 4])[: shape[0], None]
    return call


# ------------------------------------------------------------------------------------------------------------
# Norm and positions


def test_rms_is_its_formula():
    x = normal(2, 3, 5) * torch.tensor([1e-3, 1, 1e3])[:, None].double()  # the smallest meets the epsilon
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms(x), expected, rtol=1e-12, atol=0)
    norm = RMSNorm(5)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=0)
    nn.init.normal_(norm.gain)
    torch.testing.assert_close(norm(x), expected * norm.gain.double(), rtol=1e-12, atol=0)


def test_grid_positions_are_row_major():
    for shape in [(5,), (2, 3), (3, 1, 4)]:
        expected = list(itertools.product(*map(range, shape)))
        assert grid_positions(shape).tolist() == [list(place) for place in expected]


@pytest.mark.parametrize("axes, dim", [(1, 8), (2, 24), (2, 10), (3, 20), (3, 5)])
def test_sincos_number_by_number(axes, dim):
    """Share m of an axis: sin and cos of position / 10000^(m / share); what does not divide is zero."""
    positions = grid_positions((5, 3, 4)[:axes])
    share = dim // 2 // axes
    expected = torch.zeros(len(positions), dim)
    for n, place in enumerate(positions.tolist()):
        for axis, m in itertools.product(range(axes), range(share)):
            angle = place[axis] / 10_000 ** (m / share)
            expected[n, axis * share + m] = math.sin(angle)
            expected[n, (axes + axis) * share + m] = math.cos(angle)
    table = sincos(positions, dim)
    assert table.shape == expected.shape and torch.equal(sincos(positions, dim), table)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
    if share:
        assert torch.pdist(table).min() > 0.1  # no two places look the same


@pytest.mark.parametrize("axes, head_dim", [(1, 8), (2, 16), (2, 14), (3, 20)])
def test_rope_is_a_complex_rotation(axes, head_dim):
    """a + i b times exp(i position theta), every axis turning its own pairs; left-over pairs stand still."""
    positions = grid_positions((4, 3, 5)[:axes])
    pairs = head_dim // 2
    share = pairs // axes
    theta = 10_000.0 ** (-torch.arange(share, dtype=torch.float64) / share)
    angle = torch.zeros(len(positions), pairs, dtype=torch.float64)
    for axis in range(axes):
        angle[:, axis * share : (axis + 1) * share] = positions[:, axis : axis + 1] * theta
    x = normal(2, 3, len(positions), head_dim)
    turned = torch.complex(x[..., :pairs], x[..., pairs:]) * torch.polar(torch.ones_like(angle), angle)
    y = rotate(x, *rotation(positions.double(), head_dim))
    torch.testing.assert_close(y, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    assert torch.equal(y[..., 0, :], x[..., 0, :])  # the origin does not turn
    assert (y - x)[..., 1:, :].abs().amax(-1).min() > 0.01  # every other place does
    low = rotate(x, *rotation(positions, head_dim))  # integer positions: tables in float32
    torch.testing.assert_close(low, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_rope_scores_depend_on_distance_alone(shape):
    positions = grid_positions(shape)
    q, k = normal(1, 2, len(positions), 24, seed=1), normal(1, 2, len(positions), 24, seed=2)

    def scores(positions):
        return rotate(q, *rotation(positions, 24)) @ rotate(k, *rotation(positions, 24)).transpose(-2, -1)

    here = scores(positions.double())
    torch.testing.assert_close(scores(positions.double() + 1000), here, rtol=0, atol=1e-9)
    torch.testing.assert_close(scores(positions + 1000), here, rtol=0, atol=2e-3)  # float32 tables
    assert (scores(positions.double() * 2) - here).abs().max() > 0.1


def test_rope_base_and_refusals():
    slow = rotation(torch.arange(3), 4, base=100.0)[0]
    torch.testing.assert_close(slow[2, :2], torch.tensor([2.0, 0.2]).cos())
    for head_dim, positions in [(7, torch.arange(3)), (4, grid_positions((2, 2, 2)))]:
        with pytest.raises(ValueError, match=f"head_dim {head_dim} must be even and hold a pair for each of"):
            rotation(positions, head_dim)


# ------------------------------------------------------------------------------------------------------------
# Masks and attention


@pytest.mark.parametrize("queries, keys", [(1, 1), (5, 5), (1, 6), (3, 8)])
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_causal_mask_by_brute_force(queries, keys, window):
    expected = [[j <= i and (not window or i - j < window) for j in range(keys)]
                for i in range(keys - queries, keys)]
    assert causal_mask(queries, keys, window).tolist() == expected


def written_out(q, k, v, mask=None, cap=None):
    """Attention query by query, grouped heads by index."""
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        group = h * k.shape[1] // q.shape[1]
        scores = (k[b, group] * q[b, h, i]).sum(-1) / math.sqrt(q.shape[-1])
        scores = cap * torch.tanh(scores / cap) if cap else scores
        seen = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[i]
        weight = scores.exp() * seen
        y[b, h, i] = (weight[:, None] * v[b, group]).sum(0) / weight.sum()
    return y


@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [6, 2])
def test_attend_is_its_formula(queries, kv_heads, cap):
    q = normal(2, 4, queries, 8, seed=1) * 2
    k, v = normal(2, kv_heads, 6, 8, seed=2), normal(2, kv_heads, 6, 8, seed=3)
    mask = causal_mask(queries, 6, window=3)
    close = dict(rtol=0, atol=1e-12)
    torch.testing.assert_close(attend(q, k, v, cap=cap), written_out(q, k, v, cap=cap), **close)
    masked = attend(q, k, v, mask, cap=cap)
    torch.testing.assert_close(masked, written_out(q, k, v, mask, cap), **close)
    added = torch.zeros(queries, 6, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, added, cap=cap), masked, **close)
    bias = normal(4, queries, 6, seed=4)
    biased = attend(q, k, v, bias, cap=cap)
    assert (biased - attend(q, k, v, cap=cap)).abs().max() > 0.1
    every = [y.repeat_interleave(4 // kv_heads, 1) for y in (k, v)]
    torch.testing.assert_close(attend(q, *every, bias, cap=cap), biased, **close)
    causal = attend(q, k, v, causal=True, cap=cap)  # fewer queries than keys stand at the end of them
    torch.testing.assert_close(causal, attend(q, k, v, causal_mask(queries, 6), cap=cap), **close)
    with pytest.raises(ValueError, match="not both"):
        attend(q, k, v, mask, causal=True, cap=cap)


def test_a_high_cap_is_no_cap():
    q, k, v = (normal(2, 2, 5, 4, seed=i) for i in range(3))
    torch.testing.assert_close(attend(q, k, v, cap=1e4), attend(q, k, v), rtol=0, atol=1e-6)


def test_grouped_queries_are_heads_that_share():
    """kv_heads = heads is plain attention; fewer are plain attention whose key and value rows repeat."""
    torch.manual_seed(0)
    grouped, plain = Attention(24, 4, kv_heads=2).double(), Attention(24, 4).double()
    state = grouped.state_dict()
    for name in ("k.weight", "v.weight"):
        state[name] = state[name].view(2, 6, 24).repeat_interleave(2, 0).reshape(24, 24)
    plain.load_state_dict(state)
    x, turn = normal(2, 7, 24), rotation(torch.arange(7), 6)
    torch.testing.assert_close(grouped(x, turn), plain(x, turn), rtol=0, atol=1e-12)
    same = Attention(24, 4, kv_heads=4).double()
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same(x, turn), plain(x, turn))
    for heads, kv_heads in [(5, None), (4, 3)]:
        with pytest.raises(ValueError, match=f"dim 24 must divide by heads {heads}, and heads by kv_heads"):
            Attention(24, heads, kv_heads)


def test_attention_head_by_head():
    """The sum over heads of softmax(q k^T / sqrt(d)) v W_out, each with its own rows of the matrices."""
    layer, x = shake(Attention(24, 4, kv_heads=2)).double(), normal(2, 7, 24)
    turn = rotation(torch.arange(7), 6)
    expected = torch.zeros_like(x)
    for head in range(4):
        own, group = slice(6 * head, 6 * head + 6), slice(head // 2 * 6, head // 2 * 6 + 6)
        q, k = (rotate(rms(x @ w.T), *turn) for w in (layer.q.weight[own], layer.k.weight[group]))
        weight = (q @ k.transpose(1, 2) / math.sqrt(6)).softmax(-1)
        expected += weight @ (x @ layer.v.weight[group].T) @ layer.out.weight[:, own].T
    torch.testing.assert_close(layer(x, turn), expected, rtol=0, atol=1e-12)


def test_qk_norm_bounds_the_scores():
    x, turn = normal(2, 9, 16) * 50, rotation(torch.arange(9), 8)

    def largest(layer):
        q, k, _ = shake(layer.double(), std=30).qkv(x, turn)
        return (q @ k.transpose(-2, -1)).abs().max().item() / math.sqrt(8)

    assert 0.5 * math.sqrt(8) < largest(Attention(16, 2)) <= math.sqrt(8) * (1 + 1e-6)
    assert largest(Attention(16, 2, qk_norm=False)) > 1e6


def test_gain_comes_after_the_norm_and_before_rope():
    layer, x = shake(Attention(16, 2, gain=1.8)).double(), normal(2, 5, 16)
    assert (Attention(16, 2, gain=1.8).k_norm.gain == 1.8).all()
    turn = rotation(torch.arange(5), 8)
    for got, weight, norm in zip(layer.qkv(x, turn), (layer.q, layer.k), (layer.q_norm, layer.k_norm)):
        heads = (x @ weight.weight.T).view(2, 5, 2, 8).transpose(1, 2)
        expected = rotate(rms(heads) * norm.gain, *turn)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert {name for name, _ in layer.named_parameters()} == {
        "q.weight", "k.weight", "v.weight", "out.weight", "q_norm.gain", "k_norm.gain"}


def test_cap_reaches_attend():
    x = normal(2, 5, 16)
    free, capped = (shake(Attention(16, 2, cap=cap)).double() for cap in (0.0, 0.5))
    q, k, v = free.qkv(x)
    torch.testing.assert_close(capped(x), free.merge(attend(q, k, v, cap=0.5)), rtol=0, atol=1e-12)
    assert (capped(x) - free(x)).abs().max() > 1e-3


def test_keys_may_be_turned_when_they_are_read():
    layer, x, turn = Attention(16, 2).double(), normal(2, 5, 16), rotation(torch.arange(5), 8)
    for late, now in zip(layer.qkv(x)[:2], layer.qkv(x, turn)[:2]):
        assert torch.equal(rotate(late, *turn), now) and not torch.equal(late, now)


@pytest.mark.parametrize("window", [0, 3])
def test_the_future_changes_the_past_by_exactly_zero(window):
    torch.manual_seed(0)
    layers, turn = [Attention(16, 4, kv_heads=2) for _ in range(3)], rotation(torch.arange(10), 4)
    mask = causal_mask(10, 10, window) if window else None

    def run(x):
        for layer in layers:
            x = x + 2 * layer(x, turn, mask, causal=not window)
        return x

    x = normal(2, 10, 16, dtype=torch.float32)
    other = x.clone()
    other[:, 6] += 9
    change = (run(other) - run(x)).abs().amax((0, 2))
    assert (change[:6] == 0).all() and (change[6:] > 1e-4).all()
    if window:  # three layers of window 3 see six places back and no further
        other = x.clone()
        other[:, 0] += 9
        change = (run(other) - run(x)).abs().amax((0, 2))
        assert (change[7:] == 0).all() and (change[:7] > 1e-6).all()


def test_context_is_heard_masked_and_never_turned():
    layer = shake(Attention(16, 2, context_dim=6))
    x, context = normal(2, 4, 16, dtype=torch.float32), normal(2, 5, 6, dtype=torch.float32)
    mask = (torch.arange(5)[None] < torch.tensor([5, 2])[:, None])[:, None, None]
    y = layer(x, context=context, mask=mask)
    other = context.clone()
    other[1, 2:] += 9  # masked tokens may say what they like
    assert torch.equal(layer(x, context=other, mask=mask), y)
    other[1, 1] += 9  # this one is heard
    assert (layer(x, context=other, mask=mask)[1] - y[1]).abs().max() > 1e-3
    one = context[:, :1]  # tokens that all say the same are one token
    torch.testing.assert_close(layer(x, context=one.expand(2, 5, 6)), layer(x, context=one))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x, context=context[:, order]), layer(x, context=context))


# ------------------------------------------------------------------------------------------------------------
# KV cache


@pytest.mark.parametrize("capacity", [1, 2, 5, 8])
def test_cache_is_the_end_of_the_concatenation(capacity):
    cache, rng, turns = KVCache(capacity), random.Random(capacity), 0
    k, v = normal(2, 3, 20 * capacity, 4, seed=1), normal(2, 3, 20 * capacity, 4, seed=2)
    while cache.seen < k.shape[2]:
        n = min(rng.randint(1, capacity), k.shape[2] - cache.seen)
        start, before = cache.seen, cache.end
        got = cache.append(k[:, :, start : start + n], v[:, :, start : start + n])
        assert cache.seen == start + n
        turns += cache.end < before + n
        first = max(0, cache.seen - capacity)
        assert torch.equal(got[0], k[:, :, first : cache.seen])
        assert torch.equal(got[1], v[:, :, first : cache.seen])
    assert turns > 8 and cache.k.shape[2] == 2 * capacity
    with pytest.raises(ValueError, match=f"{capacity + 1} new positions do not fit a cache of {capacity}"):
        cache.append(k[:, :, : capacity + 1], v[:, :, : capacity + 1])


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("chunk", [1, 3, 30])
def test_cached_layers_equal_the_full_forward(window, chunk):
    """Two layers, so that what is kept is the result of attention; with a window the cache wraps often."""
    torch.manual_seed(0)
    N = 30
    layers, x = [Attention(16, 4, kv_heads=2) for _ in range(2)], normal(2, N, 16, dtype=torch.float32)
    turn = rotation(torch.arange(N), 4)
    y = x
    for layer in layers:
        y = y + 2 * layer(y, turn, causal_mask(N, N, window))
    caches = [KVCache(window + chunk - 1 if window else N) for _ in layers]
    parts = []
    for start in range(0, N, chunk):
        h, here = x[:, start : start + chunk], rotation(torch.arange(start, start + chunk), 4)
        keys = min(start + chunk, caches[0].capacity)
        for layer, cache in zip(layers, caches):
            mask = dict(mask=causal_mask(chunk, keys, window)) if window else dict(causal=True)
            h = h + 2 * layer(h, here, cache=cache, **mask)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts, 1), y, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# MLP and block


@pytest.mark.parametrize("bias", [False, True])
def test_mlps_are_their_formulas(bias):
    x = normal(2, 3, 5)
    formulas = {
        "gelu": lambda u, g: u * (1 + torch.erf(u / math.sqrt(2))) / 2,
        "relu2": lambda u, g: u.clamp(min=0) ** 2,
        "swiglu": lambda u, g: g * g.sigmoid() * u,
    }
    for name, formula in formulas.items():
        layer = shake(MLP(5, 7, name, bias).double())
        u, g = (y and x @ y.weight.T + (y.bias if bias else 0) for y in (layer.up, layer.gate))
        expected = formula(u, g) @ layer.down.weight.T + (layer.down.bias if bias else 0)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        assert len(list(layer.parameters())) == (2 + (name == "swiglu")) * (1 + bias)
        assert torch.autograd.gradcheck(layer, x.clone().requires_grad_())
    x.requires_grad_()  # a second derivative of relu2 is refused, not wrong
    first, = torch.autograd.grad(model_dit.ReLU2.apply(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(ValueError, match="activation 'tanh': one of gelu, relu2, swiglu"):
        MLP(5, 7, "tanh")


def test_block_is_its_formula():
    """adaLN-Zero by hand: shift, scale, gate for attention, then for the MLP; the context in between."""
    block = shake(Block(16, 2, mlp=3, context_dim=6)).double()
    x, emb, context = normal(2, 5, 16), normal(2, 1, 16, seed=1), normal(2, 4, 6, seed=2)
    turn = rotation(torch.arange(5), 8)
    b1, s1, g1, b2, s2, g2 = (emb @ block.modulation.weight.T + block.modulation.bias).split(16, -1)

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    y = x + g1 * block.attention((1 + s1) * norm(x) + b1, turn)
    y = y + block.cross(norm(y), context=context)
    y = y + g2 * block.mlp((1 + s2) * norm(y) + b2)
    torch.testing.assert_close(block(x, emb, turn, context), y, rtol=0, atol=1e-12)
    assert block.mlp.activation == "gelu" and block.mlp.up.out_features == 48
    each = emb.expand(2, 5, 16).contiguous()  # a condition for every token, as frames at different t have
    torch.testing.assert_close(block(x, each, turn, context), y, rtol=0, atol=1e-12)
    each[:, 0] += 1
    assert (block(x, each, turn, context)[:, 1:] - y[:, 1:]).abs().max() > 1e-3  # through attention alone


def test_dropout_is_on_in_training_only():
    model = build(dropout=0.5, context_dim=6)
    call = inputs(model, (2, 3, 8, 8))
    assert not torch.equal(model(**call), model(**call))
    y = model.eval()(**call)
    assert torch.equal(model(**call), y)
    plain = build(context_dim=6)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(**call), y)


# ------------------------------------------------------------------------------------------------------------
# Patches


@pytest.mark.parametrize("grid, patch", [((7, 5), (2, 3)), ((4, 6), (2, 2)), ((3, 5, 2), (2, 1, 4))])
def test_patches_are_cut_padded_and_put_back(grid, patch):
    x = normal(2, 3, *grid)
    counts = [math.ceil(side / p) for side, p in zip(grid, patch)]
    padded = torch.zeros(2, 3, *(n * p for n, p in zip(counts, patch)), dtype=x.dtype)
    padded[(..., *map(slice, grid))] = x
    tokens = patchify(x, patch)
    assert tokens.shape == (2, math.prod(counts), 3 * math.prod(patch))
    for n, place in enumerate(grid_positions(counts).tolist()):  # the order the positions are in
        corner = tuple(slice(i * p, i * p + p) for i, p in zip(place, patch))
        assert torch.equal(tokens[:, n], padded[(..., *corner)].flatten(1))
    assert torch.equal(unpatchify(tokens, patch, grid), x)


@pytest.mark.parametrize("dims, grid, more", [(2, (7, 5), (8, 6)), (3, (3, 4, 5), (4, 4, 6))])
def test_padding_is_zeros_at_the_end_and_is_cut_off(dims, grid, more):
    """An odd grid gives what the even one gives whose last places are zero: same positions, same numbers."""
    model = build(dims=dims)
    call = inputs(model, (2, 3, *grid))
    x = torch.zeros(2, 3, *more)
    x[(..., *map(slice, grid))] = call["x"]
    larger = model(**call | dict(x=x))
    assert torch.equal(model(**call), larger[(..., *map(slice, grid))])
    assert larger[..., -1].abs().max() > 1e-3


def test_a_side_below_the_patch_acts_as_a_smaller_patch():
    """patch 4 on a side of 2 is patch 2 there with the rest of the weights left out: min(patch, side)."""
    wide, narrow = build(dims=3, patch=(2, 4, 4)), build(dims=3, patch=(2, 2, 3))
    state = wide.state_dict()
    cut = (slice(None), slice(None), slice(2), slice(3))  # channels, then the patch
    state["embed.weight"] = state["embed.weight"].view(24, 3, 2, 4, 4)[:, *cut].reshape(24, -1)
    state["head.weight"] = state["head.weight"].view(3, 2, 4, 4, 24)[cut].reshape(-1, 24)
    state["head.bias"] = state["head.bias"].view(3, 2, 4, 4)[cut].flatten()
    narrow.load_state_dict(state)
    call = inputs(wide, (2, 3, 6, 2, 3))
    torch.testing.assert_close(wide(**call), narrow(**call), rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_type_and_dependence_on_t(name):
    kwargs, shape = CONFIGS[name]
    model = build(**kwargs)
    call = inputs(model, shape)
    y = model(**call)
    c_out = kwargs.get("channels", (3, 3))[1]
    assert y.shape == (shape[0], c_out, *shape[2:]) and y.dtype == torch.float32 and y.isfinite().all()
    assert (model(**call | dict(t=1 - call["t"])) - y).abs().max() > 1e-3


@pytest.mark.parametrize("shape", F6, ids=str)
def test_latent_volumes_of_any_shape_train(shape):
    model = build(channels=shape[0], dims=3, patch=4, dim=16, depth=1)
    call = inputs(model, (1, *shape))
    y = model(**call)
    assert y.shape == call["x"].shape and y.isfinite().all() and y.std() > 1e-3
    y.square().mean().backward()
    for parameter, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter


def test_one_network_takes_every_grid():
    """Positions come from the grid: what a small grid learnt holds on a larger one, down to one pixel."""
    flat, solid = build(patch=(2, 3)), build(dims=3)
    for grid in [(1, 1), (1, 9), (2, 3), (3, 2), (13, 4)]:
        assert flat(**inputs(flat, (1, 3, *grid))).shape == (1, 3, *grid)
    for grid in [(1, 1, 1), (1, 5, 2), (3, 1, 7)]:
        assert solid(**inputs(solid, (1, 3, *grid))).shape == (1, 3, *grid)


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_the_order_of_tokens_matters(monkeypatch, rope, table):
    """Shuffled patches: with either kind of position the network notices, with none it cannot."""
    model = build(rope=rope)
    if not table:
        monkeypatch.setattr(model_dit, "sincos", lambda positions, dim: torch.zeros(len(positions), dim))
    call = inputs(model, (2, 3, 8, 8))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = unpatchify(patchify(call["x"], (2, 2))[:, order], (2, 2), (8, 8))
    y, z = (patchify(model(**call | dict(x=x)), (2, 2)) for x in (call["x"], shuffled))
    difference = (z - y[:, order]).abs().max() / y.abs().max()
    assert difference > 0.01 if rope or table else difference < 1e-5


@pytest.mark.parametrize("context_dim", [0, 6])
def test_zero_start_and_every_parameter_learns(context_dim):
    """The first output is exactly 0 and every block the identity. The zeros of head, then of gates, hide what
    is behind them for a step each, so the third backward is read."""
    model = build(random=False, classes=4, context_dim=context_dim)
    call = inputs(model, (4, 3, 8, 8))
    assert torch.equal(model(**call), torch.zeros(4, 3, 8, 8))
    h, emb = normal(4, 16, 24, dtype=torch.float32), normal(4, 1, 24, dtype=torch.float32)
    for block in model.blocks:
        assert torch.equal(block(h, emb, context=call.get("context")), h)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = normal(4, 3, 8, 8, dtype=torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        (model(**call) - target).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert (model.label.weight.grad.abs().amax(dim=1) > 0).all()


def test_one_batch_is_learnt_by_heart():
    """Noise of four labels and times from nothing but them: needs positions, labels, times and channels."""
    model = build(random=False, classes=4, dim=32)
    x = normal(8, 3, 6, 6, dtype=torch.float32)
    t, label = torch.tensor([0.2, 0.9]).repeat(4), torch.arange(4).repeat_interleave(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = (model(torch.zeros_like(x), t, label) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * x.square().mean()


def test_labels_context_and_mask_are_heard():
    model = build(classes=4, context_dim=6)
    call = inputs(model, (4, 3, 8, 8))
    y = model(**call)
    assert model.null == 3 and model.label.num_embeddings == 4
    assert (model(**call | dict(label=call["label"].flip(0))) - y).abs().amax((1, 2, 3)).min() > 1e-3
    other = call["context"].clone()
    other[~call["mask"]] += 9
    assert torch.equal(model(**call | dict(context=other)), y)
    assert (model(**call | dict(mask=None)) - y)[1].abs().max() > 1e-3
    other[:, 0] += 9  # the first token is nobody's padding
    assert (model(**call | dict(context=other)) - y).abs().amax((1, 2, 3)).min() > 1e-3


def test_wrong_input_is_refused():
    model, plain = build(classes=4, context_dim=6), build()
    call = inputs(model, (2, 3, 8, 8))
    model(**call)
    with pytest.raises(ValueError, match="give label"):
        model(**call | dict(label=None))
    with pytest.raises(ValueError, match="give context"):
        model(**call | dict(context=None))
    with pytest.raises(ValueError, match="built without labels"):
        plain(call["x"], call["t"], call["label"])
    with pytest.raises(ValueError, match="context_dim=0"):
        plain(call["x"], call["t"], context=call["context"])
    with pytest.raises(ValueError, match=r"x \(2, 3, 8, 8, 8\) is not \(B, C, and 2 sides\)"):
        plain(torch.zeros(2, 3, 8, 8, 8), call["t"])
    with pytest.raises(ValueError, match=r"patch \(2, 2\) has 2 entries for 3 axes"):
        build(dims=3, patch=(2, 2))
    with pytest.raises(ValueError, match="head_dim 4 must be even and hold a pair for each of 3 axes"):
        build(dims=3, heads=6)
    build(dims=3, heads=6, rope=False)
    with pytest.raises(ValueError, match="dim 24 must divide by heads 5"):
        build(heads=5, rope=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_size_and_bfloat16_change_little(name):
    kwargs, shape = CONFIGS[name]
    model = build(**kwargs).eval()
    call = inputs(model, shape)
    y = model(**call)
    scale = y.abs().max()
    for i in range(shape[0]):
        alone = model(**{key: value[i : i + 1] for key, value in call.items()})
        assert (alone - y[i : i + 1]).abs().max() <= 1e-5 * scale
    other = call["x"].clone()
    other[1:] += 9
    assert torch.equal(model(**call | dict(x=other))[0], y[0])  # a picture does not know its neighbours
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**call)
        low.square().mean().backward()
    assert low.dtype == torch.float32 and 0 < (low - y).norm() / y.norm() < 0.05
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_names_of_the_parameters_are_stable():
    """Checkpoints are read by these names."""
    model = build(classes=4, context_dim=6, depth=1)
    attention = ["q.weight", "k.weight", "v.weight", "out.weight"]
    affine = [f"{layer}.{kind}" for kind in ("weight", "bias")
              for layer in ("time.0", "time.2", "embed", "modulation", "head",
                            "blocks.0.modulation", "blocks.0.mlp.up", "blocks.0.mlp.down")]
    names = {"label.weight", *affine, *(f"blocks.0.{part}.{weight}" for part in ("attention", "cross")
                                        for weight in attention)}
    assert set(model.state_dict()) == names  # and no tables: those would tie a checkpoint to one grid
    other, call = build(random=False, classes=4, context_dim=6, depth=1), inputs(model, (4, 3, 8, 8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**call), model(**call))


@pytest.mark.parametrize("name, millions", [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_have_the_parameters_of_the_paper(name, millions):
    """Peebles & Xie 2023, table 4, patch 2 on latents of 4 channels, noise and variance out, 1000 classes and
    the null label. Attention has no biases here, a thousandth of the sum."""
    with torch.device("meta"):
        model = DiT(channels=(4, 8), patch=2, classes=1001, **SIZES[name])
    total = sum(p.numel() for p in model.parameters())
    assert abs(total / 1e6 - millions) < max(0.6, 0.002 * millions)
    dim, depth = SIZES[name]["dim"], SIZES[name]["depth"]
    assert SIZES[name]["heads"] == (16 if name == "XL" else dim // 64)
    assert total == (depth * (18 * dim**2 + 11 * dim)  # 6 modulation, 4 attention, 8 MLP; their 6 + 5 biases
                     + (256 + 1 + dim + 1) * dim + 1001 * dim  # time, labels
                     + (16 + 1) * dim + 2 * dim**2 + 2 * dim + (dim + 1) * 32)  # embedding, final layer


# ---------------------------------------------------------------- space and time
@pytest.mark.parametrize("grid", [(3, 4), None])
def test_before_knows_its_frames_and_the_eight_neighbours(grid):
    layer, x = shake(Before(6, grid, 2)).double(), normal(2, 5, 12, 6)
    alone = torch.zeros(2, dtype=torch.bool)
    base = layer(x, alone)
    assert torch.equal(base, layer(x)) and not base[:, 0].any() and base[:, 1].any()
    other = x.clone()
    other[:, 1, 5] += 1  # frame 1, row 1, column 1
    changed = (layer(other) - base).abs().amax((0, 3)) > 0  # (T, N)
    near = {0, 1, 2, 4, 5, 6, 8, 9, 10} if grid else {5}
    for t in range(5):
        assert set(changed[t].nonzero().flatten().tolist()) == (near if t in (2, 3) else set()), t
    assert not layer(x, ~alone).any()
    assert torch.equal(layer(x, torch.tensor([True, False]))[1], base[1])
    assert torch.equal(layer(x[:, :1]), base[:, :1])


@pytest.mark.parametrize("grid", [(3, 4), None])
def test_before_remembers_as_it_reads(grid):
    layer, x, memory = shake(Before(6, grid, 2)).double(), normal(2, 5, 12, 6), []
    whole = layer(x)
    for t in range(5):
        trial = layer(x[:, t:t + 1], memory=memory, keep=False)  # leaves no trace
        kept = layer(x[:, t:t + 1], memory=memory)
        assert torch.equal(trial, kept) and len(memory) == min(2, t + 1)
        torch.testing.assert_close(kept[:, 0], whole[:, t], rtol=0, atol=1e-12)
