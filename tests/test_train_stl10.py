"""train_stl10.py against closed forms: pictures whose exact denoiser is known, runs of a second, and every
fault that the lab notes recorded (the numbers in brackets are the rows of design/stl10.md, section 2)."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common
import train_stl10 as T
from data import stl10

CPU = torch.device("cpu")
TINY = dict(
    SIZE=8,
    WIDTH=8,
    MULTS=(1, 2),
    ATTENTION=(False, True),
    PATCH=1,
    BATCH_SIZE=16,
    LR=2e-3,
    STEPS=4,
    SAMPLES=20,
    SWEEP=(1.0, 3.0),
    PRECISION="fp32",
)


@pytest.fixture
def use(monkeypatch):
    """Put settings into the script, as override() does, until the end of the test."""

    def put(**chosen):
        for name, value in chosen.items():
            assert type(getattr(T, name)) is type(value), name
            monkeypatch.setattr(T, name, value)

    put(PRECISION="fp32")
    return put


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def angle(t, shift=1.0):
    """The schedule as an angle, written independently of the script: a = cos, s = sin."""
    return math.atan2(shift * math.sin(math.pi / 2 * t), math.cos(math.pi / 2 * t))


class Gaussian:
    """The exact v for x_0 ~ N(0, std^2), times `scale` for a wrong one: x_0_hat = a std^2 / (a^2 std^2 + s^2)
    x."""

    null = 10

    def __init__(self, std=0.5, scale=1.0):
        self.variance, self.scale, self.calls = std**2, scale, []

    def __call__(self, x, t, labels):
        self.calls.append(len(x))
        a, s = (f(math.pi / 2 * t.double())[:, None, None, None] for f in (torch.cos, torch.sin))
        return self.scale * a * s * (1 - self.variance) / (a**2 * self.variance + s**2) * x.double()


class TwoClasses:
    """The exact v for x_0 ~ N(+-mean, std^2), each value on its own; label 0 is +, 1 is -, 2 is null (a
    coin)."""

    null = 2

    def __init__(self, mean=0.5, std=0.2, swap=False):
        self.mean, self.variance, self.swap = mean, std**2, swap

    def __call__(self, x, t, labels):
        a, s = (f(math.pi / 2 * t.double())[:, None, None, None] for f in (torch.cos, torch.sin))
        x, total = x.double(), a**2 * self.variance + s**2
        k = a * self.variance / total
        sign = torch.tensor([-1.0, 1.0] if self.swap else [1.0, -1.0], dtype=torch.float64)[
            labels.clamp(max=1)
        ]
        null = torch.tanh(a * self.mean * x / total)  # E[sign | x]
        mean = self.mean * torch.where((labels == 2)[:, None, None, None], null, sign[:, None, None, None])
        return (a * x - (mean + k * (x - a * mean))) / s


# ------------------------------------------------------------------------------------------------------------
# Schedule and loss


def test_round_trip_of_v_eps_and_x_0(use):
    use(CLIP_X0="none", GUIDANCE=1.0)
    x_0, eps = (randn(6, 3, 4, 4, seed=i, dtype=torch.float64) for i in (0, 1))
    t = torch.tensor([1e-3, 0.2, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    for schedule, shift in (("cosine", 1.0), ("cosine", 1.5), ("linear", 1.0)):
        use(SCHEDULE=schedule, SHIFT=shift)
        a, s = (c[:, None, None, None] for c in T.schedule(t))
        x, v = a * x_0 + s * eps, a * eps - s * x_0
        assert (a * x - s * v - x_0).abs().max() < 1e-12 and (s * x + a * v - eps).abs().max() < 1e-12
        assert float(T.loss_fn(lambda *_: v, x_0, None, t, eps).max()) < 1e-12  # the network should say v
        assert float(T.loss_fn(lambda *_: -v, x_0, None, t, eps).min()) > 0.1
        for i in range(6):  # and the sampler reads x_0 off it
            got = T.guided_x_0(
                lambda *_: v[i : i + 1], x[i : i + 1], float(t[i]), torch.zeros(1, dtype=int), torch.ones(1)
            )
            assert (got - x_0[i]).abs().max() < 1e-6
    use(SCHEDULE="cosine", SHIFT=1.5)
    assert float(T.schedule(1.0)[0]) == 0.0
    got = T.guided_x_0(lambda *_: v[:1], x[:1], 1.0, torch.zeros(1, dtype=int), torch.ones(1))
    assert torch.equal(got.float(), -v[:1].float())  # x_0 = -v at t = 1


def test_schedule_is_the_stated_one(use):
    table = dict(
        zip(
            (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
            (0.988, 0.951, 0.891, 0.809, 0.707, 0.588, 0.454, 0.309, 0.156, 0.078, 0.0),
        )
    )
    for t, want in table.items():
        assert float(T.schedule(t)[0]) == pytest.approx(want, abs=6e-4)
    t = torch.linspace(0.001, 0.999, 57, dtype=torch.float64)

    def log_snr():
        a, s = T.schedule(t)
        assert (a**2 + s**2 - 1).abs().max() < 1e-12
        return 2 * torch.log(a / s)

    for schedule in ("cosine", "linear"):
        use(SCHEDULE=schedule, SHIFT=1.0)
        plain = log_snr()
        assert (plain.diff() < 0).all()
        use(SHIFT=1.5)
        assert (log_snr() - plain + 0.8109).abs().max() < 1e-4  # -2 ln 1.5 at every t
    # linear: DDPM's discrete betas 1e-4 .. 0.02 over 1000 steps, cumulated
    use(SCHEDULE="linear", SHIFT=1.0)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for k in (100, 400, 700):
        assert float(T.schedule(k / 1000)[0]) == pytest.approx(math.sqrt(alpha_bar[k - 1]), rel=0.02)


@pytest.mark.parametrize(
    "schedule, shift", [("cosine", 1.0), ("cosine", 1.5), ("linear", 1.0), ("linear", 1.5)]
)
def test_time_of_inverts_schedule(use, schedule, shift):
    use(SCHEDULE=schedule, SHIFT=shift)
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    a, s = T.schedule(t)
    assert (T.time_of(s / a) - t).abs().max() < 1e-9


def test_exact_gaussian_minimises_the_loss(use):
    n, t = 256, 0.05 + 0.95 * torch.rand(256, generator=torch.Generator().manual_seed(5))
    x_0, eps = 0.5 * randn(n, 3, 8, 8, seed=1), randn(n, 3, 8, 8, seed=2)
    loss = {c: T.loss_fn(Gaussian(scale=c), x_0, None, t, eps) for c in (1.0, 0.9, 1.1, -1.0, 0.0)}
    mean = {c: float(v.mean()) for c, v in loss.items()}
    assert mean[1.0] < min(mean[0.9], mean[1.1]) and mean[-1.0] > 1.5 * mean[1.0], mean
    # loss(c) is a parabola in c: its bottom lies at 1, and its value is E var(x_0 | x_t) / s^2
    bottom = 0.1 * (mean[0.9] - mean[1.1]) / (2 * (mean[0.9] + mean[1.1] - 2 * mean[1.0])) + 1
    assert bottom == pytest.approx(1, abs=0.02)
    th = math.pi / 2 * t.double()
    want = 0.25 / (0.25 * torch.cos(th) ** 2 + torch.sin(th) ** 2)
    assert float((loss[1.0] / want).mean()) == pytest.approx(1, abs=0.01)
    # the zero predictor is the other reference row: a^2 + s^2 E x_0^2
    zero = torch.cos(th) ** 2 + torch.sin(th) ** 2 * 0.25
    assert float((loss[0.0] / zero).mean()) == pytest.approx(1, abs=0.01)


def test_min_snr_weights(use):
    x_0, eps = randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    plain = T.loss_fn(Gaussian(), x_0, None, t, eps)
    use(MIN_SNR=5.0)
    snr = np.array([1 / max(math.tan(angle(p)) ** 2, 1e-9) for p in (0.1, 0.5, 0.9)] + [0.0]).clip(0.05)
    assert np.allclose(
        T.loss_fn(Gaussian(), x_0, None, t, eps) / plain, snr.clip(max=5) / (snr + 1), rtol=1e-4
    )


# ------------------------------------------------------------------------------------------------------------
# Samplers: the exact denoiser of N(0, .5^2) makes every sampler a product of known linear coefficients


def denoise(th, variance=0.25):
    """x_0_hat / x at angle th."""
    return math.cos(th) * variance / (math.cos(th) ** 2 * variance + math.sin(th) ** 2)


def ddim_std(steps, eta):
    variance = 1.0
    for i in range(steps):
        th, to = angle(1 - i / steps), angle(1 - (i + 1) / steps)
        g = denoise(th)
        if i == steps - 1:
            return abs(g) * math.sqrt(variance)
        S = eta * math.sin(to) / math.sin(th) * math.sqrt(1 - (math.cos(th) / math.cos(to)) ** 2)
        keep = math.cos(to) * g + math.sqrt(math.sin(to) ** 2 - S**2) * (1 - math.cos(th) * g) / math.sin(th)
        variance = keep**2 * variance + S**2


def dpm_std(steps):
    """DPM-Solver++(2M) as the note states it: the first two steps are first order, the last returns x_0."""
    x, before, lam_before = 1.0, None, None
    for i in range(steps):
        th, to = angle(1 - i / steps), angle(1 - (i + 1) / steps)
        x_0 = denoise(th) * x
        if i == steps - 1:
            return x_0
        if i == 0:
            x = math.sin(to) * x + math.cos(to) * x_0
        else:
            lam, lam_to = -math.log(math.tan(th)), -math.log(math.tan(to))
            h, D = lam_to - lam, x_0
            if i >= 2:
                p = (lam - lam_before) / h
                D = (1 + 1 / (2 * p)) * x_0 - before / (2 * p)
            x = math.sin(to) / math.sin(th) * x - math.cos(to) * math.expm1(-h) * D
            lam_before = lam
        before = x_0
        lam_before = -math.log(math.tan(th)) if i else None


def heun_std(steps):
    q = [
        (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(steps)
    ] + [0.0]
    y = math.sqrt(1 + q[0] ** 2)

    def slope(y, q):
        return (y - 0.25 / (0.25 + q**2) * y) / q

    for now, then in zip(q, q[1:]):
        k = slope(y, now)
        trial = y + (then - now) * k
        y = y + (then - now) * (k + slope(trial, then)) / 2 if then else trial
    return y


TABLE = {
    ("ddim", 0.0): {10: 0.4280, 20: 0.4628, 25: 0.4701, 50: 0.4848, 100: 0.4923, 500: 0.4985},
    ("ddim", 0.5): {10: 0.4211, 20: 0.4570, 25: 0.4648, 50: 0.4814, 100: 0.4903, 500: 0.4980},
    ("ddim", 1.0): {10: 0.3886, 20: 0.4322, 25: 0.4430, 50: 0.4677, 100: 0.4825, 500: 0.4962},
    ("dpm++", 0.0): {10: 0.4797, 20: 0.5016, 25: 0.5028, 50: 0.5020},
    ("heun", 0.0): {10: 0.6098, 20: 0.5218, 25: 0.5134, 50: 0.5030},
}


def closed_form(solver, eta, steps):
    return {
        "ddim": lambda: ddim_std(steps, eta),
        "dpm++": lambda: dpm_std(steps),
        "heun": lambda: heun_std(steps),
    }[solver]()


def plain_sampling(use, solver="ddim", eta=0.0, steps=10, **more):
    use(
        SOLVER=solver,
        ETA=eta,
        STEPS=steps,
        CLIP_X0="none",
        GUIDANCE=1.0,
        SCHEDULE="cosine",
        SHIFT=1.0,
        **more,
    )


@pytest.mark.parametrize("solver, eta", TABLE)
def test_output_std_is_the_closed_form(use, solver, eta):
    for steps, literal in {**TABLE[solver, eta], 500: TABLE[solver, eta].get(500)}.items():
        want = closed_form(solver, eta, steps)
        if literal is not None:
            assert want == pytest.approx(literal, abs=1e-4), (steps, want)
        plain_sampling(use, solver, eta, steps)
        if eta == 0:  # a deterministic linear map: the picture of ones comes out as the gain
            labels = torch.zeros(1, dtype=int)
            got = float(T.sample(Gaussian(), labels, [0], start=(torch.ones(1, 3, 2, 2), 1.0)).mean())
        else:  # picture 0 starts at 1, picture j gets the j-th noise alone: the squares of what comes out add up
            x, drawn = torch.zeros(steps + 1, 1, 1, 1), []
            x[0] = 1

            def noise():
                drawn.append(1)
                return torch.zeros_like(x).index_fill_(0, torch.tensor(len(drawn)), 1.0)

            labels = torch.zeros(len(x), dtype=int)
            *_, (_, _, out) = T.solve(Gaussian(), x, 1.0, labels, torch.ones(len(x)), noise)
            assert len(drawn) == steps - 1  # none on the last step
            got = float(out.double().square().sum().sqrt())
        assert got == pytest.approx(want, abs=2e-5), steps


def accept(solver, eta, steps, count=32):
    """What a user sees: the std over pictures from `sample`, against the closed form."""
    x = T.sample(Gaussian(), torch.zeros(count, dtype=int), range(count))
    error = 0.5 / math.sqrt(2 * x.numel())
    assert float(x.std()) == pytest.approx(closed_form(solver, eta, steps), abs=1e-3 + 3 * error)
    assert abs(float(x.mean())) < 4 * math.sqrt(2) * error


@pytest.mark.parametrize("solver, eta", TABLE)
def test_samples_have_that_std(use, solver, eta):
    for steps in (10, 50):
        plain_sampling(use, solver, eta, steps, SIZE=32)
        accept(solver, eta, steps)


def test_posterior_mean_without_noise_is_caught(use, monkeypatch):
    """The lab notes' "eta = 0" (row 1): the DDPM posterior's mean with its noise switched off."""

    def faulty(model, x, t_first, labels, w, noise):
        for i in range(T.STEPS):
            (a, s), (b, r) = ([float(c) for c in T.schedule(t_first * (1 - j / T.STEPS))] for j in (i, i + 1))
            x_0 = T.guided_x_0(model, x, t_first * (1 - i / T.STEPS), labels, w)
            yield t_first * (1 - i / T.STEPS), x, x_0
            if i < T.STEPS - 1:
                beta = 1 - (a / b) ** 2
                x = b * beta / s**2 * x_0 + a / b * r**2 / s**2 * x

    plain_sampling(use, "ddim", 0.0, 500, SIZE=8)
    accept("ddim", 0.0, 500)
    monkeypatch.setattr(T, "solve", faulty)
    x = T.sample(Gaussian(), torch.zeros(8, dtype=int), range(8))
    assert float(x.std()) < 1e-3
    with pytest.raises(AssertionError):
        accept("ddim", 0.0, 500)


@pytest.mark.parametrize("t_first", [1.0, 0.7])
def test_ddim_eta_1_is_the_ddpm_posterior(use, monkeypatch, t_first):
    """One step of `solve` on the three basis vectors (x_t, x_0_hat, z) gives its three coefficients."""
    plain_sampling(use, "ddim", 1.0, 9)
    x, x_0, z = (row[:, None, None, None] for row in torch.eye(3, dtype=torch.float64))
    monkeypatch.setattr(T, "guided_x_0", lambda *_: x_0)
    walk = list(T.solve(None, x, t_first, None, None, lambda: z))
    grid = [t_first * (1 - i / 9) for i in range(10)]
    assert [t for t, _, _ in walk] == pytest.approx(grid[:-1])
    before = x
    for t, u, (_, after, _) in zip(grid, grid[1:], walk[1:]):
        # coefficients of this step alone: express `after` in the state before it
        a, s, b, r = *(f(angle(t)) for f in (math.cos, math.sin)), *(
            f(angle(u)) for f in (math.cos, math.sin)
        )
        beta = 1 - (a / b) ** 2
        want = b * beta / s**2 * x_0 + a / b * r**2 / s**2 * before + math.sqrt(beta * r**2 / s**2) * z
        assert (after - want).abs().max() < 1e-10, t
        before = after
    assert torch.equal(walk[-1][2], x_0)  # u = 0: x_0 itself, no noise


def test_reconstruction_correlation(use):
    """Noise to t and back. DDIM keeps what x_t knows, .5 a / sqrt(.25 a^2 + s^2); DDPM forgets, the square of
    it."""
    n = 16
    x_0, eps = 0.5 * randn(n, 3, 20, 20, seed=1), randn(n, 3, 20, 20, seed=2)
    for eta, steps, table in (
        (0.0, 50, (0.839, 0.567, 0.341, 0.160, 0.0)),
        (1.0, 100, (0.703, 0.321, 0.117, 0.026, 0.0)),
    ):
        for t, want in zip((0.2, 0.4, 0.6, 0.8, 1.0), table):
            plain_sampling(use, "ddim", eta, steps)
            x_t = math.cos(angle(t)) * x_0 + math.sin(angle(t)) * eps
            out, path = T.sample(
                Gaussian(), torch.zeros(n, dtype=int), range(n), start=(x_t, t), trajectory=True
            )
            assert path[0][0] == t and torch.equal(path[0][1], x_t)  # it starts at t, not elsewhere (row 3)
            r = float(torch.corrcoef(torch.stack([x_0.flatten(), out.flatten()]))[0, 1])
            assert r == pytest.approx(want, abs=0.02), (eta, t)
            assert float(out.std()) == pytest.approx(0.5, abs=0.02)  # the notes' sampler: .41 .28 .17 .08 0


@pytest.mark.parametrize("t", [0.0, -0.1, 1.2, 700 / 500, float("nan")])
def test_t_outside_is_refused(use, t):
    with pytest.raises(ValueError, match="t must lie in"):
        T.sample(Gaussian(), torch.zeros(1, dtype=int), [0], start=(torch.zeros(1, 3, 4, 4), t))


def test_draw_reconstructions_uses_fresh_noise(use, monkeypatch, tmp_path):
    """With ETA = 1 the sampler's noise must not be the noise that made x_t: the two would add up."""
    plain_sampling(use, "ddim", 1.0, 200, SIZE=32)
    monkeypatch.setattr(T, "tile", lambda *_, **__: None)
    values = (0.5 * randn(8, 3, 32, 32, seed=3)).clamp(-1, 1)
    data = SimpleNamespace(
        val_x=((values + 1) * 127.5).round().byte(), val_y=torch.zeros(8, dtype=int), names=("one",)
    )
    T.draw_reconstructions(tmp_path, Gaussian(), data, 0)
    stack = torch.from_numpy(np.load(tmp_path / "recon_sweep.npy"))  # (8, original + six t, 3, H, W)
    for i, want in ((1, 0.703), (2, 0.321), (3, 0.117), (4, 0.026)):
        r = float(torch.corrcoef(torch.stack([stack[:, 0].flatten(), stack[:, i].flatten()]))[0, 1])
        assert r == pytest.approx(want, abs=0.025), i
        assert float(stack[:, i].std()) == pytest.approx(0.49, abs=0.02), i


