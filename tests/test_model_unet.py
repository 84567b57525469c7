"""model_unet.py against closed forms and against itself."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import model_unet
from model_unet import Attention, UNet, depth_to_space, modulated_group_norm, space_to_depth, upsample_conv

CONFIGS = {
    "2D": (dict(attention=(False, True)), (2, 3, 8, 12)),
    "3D": (dict(dims=3, channels=(2, 1), attention=(False, True)), (2, 2, 4, 8, 4)),
    "patch": (dict(patch=2, blocks=2, attention=(False, True)), (2, 3, 8, 8)),
    "no FiLM": (dict(film=False, attention=(True, True)), (2, 3, 8, 8)),
    "labels and context": (dict(classes=4, context_dim=6, attention=(True, False)), (4, 3, 8, 8)),
}


def build(random=True, **kwargs):
    """A small U-Net; random=True undoes the zero start, behind which half of the network would hide."""
    torch.manual_seed(0)
    model = UNet(**(dict(width=8, mults=(1, 2), groups=4, head_dim=4, time_dim=16, dropout=0.0) | kwargs))
    if random:
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
    return model


def inputs(model, shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    call = dict(x=torch.randn(shape, generator=g), t=torch.rand(shape[0], generator=g))
    if model.label is not None:
        call["label"] = torch.arange(shape[0]) % model.label.num_embeddings
    if model.context_dim:
        call["context"] = torch.randn(shape[0], 5, model.context_dim, generator=g)
        call["mask"] = torch.arange(5)[None] < torch.tensor([5, 1, 3, 4])[: shape[0], None]
    return call


@pytest.mark.parametrize("name", CONFIGS)
def test_shape_type_and_dependence_on_t(name):
    kwargs, shape = CONFIGS[name]
    model = build(**kwargs)
    call = inputs(model, shape)
    y = model(**call)
    c_out = kwargs.get("channels", (3, 3))[1]
    assert y.shape == (shape[0], c_out, *shape[2:]) and y.dtype == torch.float32 and y.isfinite().all()
    assert (model(**call | dict(t=1 - call["t"])) - y).abs().max() > 1e-3


@pytest.mark.parametrize("film", [True, False])
def test_labels_and_film(film):
    model = build(film=film, classes=4, attention=(False, True))
    call = inputs(model, (4, 3, 8, 8))
    assert (model(**call | dict(label=call["label"].flip(0))) - model(**call)).abs().max() > 1e-3
    blocks = [m for m in model.modules() if isinstance(m, model_unet.ResBlock)]
    assert {b.emb.out_features // b.conv1.out_channels for b in blocks} == {2 if film else 1}


def test_attention_per_level():
    """Attention on the first level only: the others have none, and the middle always has."""
    model = build(attention=(True, False, False), mults=(1, 2, 2), context_dim=6)
    has = [[b.self_attention is not None for b in level["blocks"]] for level in model.down]
    assert has == [[True], [False], [False]]
    cross = [[b.cross_attention is not None for b in level["blocks"]] for level in model.up]  # deepest first
    assert cross == [[False], [False], [True]]
    assert model.middle[0].self_attention is not None and model.middle[1].self_attention is None
    with pytest.raises(ValueError, match="attention has 2 entries, mults 3"):
        build(attention=(True, False), mults=(1, 2, 2))


def test_wrong_input_is_refused():
    model = build(classes=4, context_dim=6, attention=(False, True), patch=2)
    call = inputs(model, (2, 3, 8, 8))
    model(**call)
    for side in (6, 10):  # 4 divides neither; 6 and 10 both pass the stem
        with pytest.raises(ValueError, match=rf"grid \(8, {side}\) does not divide by 4, patch 2"):
            model(**call | dict(x=torch.zeros(2, 3, 8, side)))
    with pytest.raises(ValueError, match="give label"):
        model(**call | dict(label=None))
    with pytest.raises(ValueError, match="give context"):
        model(**call | dict(context=None))
    plain = build(attention=(False, True))
    with pytest.raises(ValueError, match="built without labels"):
        plain(call["x"], call["t"], call["label"])
    with pytest.raises(ValueError, match="context_dim=0"):
        plain(call["x"], call["t"], context=call["context"])
    with pytest.raises(ValueError, match="norm groups"):
        build(width=6, attention=(False, True))


@pytest.mark.parametrize("grid", [(5, 6), (3, 4, 5)])
def test_modulated_group_norm_is_group_norm_then_scale_and_shift(grid):
    torch.manual_seed(0)
    x = torch.randn(3, 8, *grid, dtype=torch.float64) * 3 + 1
    scale, shift = torch.randn(2, 3, 8, dtype=torch.float64)
    ones = (3, 8) + (1,) * len(grid)
    expected = F.group_norm(x, 4) * (1 + scale.view(ones)) + shift.view(ones)
    torch.testing.assert_close(modulated_group_norm(x, 4, scale, shift), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv, grid", [(nn.Conv2d, (4, 3)), (nn.Conv3d, (2, 4, 3))])
def test_upsample_conv_is_nearest_upsampling_then_convolution(conv, grid):
    """Values and gradients, at the borders too, with a kernel that is symmetric in nothing."""
    torch.manual_seed(0)
    conv = conv(3, 5, 3, padding=1).double()
    x = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    slow, fast = conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), upsample_conv(x, conv)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    leaves = [x, conv.weight, conv.bias]
    expected, got = (torch.autograd.grad(y.square().sum(), leaves) for y in (slow, fast))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_is_the_library_kernel(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 4, dtype=torch.float64) for n in (7, 5, 5))
    mask = (torch.arange(5)[None] < torch.tensor([5, 1, 3])[:, None])[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(model_unet.attend(q, k, v, mask), expected, rtol=0, atol=1e-12)


def test_cross_attention_is_residual_and_masked():
    torch.manual_seed(0)
    layer = Attention(8, groups=4, head_dim=4, context_dim=6)
    x, context = torch.randn(2, 8, 4, 4), torch.randn(2, 5, 6)
    mask = torch.arange(5)[None] < torch.tensor([5, 2])[:, None]
    y = layer(x, context, mask)
    other = context.clone()
    other[1, 2:] += 9  # masked tokens may say what they like
    torch.testing.assert_close(layer(x, other, mask), y, rtol=0, atol=0)
    other[1, 1] += 9  # this one is heard
    assert (layer(x, other, mask)[1] - y[1]).abs().max() > 1e-3
    one = context[:, :1]  # tokens that all say the same are one token
    torch.testing.assert_close(layer(x, one.expand(2, 5, 6), mask), layer(x, one), rtol=0, atol=1e-6)
    nn.init.zeros_(layer.out.weight), nn.init.zeros_(layer.out.bias)
    assert torch.equal(layer(x, context, mask), x)


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 3, 4, 8, 6)])
def test_space_to_depth_moves_patches_into_channels_and_back(shape):
    x = torch.randn(shape)
    small = space_to_depth(x, 2)
    assert small.shape == (2, 3 * 2 ** len(shape[2:]), *[n // 2 for n in shape[2:]])
    corner = (slice(0, 1), slice(None)) + (slice(0, 2),) * len(shape[2:])
    position = (0, slice(None)) + (0,) * len(shape[2:])
    assert torch.equal(small[position], x[corner].flatten())  # one patch is one position
    assert torch.equal(depth_to_space(small, 2), x)


@pytest.mark.parametrize("film", [True, False])
def test_zero_start_and_every_parameter_learns(film):
    """The first output is exactly 0. The zeros of head, blocks and FiLM hide what is behind them for a few
    steps, so the fourth backward is read: every parameter has a gradient, and so has every label's row."""
    model = build(random=False, film=film, classes=4, context_dim=6, attention=(False, True))
    call = inputs(model, (4, 3, 8, 8))
    assert torch.equal(model(**call), torch.zeros(4, 3, 8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        (model(**call) - torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert (model.label.weight.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_channels_last_bfloat16_and_batch_size_change_little(name):
    kwargs, shape = CONFIGS[name]
    model = build(**kwargs).eval()
    call = inputs(model, shape)
    y = model(**call)
    scale = y.abs().max()
    first = model(**{k: v[:1] for k, v in call.items()})
    assert (first - y[:1]).abs().max() <= 1e-5 * scale  # a picture does not know its neighbours
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**call)
    assert low.dtype == torch.float32 and 0 < (low - y).norm() / y.norm() < 0.05
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    z = model.to(memory_format=last)(**call | dict(x=call["x"].to(memory_format=last)))
    assert (z - y).abs().max() <= 1e-5 * scale


def test_state_dict_round_trip():
    kwargs, shape = CONFIGS["labels and context"]
    model, other = build(**kwargs), build(random=False, **kwargs)
    call = inputs(model, shape)
    y = model(**call)
    assert not torch.equal(other(**call), y)
    assert not other.load_state_dict(model.state_dict(), strict=True).missing_keys
    assert torch.equal(other(**call), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_mean_rate_seed_and_eval(dtype):
    layer, x = model_unet.Dropout(0.1), torch.ones(999, 1001, dtype=dtype)
    torch.manual_seed(3)
    y = layer(x)
    assert abs((y == 0).float().mean() - 0.1) < 2e-3  # six standard deviations
    assert sorted(y.unique().tolist()) == pytest.approx([0, (x[0, 0] / 0.9).item()], rel=1e-4)
    neighbours = (y[:, 1:] == 0) & (y[:, :-1] == 0)  # four come from one integer and are independent
    assert abs(neighbours.float().mean() - 0.01) < 1e-3
    torch.manual_seed(3)
    assert torch.equal(layer(x), y) and not torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


def test_benchmark_measures_its_own_row(capsys, monkeypatch):
    import unet_step

    small = "--rounds 1 --steps 1 --size 8 --batch 2 --width 32".split()
    monkeypatch.setattr(sys, "argv", ["unet_step.py", "--only", "ours, plain", *small])
    unet_step.main()
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| ours, plain"))
    assert float(row.split("|")[2]) > 0 and " M " in row


def test_checkpointing_changes_no_bit():
    """Less memory, the same output and the same gradients, dropout included."""
    found = []
    for checkpoint in (False, True):
        model = build(attention=(False, True), checkpoint=checkpoint, dropout=0.3).train()
        call = inputs(model, (2, 3, 8, 8))
        torch.manual_seed(1)
        out = model(**call)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_vector_is_added_to_the_time_and_blocks_may_differ():
    model = build(attention=(False, True), blocks=(1, 2)).eval()
    call = inputs(model, (2, 3, 8, 8))
    plain, zero = model(**call), model(**call, vector=torch.zeros(2, 16))
    assert torch.equal(plain, zero)
    other = model(**call, vector=torch.tensor([[0.0] * 16, [1.0] * 16]))
    assert torch.equal(other[0], plain[0]) and (other[1] - plain[1]).abs().max() > 1e-3
    assert [len(level["blocks"]) for level in model.down] == [1, 2]
    with pytest.raises(ValueError, match="blocks has 3 entries"):
        build(attention=(False, True), blocks=(1, 2, 3))
