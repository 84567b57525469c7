"""metrics.py against closed forms, slow loops and ladders of growing damage."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import metrics as M

LEVELS = 0., .2, .5, 1.


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(*shape, seed=0):
    """Smooth pictures in about [0, 1]."""
    x = normal(*shape, seed=seed)
    for _ in range(2):
        x = M._blur(torch.nn.functional.pad(x, [3] * 2 * (x.ndim - 2), mode="circular"), 7)
    return .5 + .15 * x / x.std()


def rising(values):
    assert all(a < b for a, b in zip(values, values[1:])), values


@pytest.fixture(autouse=True)
def global_rng_untouched():
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # tiny matrices: threads only wait for each other
    yield
    torch.set_num_threads(threads)
    assert torch.equal(before, torch.get_rng_state()) and (before_np == np.random.get_state()[1]).all()


# ------------------------------------------------------------------------------------------------------------
# Frechet

def test_frechet_closed_form():
    S1, S2 = torch.diag(torch.tensor([1., 4])), torch.diag(torch.tensor([9., 1]))
    # 1 + (1 + 4) + (9 + 1) - 2 (sqrt 9 + sqrt 4) = 6
    assert M.frechet_gaussian([0., 0], S1, [1., 0], S2) == pytest.approx(6, abs=1e-12)
    # covariances that do not commute, 2x2: tr sqrt(A) = sqrt(tr A + 2 sqrt(det A))
    S1, S2 = torch.tensor([[2., 1], [1, 3]]), torch.tensor([[4., -1], [-1, 1]])
    A = S1 @ S2
    want = 5 + 5 - 2 * math.sqrt(A.trace() + 2 * math.sqrt(torch.det(A)))
    assert M.frechet_gaussian([0, 0], S1, [0, 0], S2) == pytest.approx(want, abs=1e-6)
    assert M.frechet_gaussian([0., 0], S2, [0., 0], S1) == pytest.approx(want, abs=1e-6)


def test_frechet_samples():
    x = normal(40_000, 2) * torch.tensor([1., 2])
    y = normal(40_000, 2, seed=1) * torch.tensor([3., 1]) + torch.tensor([1., 0])
    assert M.frechet(x, y) == pytest.approx(6, abs=.15)
    assert M.frechet(x, x) == pytest.approx(0, abs=1e-6)
    assert M.frechet(x.numpy(), y.float()) == pytest.approx(M.frechet(y, x), abs=1e-4)
    a, b = normal(9, 1), 2 * normal(9, 1, seed=1) + 1           # d = 1: (m1-m2)^2 + (s1-s2)^2
    assert M.frechet(a, b) == pytest.approx(float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2))
    # fewer rows than features: singular covariances, still finite, symmetric and not negative
    a, b = normal(8, 20), normal(8, 20, seed=1)
    assert M.frechet(a, b) == pytest.approx(M.frechet(b, a), abs=1e-5) and M.frechet(a, b) > 0


@pytest.mark.parametrize("measure", [M.frechet, M.kid, M.prdc, M.nearest,
                                     lambda x, y: M.memorisation(x, y, normal(9, 3))])
def test_bad_features_raise(measure):
    x = normal(9, 3)
    for bad in (normal(9, 4), normal(0, 3), x / 0, x * torch.nan, x[0]):
        with pytest.raises(ValueError):
            measure(x, bad)
        with pytest.raises(ValueError):
            measure(bad, x)
    if measure is not M.nearest:
        with pytest.raises(ValueError):
            measure(x, x[:1])


def test_bad_arguments_raise():
    m, S, x = torch.zeros(2), torch.eye(2), normal(9, 3)
    for bad in ((m, S, [0], S), (m, S, m, torch.eye(3)), (m, S[0], m, S), (m, S / 0, m, S), (m, S, m / 0, S)):
        with pytest.raises(ValueError):
            M.frechet_gaussian(*bad)
    for bad in (dict(subsets=0), dict(size=1)):
        with pytest.raises(ValueError):
            M.kid(x, x, **bad)


# ------------------------------------------------------------------------------------------------------------
# KID

def test_kid_unbiased_estimator_by_loop():
    x, y, k = normal(5, 3), normal(5, 3, seed=1) + 1, lambda a, b: (float(a @ b) / 3 + 1) ** 3
    pairs = [(i, j) for i in range(5) for j in range(5)]
    want = (sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / 20
            - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 25)
    value, std = M.kid(x, y)
    assert value == pytest.approx(want, abs=1e-12) and std == 0       # one subset: the whole set


def test_kid_closed_form():
    # d = 1: k = 1 + 3 ab + 3 (ab)^2 + (ab)^3, so MMD^2 is the squared differences of the first three moments,
    # weighted by 3, 3, 1. For N(0, 1) and N(m, 1) they are m, m^2, m^3 + 3 m: at m = 1, 3 + 3 + 16 = 22
    x, y, z = normal(10_000, 1), normal(10_000, 1, seed=1), normal(10_000, 1, seed=2) + 1
    value, std = M.kid(x, z, size=500)
    assert value == pytest.approx(22, abs=3 * std / math.sqrt(20)) and 1 < std < 7      # 20 disjoint subsets
    value, std = M.kid(x, y, size=500)
    assert abs(value) < 3 * std / math.sqrt(20) and std > 0
    assert M.kid(x, y, 3, 50) == M.kid(x, y, 3, 50) != M.kid(x, y, 3, 50, seed=1)


def test_kid_draws_without_replacement():
    # x is taken whole each time, y has three different pairs: a row taken twice would give other values
    x, y = torch.tensor([[0.], [1]]), torch.tensor([[0.], [1], [0], [1]])
    values = {round(M.kid(x, y, 1, 2, seed=s)[0], 6) for s in range(40)}
    k = lambda a, b: (a * b + 1) ** 3
    want = {round(2 * k(0, 1) / 2 + k(a, b) - sum(k(p, q) for p in (0, 1) for q in (a, b)) / 2, 6)
            for a, b in ((0, 0), (0, 1), (1, 1))}
    assert values == want


# ------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage

def test_prdc_real_against_real():
    score = M.prdc(normal(1000, 4), normal(1500, 4, seed=1))
    assert .85 < score["precision"] < 1 and .85 < score["recall"] < 1
    assert score["density"] == pytest.approx(1, abs=.1)
    assert score["coverage"] == pytest.approx(1 - 2 ** -5, abs=.02)                 # Naeem 2020, lemma 2
    same = M.prdc(normal(300, 4), normal(300, 4))
    assert same == dict(precision=1, recall=1, density=1, coverage=1)


def test_prdc_by_loop():
    real, fake = normal(40, 2), 1.3 * normal(40, 2, seed=1) + .5
    dist = lambda a, b: float((a - b).norm())
    radius = lambda s, k: [sorted(dist(a, b) for b in s)[k] for a in s]
    r3, r5, f3, n = radius(real, 3), radius(real, 5), radius(fake, 3), range(40)
    want = dict(precision=np.mean([any(dist(real[i], fake[j]) <= r3[i] for i in n) for j in n]),
                recall=np.mean([any(dist(real[i], fake[j]) <= f3[j] for j in n) for i in n]),
                density=np.mean([sum(dist(real[i], fake[j]) < r5[i] for i in n) / 5 for j in n]),
                coverage=np.mean([any(dist(real[i], fake[j]) < r5[i] for j in n) for i in n]))
    assert len(set(want.values())) == 4
    for chunk in (7, 512):
        assert M.prdc(real, fake, chunk=chunk) == pytest.approx(want)


def test_prdc_ties_by_hand():
    # 0..9 against -12..-3. Radii at the ends: r_3 = 3, r_5 = 5; next to them r_5 = 4. Closed balls: -3 lies
    # in the 3-ball of 0, and 0 in that of -3. Open balls: -3 and -4 lie in the 5-ball of 0, none in that of 1
    real = torch.arange(10.)[:, None]
    assert M.prdc(real, real - 12) == dict(precision=.1, recall=.1, density=2 / 50, coverage=.1)
    assert M.prdc(real[:6], real[:6])["coverage"] == 1      # the fewest rows


def test_prdc_failures():
    real = torch.cat([normal(300, 4), normal(300, 4, seed=1) + 20])
    assert set(M.prdc(real, real + 1000).values()) == {0}                           # disjoint supports
    drop = M.prdc(real, normal(600, 4, seed=2))                                     # second mode dropped
    both = M.prdc(real, torch.cat([normal(300, 4, seed=2), normal(300, 4, seed=3) + 20]))
    assert drop["precision"] > .85 and drop["recall"] < .5 < .8 < both["recall"]
    assert drop["coverage"] < .55 < .9 < both["coverage"]
    assert M.prdc(real, normal(700, 4, seed=2)) == M.prdc(real, normal(700, 4, seed=2))


# ------------------------------------------------------------------------------------------------------------
# Neighbours and copies

def test_nearest_by_loop():
    x, y = normal(23, 5), normal(31, 5, seed=1)
    want, index = ((x[:, None] - y) ** 2).mean(2).sqrt().sort(1)
    for chunk in (4, 512):
        got, i = M.nearest(x, y, k=3, chunk=chunk)
        assert torch.allclose(got, want[:, :3], atol=1e-12) and torch.equal(i, index[:, :3])
    assert M.nearest(torch.zeros(1, 9), torch.full((1, 9), .1))[0].item() == pytest.approx(.1)     # per value
    for k in (0, 32):
        with pytest.raises(ValueError):
            M.nearest(x, y, k=k)


@pytest.mark.parametrize("offset", [0, 1e8])
def test_nearest_of_near_copies(offset):
    y = normal(200, 100) + offset
    distance, index = M.nearest(y, y, k=2)
    assert distance[:, 0].max() < 1e-6 and distance[:, 1].min() > .5
    assert torch.equal(index[:, 0], torch.arange(200))
    near = M.nearest(y + 1e-7, y)[0]                        # x.x + y.y - 2 x.y would lose the last digits
    assert torch.allclose(near, torch.full_like(near, 1e-7), atol=0, rtol=.2 if offset else 1e-6)


def test_memorisation():
    train, test, fresh = normal(2000, 6), normal(2000, 6, seed=1), normal(2000, 6, seed=2)
    honest = M.memorisation(fresh, train, test)
    assert 0 < honest["memorised"] < .025 and honest["ratio"] < .01 and abs(honest["mann_whitney_z"]) < 3
    assert .4 < honest["authentic"] < .7
    replay = M.memorisation(train[:500], train, test)
    assert replay["memorised"] == replay["ratio"] == 1 and replay["authentic"] == 0
    assert replay["mann_whitney_z"] < -20
    blurred = M.memorisation(train[:500] + .01 * normal(500, 6, seed=3), train, test)
    assert blurred["memorised"] > .95 and blurred["ratio"] > .95 and blurred["authentic"] < .01
    assert M.memorisation(fresh + 3, train, test)["mann_whitney_z"] > 20           # far off is no copy
    twice = M.memorisation(train[:500], torch.cat([train, train]), test)       # nearest = second-nearest = 0
    assert twice["ratio"] == 1
    part = M.memorisation(torch.cat([train[:500], fresh[:500]]), train, test)
    assert part["memorised"] == pytest.approx(.505, abs=.02) and part["ratio"] == pytest.approx(.5, abs=.01)


def test_memorisation_flips():
    # nearly symmetric pictures: each is nearer to its own flip than to any other picture
    flip = lambda x: x.flip(1)
    half = [normal(300, 6, seed=s) for s in range(2)]
    train, test = (torch.cat([h, h.flip(1)], 1) + .02 * normal(300, 12, seed=9) for h in half)
    both, copied = torch.cat([train, flip(train)]), flip(train) + .05 * normal(300, 12, seed=5)
    assert M.memorisation(copied, both, test)["authentic"] > .9                    # fooled by the flips
    score = M.memorisation(copied, both, test, copies=2)
    assert score["authentic"] < .05 and score["ratio"] > .9 and score["memorised"] > .9
    for copies in (0, 7, 600):
        with pytest.raises(ValueError):
            M.memorisation(copied, both, test, copies=copies)


def test_mann_whitney_by_loop():
    a, b = torch.tensor([1., 2, 2, 5]), torch.tensor([2., 3, 4, 4, 6])
    u = sum(float(p > q) + .5 * float(p == q) for p in a for q in b)
    ties = (3 ** 3 - 3) + (2 ** 3 - 2)
    want = (u - 10) / math.sqrt(20 / 12 * (10 - ties / 72))
    assert M.mann_whitney(a, b) == pytest.approx(want) and want < 0
    assert M.mann_whitney(b, a) == pytest.approx(-want) and M.mann_whitney(a * 0, b * 0) == 0


# ------------------------------------------------------------------------------------------------------------
# PSNR, SSIM

def test_psnr():
    x = pictures(3, 2, 16, 16)
    assert torch.allclose(M.psnr(x, x + .1, 1), torch.full((3,), 20.).double())
    assert torch.allclose(M.psnr(x, x + .1, 2), torch.full((3,), 20 + 20 * math.log10(2)).double())
    assert (M.psnr(x, x, 1) == math.inf).all()
    offsets = torch.tensor([.1, .01, .001]).double().view(3, 1, 1, 1)
    assert torch.allclose(M.psnr(x, x + offsets, 1), torch.tensor([20., 40, 60]).double())
    black, white = torch.zeros(1, 4).byte(), torch.full((1, 4), 255).byte()
    assert M.psnr(black, white, 255).item() == pytest.approx(0)                     # bytes do not wrap around


def slow_ssim(x, y, window):
    """(H, W) in [0, 1], windows one by one."""
    g = np.exp(-(np.arange(window) - window // 2) ** 2 / 4.5)
    g, values = np.outer(g, g) / np.outer(g, g).sum(), []
    for i in range(x.shape[0] - window + 1):
        for j in range(x.shape[1] - window + 1):
            a, b = x[i:i + window, j:j + window], y[i:i + window, j:j + window]
            ma, mb = (g * a).sum(), (g * b).sum()
            va, vb, c = (g * (a - ma) ** 2).sum(), (g * (b - mb) ** 2).sum(), (g * (a - ma) * (b - mb)).sum()
            luminance = (2 * ma * mb + 1e-4) / (ma ** 2 + mb ** 2 + 1e-4)
            values.append(luminance * (2 * c + 9e-4) / (va + vb + 9e-4))
    return np.mean(values)


@pytest.mark.parametrize("window", [7, 11])
def test_ssim_by_loop(window):
    x = pictures(2, 3, 17, 14)
    y = x + .2 * normal(2, 3, 17, 14, seed=1)
    want = [np.mean([slow_ssim(p.numpy(), q.numpy(), window) for p, q in zip(x[b], y[b])]) for b in range(2)]
    assert M.ssim(x, y, 1, window).tolist() == pytest.approx(want, abs=1e-10)
    assert M.ssim(255 * x, 255 * y, 255, window).tolist() == pytest.approx(want, abs=1e-10)
    # a volume that does not change along one side is a picture, whichever side
    for side in (2, 3, 4):
        repeat = lambda a: a.unsqueeze(side).repeat_interleave(12, side)
        assert M.ssim(repeat(x), repeat(y), 1, window).tolist() == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("shape", [(2, 3, 44, 46), (2, 1, 22, 24, 23)])
def test_ssim_properties(shape):
    x = pictures(*shape)
    y, scales = x + .1 * normal(*shape, seed=1), dict(weights=M.MS_WEIGHTS[:2])
    for measure in (M.ssim, lambda *a: M.ms_ssim(*a, **scales)):
        assert torch.allclose(measure(x, x, 1), torch.ones(2).double(), atol=1e-12)
        assert torch.allclose(measure(x, y, 1), measure(y, x, 1), atol=1e-12)
        assert torch.allclose(measure(x, y, 1)[1:], measure(x[1:], y[1:], 1), atol=1e-12)     # per item
        assert abs(float(measure(x, y, 1)[0] - measure(x, y, 1)[1])) > 1e-6
        assert torch.allclose(measure(x.float(), y.float(), 1), measure(x, y, 1), atol=1e-5)
    # constants: only the luminance term is left (at the coarsest scale, to the power of its weight)
    a, b = torch.full(shape, .2), torch.full(shape, .6)
    want = (2 * .2 * .6 + 1e-4) / (.2 ** 2 + .6 ** 2 + 1e-4)
    assert M.ssim(a, b, 1).tolist() == pytest.approx([want] * 2, abs=1e-6)
    assert M.ms_ssim(a, b, 1, **scales).tolist() == pytest.approx([want ** (.2856 / .3304)] * 2, abs=1e-6)
    assert M.ssim(x, 1 - x, 1).max() < 0 == M.ms_ssim(x, 1 - x, 1, **scales).max()  # inverted


def test_ms_ssim_is_ssim_at_one_scale_and_its_product_at_two():
    x = pictures(2, 1, 44, 44)
    y = x + .1 * normal(2, 1, 44, 44, seed=1)
    assert torch.allclose(M.ms_ssim(x, y, 1, weights=(3.,)), M.ssim(x, y, 1))
    half = lambda a: (a[..., ::2, ::2] + a[..., 1::2, ::2] + a[..., ::2, 1::2] + a[..., 1::2, 1::2]) / 4
    for w in (7, 11):
        want = (M._ssim_and_cs(x, y, w)[1] ** .25 * M.ssim(half(x), half(y), 1, w)[:, None] ** .75).mean(1)
        assert torch.allclose(M.ms_ssim(x, y, 1, weights=(1, 3), window=w), want)


def test_ssim_refuses():
    for measure, shape in ((M.ssim, (1, 1, 10, 30)), (M.ssim, (1, 1, 30, 30, 10)), (M.ssim, (1, 30, 30)),
                           (M.ms_ssim, (1, 1, 175, 200)), (M.ms_ssim, (30, 30))):
        with pytest.raises(ValueError):
            measure(torch.zeros(shape), torch.zeros(shape), 1)
    for w in (7, 11):
        assert M.ssim(torch.zeros(1, 1, w, w), torch.zeros(1, 1, w, w), 1, w) == 1
    assert M.ms_ssim(torch.zeros(1, 1, 176, 176), torch.zeros(1, 1, 176, 176), 1) == 1
    with pytest.raises(ValueError, match="4 fit"):
        M.ms_ssim(torch.zeros(1, 1, 175, 175), torch.zeros(1, 1, 175, 175), 1)
    with pytest.raises(ValueError, match="3 fit"):
        M.ms_ssim(torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 1, 32, 32, 32), 1, window=7)
    for measure in (M.psnr, M.ssim):
        with pytest.raises(ValueError):                     # would broadcast
            measure(torch.zeros(2, 1, 16, 16), torch.zeros(1, 1, 16, 16), 1)
        with pytest.raises(ValueError):
            measure(torch.zeros(2, 1, 16, 16), torch.zeros(2, 1, 16, 16), 0)


# ------------------------------------------------------------------------------------------------------------
# Ladders: more damage, worse number

def test_feature_ladder():
    spectrum = .5 ** torch.arange(8)              # as of real features: noise shows in the weak ones
    real, fake, noise = (normal(1000, 8, seed=s) * w for s, w in ((0, spectrum), (1, spectrum), (2, 1)))
    scores = [(M.frechet(real, f), M.kid(real, f, 20, 500)[0], M.prdc(real, f))
              for f in (fake + s * noise for s in LEVELS)]
    rising([s[0] for s in scores])
    rising([s[1] for s in scores])
    for name in ("precision", "density", "coverage"):
        rising([-s[2][name] for s in scores])
    recalls = [M.prdc(real, fake * s)["recall"] for s in (1, .8, .6, .4)]           # less and less variety
    rising([-r for r in recalls])
    real, fake, noise = (normal(1000, 8, seed=s) for s in range(3))
    scores = [M.memorisation(real[:500] + s * noise[:500], real, fake) for s in (.1, .2, .3)]
    for name, sign in (("memorised", -1), ("ratio", -1), ("authentic", 1), ("mann_whitney_z", 1)):
        rising([sign * s[name] for s in scores])


@pytest.mark.parametrize("shape", [(2, 1, 44, 44), (1, 1, 24, 24, 24)])
def test_picture_ladder(shape):
    x, noise, scales = pictures(*shape), normal(*shape, seed=1), dict(weights=M.MS_WEIGHTS[:2])
    for damaged in ([x + s * noise for s in LEVELS],
                    [x] + [blur(x, s) for s in (1, 2, 3)]):
        for measure in (M.ssim, lambda *a: M.ms_ssim(*a, **scales), M.psnr):
            rising([-measure(x, y, 1).mean().item() for y in damaged])


def blur(x, times):
    for _ in range(times):
        for dim in range(2, x.ndim):
            x = (x.roll(1, dim) + x + x.roll(-1, dim)) / 3
    return x


# ------------------------------------------------------------------------------------------------------------
# Bootstrap

def test_bootstrap():
    x = normal(400) + 5
    low, high = M.bootstrap(x, torch.mean, n=4000)
    half = 1.96 * float(x.std()) / 20
    assert low == pytest.approx(float(x.mean()) - half, abs=.01)
    assert high == pytest.approx(float(x.mean()) + half, abs=.01)
    assert M.bootstrap(x, torch.mean) == M.bootstrap(x, torch.mean) != M.bootstrap(x, torch.mean, seed=1)
    pairs = torch.stack([x, 2 * x], 1)                      # rows stay together
    assert M.bootstrap(pairs, lambda v: (v[:, 1] / v[:, 0]).mean()) == pytest.approx((2, 2))
    with pytest.raises(ValueError):
        M.bootstrap(x[:1], torch.mean)