def test_heun_counts_evaluations_and_walks_down(use):
    plain_sampling(use, "heun", 0.0, 7)
    model = Gaussian()
    _, path = T.sample(
        model, torch.zeros(2, dtype=int), [0, 1], start=(randn(2, 3, 4, 4), 0.5), trajectory=True
    )
    assert len(model.calls) == 2 * 7 - 1
    times = [t for t, _, _ in path]
    assert times[0] == pytest.approx(0.5) and times[-1] == 0 and times == sorted(times, reverse=True)


# ------------------------------------------------------------------------------------------------------------
# Guidance

EVERYWHERE, NOWHERE = (0.0, 1e13), (1e13, 1e14)
TWO_CLASSES = {  # w: mean, std, share > 1 of class +; everywhere, clipped, in (.2, 5], both
    1.0: ((0.500, 0.194, 0.005), (0.500, 0.193, 0), (0.500, 0.194, 0.005), (0.500, 0.193, 0)),
    1.5: ((0.575, 0.155, 0.007), (0.574, 0.154, 0), (0.567, 0.155, 0.006), (0.567, 0.154, 0)),
    3.0: ((0.704, 0.121, 0.018), (0.658, 0.136, 0), (0.682, 0.117, 0.012), (0.645, 0.134, 0)),
    6.0: ((0.861, 0.101, 0.097), (0.688, 0.132, 0), (0.817, 0.092, 0.041), (0.675, 0.131, 0)),
    9.0: ((0.974, 0.093, 0.351), (0.701, 0.130, 0), (0.909, 0.081, 0.133), (0.688, 0.129, 0)),
}


def test_two_class_guidance_table(use):
    """With exact scores too, more guidance moves the mean outwards and shrinks the spread: stylisation is not
    a fault of training. All weights go through one call, as a vector: guidance is per picture."""
    each, weights = 20, list(TWO_CLASSES)
    labels, w = torch.zeros(each * len(weights), dtype=int), torch.tensor(weights).repeat_interleave(each)
    all_t = (
        0.0,
        1e9,
    )  # the note's "all t" leaves out t = 1 itself; guidance there too gives share .375 at w = 9
    for column, (interval, clip) in enumerate(
        ((all_t, "none"), (all_t, "clip"), ((0.2, 5.0), "none"), ((0.2, 5.0), "clip"))
    ):
        plain_sampling(use, "ddim", 0.0, 100, SIZE=20)
        use(GUIDANCE_INTERVAL=interval, CLIP_X0=clip)
        x = T.sample(TwoClasses(), labels, list(range(each)) * len(weights), w=w).view(len(weights), -1)
        for values, want in zip(x, TWO_CLASSES.values()):
            got = float(values.mean()), float(values.std()), float((values > 1).float().mean())
            assert got == pytest.approx(want[column], abs=0.01), (column, want)


def test_minus_class_is_the_mirror(use):
    plain_sampling(use, "dpm++", 0.0, 20, SIZE=16)
    use(GUIDANCE=2.0)
    x = T.sample(TwoClasses(), torch.arange(64) % 3, range(64))
    assert float(x[0::3].mean()) > 0.5 and float(x[1::3].mean()) < -0.5 and abs(float(x[2::3].mean())) < 0.1


def network(use, classes=4, seed=0, **more):
    """A tiny U-Net without the zeros it starts with, so that every input matters."""
    use(**{**TINY, "DROPOUT": 0.0, **more})
    torch.manual_seed(seed)
    model = T.build_model(classes).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    model.null = classes
    return model


class Counted:
    def __init__(self, model):
        self.model, self.null, self.calls, self.labels = model, model.null, [], []

    def __call__(self, x, t, labels):
        self.calls.append(len(x)), self.labels.append(labels.tolist())
        return self.model(x, t, labels)


def test_guidance_of_one_zero_and_per_picture(use):
    model = network(use, CLIP_X0="none", GUIDANCE_INTERVAL=EVERYWHERE)
    labels, seeds, null = torch.tensor([0, 1, 2, 3]), [1, 2, 3, 4], torch.full((4,), 4)
    one = Counted(model)
    plain = T.sample(one, labels, seeds, w=1.0)
    assert one.calls == [4] * 4  # no null pass at w = 1
    two = Counted(model)
    assert (T.sample(two, labels, seeds, w=0.0) - T.sample(model, null, seeds, w=1.0)).abs().max() < 1e-4
    assert two.calls == [8] * 4 and all(row[4:] == [4] * 4 and row[:4] == [0, 1, 2, 3] for row in two.labels)
    w = torch.tensor([1.0, 0.0, 3.0, 1.5])
    mixed = T.sample(model, labels, seeds, w=w)
    for i in range(4):
        alone = T.sample(model, labels[i : i + 1], seeds[i : i + 1], w=float(w[i]))
        assert (mixed[i] - alone[0]).abs().max() < 1e-4, i
    assert (mixed[0] - plain[0]).abs().max() < 1e-4
    assert (mixed[2] - plain[2]).abs().max() > 1e-2  # and guidance does something
    # null against null is null, whatever the weight
    assert (T.sample(model, null, seeds, w=7.0) - T.sample(model, null, seeds, w=1.0)).abs().max() < 1e-3
    use(GUIDANCE=3.0)  # the setting is the default
    assert torch.equal(T.sample(model, labels, seeds), T.sample(model, labels, seeds, w=3.0))


def test_interval_saves_the_null_branch(use):
    model, labels = network(use, STEPS=10, SOLVER="ddim"), torch.tensor([0, 1, 2])
    counted = Counted(model)
    use(GUIDANCE_INTERVAL=NOWHERE, GUIDANCE=5.0)
    off = T.sample(counted, labels, [0, 1, 2])
    assert counted.calls == [3] * 10 and torch.equal(off, T.sample(model, labels, [0, 1, 2], w=1.0))
    use(GUIDANCE_INTERVAL=(0.2, 5.0))
    counted = Counted(model)
    T.sample(counted, labels, [0, 1, 2])
    inside = [0.2 < math.tan(angle(1 - i / 10)) <= 5.0 for i in range(10)]
    assert counted.calls == [6 if i else 3 for i in inside] and 0 < sum(inside) < 10


def test_rescale_and_dynamic_threshold(use):
    model, labels = network(use, GUIDANCE_INTERVAL=EVERYWHERE, CLIP_X0="none"), torch.tensor([0, 1])
    x, w = randn(2, 3, 8, 8), torch.tensor([6.0, 6.0])
    plain = T.guided_x_0(model, x, 0.6, labels, torch.ones(2))
    use(RESCALE=1.0)
    restored = T.guided_x_0(model, x, 0.6, labels, w)
    assert torch.allclose(restored.std((1, 2, 3)), plain.std((1, 2, 3)), rtol=1e-4)
    use(RESCALE=0.0)
    guided = T.guided_x_0(model, 5 * x, 0.6, labels, w)
    assert guided.abs().max() > 1.5
    use(CLIP_X0="clip")
    assert torch.equal(T.guided_x_0(model, 5 * x, 0.6, labels, w), guided.clamp(-1, 1))
    use(CLIP_X0="dynamic")
    m = torch.stack([g.abs().flatten().quantile(0.995) for g in guided])[:, None, None, None].clamp(min=1)
    got = T.guided_x_0(model, 5 * x, 0.6, labels, w)
    assert torch.allclose(got, (guided / m).clamp(-1, 1), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Labels and seeds


def test_one_label_moves_one_picture(use):
    model = network(use)
    labels, seeds = torch.tensor([0, 1, 2, 3, 4]), [5] * 5
    x = T.sample(model, labels, seeds)
    assert torch.equal(x, T.sample(model, labels, seeds))  # same seeds, same bits
    changed = labels.clone()
    changed[2] = 0
    y = T.sample(model, changed, seeds)
    assert (x[2] - y[2]).abs().max() > 1e-2
    assert all(torch.equal(x[i], y[i]) for i in (0, 1, 3, 4))
    assert torch.allclose(y[2], x[0], atol=1e-5)  # one seed for all (row 14): only the label differs
    for i in range(5):  # every label draws another picture
        assert all((x[i] - x[j]).abs().max() > 1e-2 for j in range(i))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_picture_does_not_depend_on_its_batch(use, eta):
    model = network(use, SOLVER="ddim", ETA=eta)
    torch.nn.init.normal_(model.head.weight, std=0.03)  # rounding stays far below the bound
    labels, seeds = torch.arange(7) % 5, list(range(10, 17))
    together = T.sample(model, labels, seeds)
    assert (together - T.sample(model, labels, seeds, chunk=3)).abs().max() <= 1e-5
    for i in (0, 3, 6):
        assert (together[i] - T.sample(model, labels[i : i + 1], seeds[i : i + 1])[0]).abs().max() <= 1e-5
    _, path = T.sample(model, labels, seeds, chunk=3, trajectory=True)
    assert len(path) == T.STEPS and all(x.shape == guess.shape == together.shape for _, x, guess in path)


def test_memory_does_not_grow_with_the_number_of_samples(use):
    """Row 4: the network sees 64 pictures at most, twice that under guidance, however many are drawn."""
    model = Counted(network(use, GUIDANCE=2.0))
    x = T.sample(model, torch.arange(200) % 5, range(200))
    assert len(x) == 200 and max(model.calls) == 128


def test_labels_are_needed_and_null_has_a_row(use):
    model = network(use, classes=4)
    assert model.label.weight.shape[0] == 5
    with pytest.raises(ValueError, match="label"):
        model(randn(2, 3, 8, 8), torch.rand(2))
    with pytest.raises((IndexError, RuntimeError)):
        model(randn(1, 3, 8, 8), torch.rand(1), torch.tensor([5]))
    with pytest.raises(ValueError, match="divide"):
        model(randn(1, 3, 7, 7), torch.rand(1), torch.tensor([0]))
    x, t, labels = randn(5, 3, 8, 8), torch.full((5,), 0.5), torch.arange(5)
    out, permuted = model(x, t, labels), model(x, t, labels.roll(1))
    assert (out - permuted).flatten(1).abs().amax(1).min() > 1e-3  # every picture hears its label, null too


@pytest.mark.parametrize("film", [True, False])
def test_no_dead_parameters(use, film):
    """On the fourth backward: the zeros a network starts with hide gradients for two (row 5 had 12 dead of
    137)."""
    use(
        **{
            **TINY,
            "FILM": film,
            "DROPOUT": 0.0,
            "WIDTH": 16,
            "MULTS": (1, 2, 2),
            "ATTENTION": (False, True, True),
        }
    )
    torch.manual_seed(0)
    model = T.build_model(10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for i in range(4):
        optimizer.zero_grad(set_to_none=True)
        t = 0.001 + 0.999 * torch.rand(22, generator=torch.Generator().manual_seed(i))
        T.loss_fn(
            model, randn(22, 3, 8, 8, seed=i), torch.arange(22) % 11, t, randn(22, 3, 8, 8, seed=50 + i)
        ).mean().backward()
        optimizer.step() if i < 3 else None
    rms = {k: float(p.grad.square().mean().sqrt()) for k, p in model.named_parameters()}
    dead = [k for k, r in rms.items() if r < 1e-5 * np.median(list(rms.values()))]
    assert not dead, dead
    assert (model.label.weight.grad.abs().amax(1) > 0).all() and len(model.label.weight) == 11


# ------------------------------------------------------------------------------------------------------------
# Batches


def numbered(total=50, classes=5):
    """Pictures that say their number in their top left pixel and whether they are flipped."""
    x = torch.zeros(total, 3, 4, 4, dtype=torch.uint8)
    x[:, 0] = torch.arange(total, dtype=torch.uint8)[:, None, None]
    x[:, 1, :, 0] = 255
    return SimpleNamespace(x=x, y=torch.arange(total) % classes, names=tuple("abcde"[:classes]))


def numbers(x_0):
    return ((x_0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_draw_batch_is_a_function_of_the_step(use):
    use(BATCH_SIZE=8, ACCUM=2, SEED=3)
    data = numbered()
    first = T.draw_batch(data, 7)
    state = torch.get_rng_state()
    T.draw_batch(data, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, T.draw_batch(data, 7)))
    assert [len(part) for part in first] == [16] * 4
    for other in (T.draw_batch(data, 8), T.draw_batch(data, 7, attempt=1)):  # a rollback takes another window
        same = numbers(other[0]) == numbers(first[0])
        assert not same
        assert not any(torch.equal(a, b) for a, b in zip(first[2:], other[2:]))
    use(SEED=4)
    assert not torch.equal(first[3], T.draw_batch(data, 7)[3])


def test_an_epoch_sees_every_picture_once(use):
    use(BATCH_SIZE=8, ACCUM=1)
    data, seen, labels = numbered(50), [], []
    for step in range(25):  # 200 places: four epochs of 50, though 8 does not divide 50
        x_0, y, _, _ = T.draw_batch(data, step)
        seen += numbers(x_0)
        labels += y.tolist()
    epochs = [seen[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(label in (number % 5, 5) for number, label in zip(seen, labels))  # its own label, or null


def test_labels_dropped_flips_and_stratified_t(use):
    use(BATCH_SIZE=25, ACCUM=2, LABEL_DROP=0.2)
    data, dropped, flipped, steps = numbered(), 0, 0, 80
    for step in range(steps):
        x_0, labels, t, eps = T.draw_batch(data, step)
        place = ((t - 0.001) / 0.999 * 50).floor().int()
        assert sorted(place.clamp(0, 49).tolist()) == list(range(50)) and 0 < t.min() and t.max() <= 1
        assert place.tolist() != sorted(place.tolist())  # no tie between t and the place in the batch
        dropped += int((labels == 5).sum())
        flipped += int((x_0[:, 1, 0, 0] < 0).sum())
    n = 50 * steps
    assert abs(dropped / n - 0.2) < 4 * math.sqrt(0.16 / n) and abs(flipped / n - 0.5) < 4 * math.sqrt(
        0.25 / n
    )
    use(LABEL_DROP=0.0, OVERFIT_TINY=50)
    x_0, labels, _, eps = T.draw_batch(data, 0)
    assert (labels < 5).all() and (x_0[:, 1, 0, 0] > 0).all()  # no flips where it should memorise
    assert abs(float(eps.mean())) < 0.1 and float(eps.std()) == pytest.approx(1, abs=0.05)


# ------------------------------------------------------------------------------------------------------------
# A small data set, and runs of a few steps through main() itself


def pictures(classes, each, side=8, seed=0):
    """uint8 (N, 3, side, side) in shuffled order, and labels: a colour and a stripe for each class, and
    noise."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(classes * each) % classes)
    grid = np.linspace(-1, 1, side)
    phase = rng.uniform(-0.5, 0.5, len(y))
    colour = np.stack([np.cos(2 * np.pi * (y / classes + k / 3)) for k in range(3)], 1)
    wave = np.where((y % 2)[:, None, None], grid[None, :, None], grid[None, None, :]) * np.ones(
        (1, side, side)
    )
    x = (
        0.5 * colour[:, :, None, None]
        + 0.4 * np.sin(3 * wave + phase[:, None, None])[:, None]
        + rng.normal(0, 0.1, (len(y), 3, side, side))
    )
    return ((x.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8), y


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images, labels = pictures(3, 80)
    np.savez(root / "own.npz", images=images, labels=labels, class_names=np.array(["red", "green", "blue"]))
    stl10.import_pictures(root / "own.npz", root / "own", size=None, test_share=0.3)
    return root / "own"


@pytest.fixture
def data(use, folder):
    use(**TINY)
    return T.load_data(folder, CPU)


@pytest.fixture
def train(use, folder, tmp_path, monkeypatch):
    """main() in this process with small settings; judge and reports are stubs unless asked for. -> run
    folder"""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    row = dict(value=1.0, floor=1.0, ceiling=None, better="lower", n=1)

    def run(name, **chosen):
        use(
            **{
                **TINY,
                "DATA": str(folder),
                "OUT": str(tmp_path / name),
                "RESUME": False,
                "EVAL_EVERY": 10**6,
                **chosen,
            }
        )
        T.main()
        return tmp_path / name / "stl10"

    metrics = dict.fromkeys(
        ("val_loss", "class_accuracy", "frechet", "recall", "label_gain", "memorised"), row
    )
    ref = SimpleNamespace(zero=np.ones(10), linear=np.ones(10), accuracy=1.0)
    monkeypatch.setattr(T, "prepare", lambda *_: (T.load_data(folder, CPU), None, ref))
    monkeypatch.setattr(T, "evaluate", lambda *_: None)

    def report(folder, *_):
        folder.mkdir()
        return metrics

    monkeypatch.setattr(T, "report", report)
    yield run
    for s, handler in handlers.items():
        signal.signal(s, handler)


def test_splits_do_not_meet(data, folder):
    keys = [{p.tobytes() for p in part.numpy()} for part in (data.x, data.val_x, data.test_x)]
    assert all(len(k) == len(p) for k, p in zip(keys, (data.x, data.val_x, data.test_x)))
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert set(data.val_y.tolist()) == {0, 1, 2} and data.names == ("red", "green", "blue")


def test_accumulation_equals_the_large_batch(train, monkeypatch):
    """2 x 32 = 1 x 64, through main(): the same gradients before the first steps, the same number of
    steps."""
    taken, grads = T.guarded_step, {}
    for name, batch, accum in (("one", 64, 1), ("two", 32, 2), ("four", 16, 4)):
        seen = []

        def spy(optimizer, parameters, *rest):
            seen.append([p.grad.clone() for p in parameters])
            return taken(optimizer, parameters, *rest)

        monkeypatch.setattr(T, "guarded_step", spy)
        run = train(name, BATCH_SIZE=batch, ACCUM=accum, EPOCHS=2, DROPOUT=0.0)
        grads[name] = seen, common.read_log(run / "log.csv")
    for name in ("two", "four"):
        assert len(grads[name][0]) == len(grads["one"][0]) == 4
        for a, b in zip(grads["one"][0][:3], grads[name][0][:3]):
            assert max(float((g - h).abs().max()) for g, h in zip(a, b)) < 1e-6
        assert np.allclose(grads["one"][1]["loss"], grads[name][1]["loss"], rtol=1e-5)


def test_learning_rate_counts_optimizer_steps(train):
    """Row 11: the notes' cosine counted micro-batches, so it ended at 54% of the peak."""
    last = {}
    for accum in (1, 4):
        run = train(f"accum{accum}", BATCH_SIZE=16 // accum, ACCUM=accum, EPOCHS=4, WARMUP=0.05)
        lr = common.read_log(run / "log.csv")["lr"]
        K, w = len(lr), max(1, int(0.05 * len(lr)))
        want = [
            min(1, (k + 1) / w) if k < w else 0.5 + 0.5 * math.cos(math.pi * (k - w) / (K - w))
            for k in range(K)
        ]
        assert K > 30 and np.allclose(lr / 2e-3, want, rtol=1e-5)
        last[accum] = lr[-1] / 2e-3
    assert last[1] == last[4] < 0.01
    assert common.lr_at(999, 1000, 1.0) < 1e-4 and common.lr_at(500, 1000, 1.0) == pytest.approx(
        0.541, abs=1e-3
    )


def test_without_tensorboard_one_line_and_training_goes_on(train, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = train("none", EPOCHS=1, TENSORBOARD=True)
    out = capsys.readouterr().out
    assert sum("tensorboard" in line and "=" in line and "needs" in line for line in out.splitlines()) == 1
    assert (run / "last.pt").exists() and not (run / "tensorboard").exists()


def test_with_tensorboard_files_appear(train):
    pytest.importorskip("tensorboard")
    run = train("board", EPOCHS=1, TENSORBOARD=True)
    assert list((run / "tensorboard").glob("events*"))


def test_overfits_eight_pictures(use, train, monkeypatch):
    """Memorise 8 pictures of four coloured squares, then draw each back from noise by its label alone."""
    g = torch.Generator().manual_seed(4)
    x = (
        torch.randint(0, 256, (8, 3, 2, 2), generator=g)
        .byte()
        .repeat_interleave(4, 2)
        .repeat_interleave(4, 3)
    )
    y = torch.arange(8)
    data = SimpleNamespace(
        x=x, y=y, val_x=x, val_y=y, test_x=x, test_y=y, names=tuple("abcdefgh"), hash="eight"
    )
    monkeypatch.setattr(T, "load_data", lambda *_: data)
    run = train(
        "tiny",
        OVERFIT_TINY=8,
        BATCH_SIZE=32,
        EPOCHS=350,
        WIDTH=16,
        DROPOUT=0.0,
        LABEL_DROP=0.1,
        LR=4e-3,
        EMA_DECAY=0.99,
        STEPS=20,
        GUIDANCE=1.0,
    )
    loss = common.read_log(run / "log.csv")["loss"]
    model = T.build_ema(common.load_checkpoint(run / "last.pt"), CPU)
    drawn = T.sample(model, y.repeat(4), range(32))
    distance, index = T.nearest(T.flat(drawn), T.flat(T.to_float(x)))
    print(
        f"loss {loss[0]:.3f} -> {loss[-50:].mean():.4f}, nearest rms {distance.median():.3f} max {distance.max():.3f}"
    )
    assert torch.equal(index[:, 0], y.repeat(4))  # the picture that the label stands for
    assert float(distance.median()) < 0.1 and loss[-50:].mean() < loss[0] / 8


# ------------------------------------------------------------------------------------------------------------
# Judge, reference rows, maps


def test_judge_beats_chance_and_is_kept_by_data(data, tmp_path, monkeypatch):
    judge = T.train_judge(data, tmp_path, CPU, steps=40, batch=32)
    _, p = T.judged(judge, T.to_float(data.test_x))
    accuracy = float((p.argmax(1) == data.test_y).float().mean())
    assert accuracy > 0.7, accuracy  # chance .33
    assert not judge.training and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(T.F, "cross_entropy", None)  # training again would fail
    again = T.train_judge(data, tmp_path, CPU, steps=40)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values()))
    with pytest.raises(TypeError):  # other data: another judge
        T.train_judge(SimpleNamespace(**{**vars(data), "hash": "other"}), tmp_path, CPU, steps=1)


def test_judge_of_eight_pictures_is_not_kept_for_all(use, data, folder, tmp_path):
    """OVERFIT_TINY is "the first thing to try": its judge must not stay for the run after it."""
    whole = T.train_judge(data, tmp_path, CPU, steps=2)
    use(OVERFIT_TINY=8)
    small = T.train_judge(T.load_data(folder, CPU), tmp_path, CPU, steps=2)
    assert not torch.equal(whole.head.weight, small.head.weight)


@pytest.mark.parametrize("size", [8, 24, 32])
def test_judge_shifts_do_not_wrap(use, monkeypatch, tmp_path, size):
    """The random shift may bring in the padded edge, never the opposite side."""
    use(SIZE=size)
    x = torch.zeros(4, 3, size, size, dtype=torch.uint8)
    x[..., : size // 2] = 255
    data = SimpleNamespace(x=x, y=torch.tensor([0, 1, 0, 1]), names=("a", "b"), hash="wrap")
    seen = []
    forward = T.Judge.forward
    monkeypatch.setattr(T.Judge, "forward", lambda self, x: (seen.append(x), forward(self, x))[1])
    T.train_judge(data, tmp_path, CPU, steps=12, batch=4)
    edges = torch.cat(seen)[:, 0, size // 2]
    assert ((edges[:, 0] - edges[:, -1]).abs() > 1.9).all()  # one side white, one black, whatever the shift


def gaussian_data(std, n=1200, side=4, seed=0):
    """Pictures of one Gaussian: independent channels and pixels with the given std each (side^2 * 3
    values)."""

    def draw(seed):
        x = torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (n, 3, side, side))) * std.view(
            3, side, side
        )
        return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()

    return SimpleNamespace(
        x=draw(seed),
        y=torch.arange(n) % 2,
        val_x=draw(seed + 1),
        val_y=torch.arange(n) % 2,
        test_x=draw(seed + 2)[:40],
        test_y=torch.arange(40) % 2,
        names=("a", "b"),
        hash="gauss",
    )


def test_reference_rows_on_a_true_gaussian(use):
    use(SIZE=4)
    std = torch.linspace(0.05, 0.35, 48, dtype=torch.float64)
    data = gaussian_data(std)
    ref = T.reference(data, T.Judge(2).eval())
    th = math.pi / 2 * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    a2, s2 = torch.cos(th)[:, None] ** 2, torch.sin(th)[:, None] ** 2
    buckets = [slice(i, i + 100) for i in range(0, 1000, 100)]
    power = float(T.to_float(data.val_x).square().mean())
    zero = (a2 + s2 * power).mean(1)
    linear = (std**2 / (a2 * std**2 + s2)).mean(1)  # E |x_0 - x_0_hat|^2 / s^2
    assert np.allclose(ref.zero, [float(zero[b].mean()) for b in buckets], rtol=1e-4)
    assert np.allclose(ref.linear, [float(linear[b].mean()) for b in buckets], rtol=0.08)
    assert (ref.linear < ref.zero).all()


def test_reference_rows_on_pictures(use, data):
    ref = T.reference(data, T.Judge(3).eval())
    # with fewer pictures (150) than values (192) the linear row can be the worse one at the least noise
    assert (ref.linear < ref.zero)[1:].all() and ref.linear.mean() < 0.5 * ref.zero.mean()
    assert ref.soup.shape == ref.test.shape == (len(data.test_x), 64)


def test_label_gain_has_the_right_sign(use):
    """losses_by_t on two classes with exact scores: the label helps; with swapped labels it hurts; and the
    value is the analytic one."""
    use(SIZE=4, SEED=1)
    n = 400
    y = torch.arange(n) % 2
    x = 0.5 * (1 - 2 * y.view(-1, 1, 1, 1)) + 0.2 * randn(n, 3, 4, 4, seed=8)
    data = SimpleNamespace(val_x=((x.clamp(-1, 1) + 1) * 127.5).round().byte(), val_y=y, names=("+", "-"))
    right, wrong = T.losses_by_t(TwoClasses(), data), T.losses_by_t(TwoClasses(swap=True), data)
    assert (
        right.shape == (3, 10) and (right[1] - right[0])[2:].min() > 0 and (right[2] - right[0])[2:].min() > 0
    )
    assert (wrong[1] - wrong[0])[2:].max() < 0
    th = math.pi / 2 * (np.arange(1000) + 0.5) / 1000
    want = (0.04 / (0.04 * np.cos(th) ** 2 + np.sin(th) ** 2)).reshape(10, 100).mean(1)
    assert np.allclose(right[0], want, rtol=0.12, atol=0.003), right[0] / want
    use(MIN_SNR=5.0)  # the weights of training do not change what is measured: its floors have none
    again = T.losses_by_t(TwoClasses(), data)
    assert np.allclose(again, right, rtol=1e-12)


def test_maps_are_deterministic_and_separate_blobs():
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 15)
    x = rng.normal(0, 0.3, (45, 8)) + 4 * np.eye(8)[label]
    before = np.random.get_state()[1].copy()
    for y in (T.tsne(x, perplexity=8), T.pca(x)):
        centre = np.stack([y[label == k].mean(0) for k in range(3)])
        spread = max(np.linalg.norm(y[label == k] - centre[k], axis=1).max() for k in range(3))
        gap = min(np.linalg.norm(centre[i] - centre[j]) for i in range(3) for j in range(i))
        assert y.shape == (45, 2) and np.isfinite(y).all() and gap > 2 * spread, (gap, spread)
    assert np.array_equal(T.tsne(x, 8), T.tsne(x.copy(), 8)) and np.array_equal(T.pca(x), T.pca(x.copy()))
    assert (before == np.random.get_state()[1]).all()
    y = T.pca(x)
    assert (y[np.abs(y).argmax(0), [0, 1]] > 0).all()
    assert np.isfinite(T.tsne(rng.normal(size=(11, 16)), perplexity=3)).all()  # the label table


# ------------------------------------------------------------------------------------------------------------
# One real run: what the run drew, sample.py draws again, to the bit


def python(*arguments, code=0):
    environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MPLBACKEND="Agg")
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Two epochs of a tiny network with everything switched on. -> run folder"""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "SIZE", 8)
        (out / "cache").mkdir()
        T.train_judge(
            T.load_data(folder, CPU), out / "cache", CPU, steps=40, batch=32
        )  # cached: the run need not
    flags = [f"{k}={v}" for k, v in {**TINY, "DATA": folder, "OUT": out, "EPOCHS": 2}.items()]
    python(ROOT / "train_stl10.py", *flags)
    return out / "stl10"


def settle(use, checkpoint):
    use(**{k: v for k, v in checkpoint["settings"].items() if getattr(T, k) != v})


def test_inference_full_equals_the_report(run):
    python("sample.py", "--checkpoint", run / "last.pt", "--full")
    epoch, full = run / "epoch_0002", run / "full"
    names = sorted(p.name for p in epoch.iterdir())
    assert names == sorted(p.name for p in full.iterdir())
    wanted = "grid collage recon recon_sweep onestep loss_by_t sweep sweep_pictures neighbours labels features confusion schedule curves"
    assert {f"{w}.{e}" for w in wanted.split() for e in ("npy", "png")} | {
        "metrics.json",
        "samples_u8.npy",
    } == set(names)
    different = [n for n in names if (epoch / n).read_bytes() != (full / n).read_bytes()]
    assert not different, different
    metrics = json.loads((epoch / "metrics.json").read_text())
    assert all(set(m) == {"value", "floor", "ceiling", "better", "n"} for m in metrics.values())
    assert all(math.isfinite(m["value"]) for m in metrics.values())
    assert json.loads((run / "metrics.json").read_text()).items() >= metrics.items()
    u8 = np.load(epoch / "samples_u8.npy")
    assert u8.shape == (20, 3, 8, 8) and u8.dtype == np.uint8


def test_monitor_metrics_and_sample_py_agree(run, use, tmp_path):
    """Row 2: one sampler for all. The class grid of the run, sample.py, and a call from here: the same
    bits."""
    python("sample.py", "--checkpoint", run / "last.pt", "--out", tmp_path / "a", "--num-samples", 8)
    grid, drawn = np.load(run / "epoch_0002" / "grid.npy"), np.load(tmp_path / "a" / "samples.npy")
    assert grid.shape == (4 * 8, 3, 8, 8) and np.array_equal(grid, drawn)
    checkpoint = common.load_checkpoint(run / "last.pt")
    settle(use, checkpoint)
    model = T.build_ema(checkpoint, CPU)
    seeds = [common.seed_of(0, "grid", i) for i in range(8)]
    assert np.array_equal(T.sample(model, torch.arange(4).repeat_interleave(8), seeds * 4).numpy(), grid)
    x = T.sample(model, torch.arange(20) % 3, [common.seed_of(0, "metrics", i) for i in range(20)])
    assert np.array_equal(
        ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy(), np.load(run / "epoch_0002" / "samples_u8.npy")
    )
    # one class, asked for alone: the same pictures in another batch
    T.save_samples(checkpoint, tmp_path / "b", "green", 3, 0)
    assert np.abs(np.load(tmp_path / "b" / "samples.npy") - grid[8:11]).max() <= 1e-5
    arr = np.load(tmp_path / "b" / "samples.npz")["arr_0"]
    assert arr.shape == (3, 8, 8, 3) and arr.dtype == np.uint8
    T.save_samples(checkpoint, tmp_path / "c", "green", 3, 1)
    assert np.abs(np.load(tmp_path / "c" / "samples.npy") - grid[8:11]).max() > 1e-3  # another seed
    with pytest.raises(SystemExit):
        T.save_samples(checkpoint, tmp_path / "d", "zebra", 1, 0)


def test_report_leaves_the_random_numbers_alone(run, use, tmp_path, monkeypatch):
    """Row 13: the notes' monitor reseeded the global generator, so training noise repeated."""
    checkpoint = common.load_checkpoint(run / "last.pt")
    settle(use, checkpoint)
    monkeypatch.setattr(T, "tile", lambda *_, **__: None)
    model, data = T.build_ema(checkpoint, CPU), T.load_data(Path(T.DATA), CPU)
    judge = T.train_judge(data, run.parent / "cache", CPU)
    torch.manual_seed(11)

    def state():
        return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes(), random.getstate()

    before = state()
    ref = T.reference(data, judge)
    assert state() == before
    metrics = T.report(tmp_path, model, data, judge, ref, 2, 20)
    assert state() == before
    assert (
        metrics["val_loss"]["value"]
        == json.loads((run / "epoch_0002" / "metrics.json").read_text())["val_loss"]["value"]
    )
    torch.manual_seed(12)
    assert T.evaluate(model, data, judge, ref, 20)[0] == metrics  # and does not read them either


def test_a_checkpoint_without_labels_is_refused(run, use):
    """Rows 7 and 8: what does not fit ends the program; nothing is loaded by halves."""
    checkpoint = common.load_checkpoint(run / "last.pt")
    settle(use, checkpoint)
    del checkpoint["ema"]["label.weight"]
    with pytest.raises(SystemExit):
        T.build_ema(checkpoint, CPU)


@pytest.mark.parametrize(
    "name, value",
    [
        ("SIZE", 10),
        ("ATTENTION", (True,)),
        ("WIDTH", 12),
        ("SOLVER", "euler"),
        ("CLIP_X0", "off"),
        ("SCHEDULE", "sigmoid"),
        ("PRECISION", "fp16"),
        ("EPOCHS", 0),
        ("BATCH_SIZE", 0),
        ("STEPS", 0),
        ("SAMPLES", 9),
        ("OVERFIT_TINY", 3),
        ("OVERFIT_TINY", -8),
    ],
)
def test_settings_that_cannot_work_end_in_one_line(use, capsys, name, value):
    T.check_settings()
    use(**{name: value})
    with pytest.raises(SystemExit) as stop:
        T.check_settings()
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and name in line
