"""train_3d_rflow.py against closed forms: Gaussian voxels whose flow is known, solvers of stated orders,
numbers that must get worse when volumes do, whole runs of a second, and the lab notes' faults, planted."""

import copy
import functools
import gzip
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import metrics
import train_3d_rflow as rf
from conftest import AT_CALL, ROOT, fork, log, refused, state, torchrun
from data import volumes

CPU = torch.device("cpu")
NET = dict(WIDTH=8, MULTS=(1, 1), BLOCKS=(1, 1), ATTENTION=(False, True), PATCH=1, DIM=24, DEPTH=1, HEADS=2)
PLAIN = {name: getattr(rf, name) for name in NET}  # as in the script
SMALL = dict(NET, SHAPE=(16, 16, 16), TRAIN=16, VAL=4, TEST=8, SAMPLES=8, BATCH_SIZE=4, PRECISION="fp32",
             TRIES=1)
CORNERS = (8, 12, 16)  # D, H, W that cannot be confused
TINY = ("WIDTH=8 MULTS=1,1 BLOCKS=1,1 ATTENTION=False,True SHAPE=8,12,16 TRAIN=12 VAL=4 TEST=8 SAMPLES=8 "
        "BATCH_SIZE=4 STEPS=3 PRECISION=fp32 TRIES=1").split()  # 3 steps an epoch, each 0.01 s or so
ORDERS = dict(euler=1, midpoint=2, heun2=2, heun3=3, rk4=4, fehlberg2=2, bosh3=3, dopri5=5, dopri8=8)
STAGES = dict(euler=1, midpoint=2, heun2=2, heun3=3, rk4=4)  # of the fixed solvers
ADAPTIVE = ("fehlberg2", "bosh3", "dopri5", "dopri8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """OUT of this file, whose cache all runs share."""
    folder = tmp_path_factory.mktemp("rflow")
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def use(monkeypatch, home):
    """Put settings into the script, as override() does, until the end of the test; small ones at first."""
    def put(**chosen):
        for name, value in chosen.items():
            assert type(getattr(rf, name)) is type(value), name
            monkeypatch.setattr(rf, name, value)
    put(**SMALL, OUT=str(home))
    return put


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def flow(channels=1, masks=0, mu=None, sigma=None, seed=0):
    """A fresh network for voxels of mean mu and std sigma (C, D, H, W)."""
    torch.manual_seed(seed)
    mu = torch.full((channels, *rf.SHAPE), 0.4) if mu is None else mu
    sigma = torch.full((channels, *rf.SHAPE), 0.5) if sigma is None else sigma
    return rf.Flow(channels, masks, mu, sigma).eval().requires_grad_(False)


def alive(model):
    """What starts at zero is drawn, so that everything matters."""
    for i, p in enumerate(model.parameters()):
        if not p.any():
            p.data = 0.2 * randn(*p.shape, seed=i)
    return model


class Says(nn.Module):
    """A network that returns what it was given beforehand, and keeps what it was asked."""

    def __init__(self, answer, time_dim=256):
        super().__init__()
        self.answer, self.time_dim, self.asked = answer, time_dim, []

    def forward(self, x, t, vector=None):
        self.asked.append(x)
        return self.answer


def wide(t):
    return t.view(-1, 1, 1, 1, 1)


# ---------------------------------------------------------------- x_t, v, t
def test_identities(use):
    """x_t - t v = x_0, x_t + (1 - t) v = eps, t = 0 is data, t = 1 is noise; loss_fn's target is this v."""
    x_0, eps = (randn(6, 1, 4, 4, 4, seed=i, dtype=torch.float64) for i in (0, 1))
    t = torch.tensor([0, 1e-3, 0.2, 0.5, 0.9, 1], dtype=torch.float64)
    seen = {}
    for prediction in ("velocity", "residual"):
        use(PREDICTION=prediction)

        def model(x, t, **condition):
            seen.update(x=x, t=t)
            return wide(t) * x
        loss = rf.loss_fn(model, x_0, t, eps)
        x_t, v = seen["x"], eps - x_0
        assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[-1], eps[-1])
        assert (x_t - wide(t) * v - x_0).abs().max() < 1e-12
        assert (x_t + wide(1 - t) * v - eps).abs().max() < 1e-12
        assert torch.allclose(loss, (wide(t) * x_t - v).square().mean((1, 2, 3, 4)), rtol=1e-12)
        guess = x_t - wide(t) * wide(t) * x_t  # MSE(x_0_hat) = t^2 MSE(v_hat)
        assert torch.allclose((guess - x_0).square().mean((1, 2, 3, 4)), t**2 * loss, atol=1e-12)
    weight = rand(6, 1, 4, 4, 4).double()
    weighted = rf.loss_fn(lambda x, t: 0 * x, x_0, t, eps, weight=weight)
    assert torch.allclose(weighted, (weight * v.square()).mean((1, 2, 3, 4)), rtol=1e-12)


def test_what_the_network_says_means_what_prediction_states(use):
    """A network that knows the answer has no loss, in each of the three parameterisations and at every t."""
    use(SHAPE=(4, 4, 4), T_CLIP=0.05)
    x_0, eps = rand(6, 1, 4, 4, 4), randn(6, 1, 4, 4, 4)
    t = torch.tensor([0.001, 0.03, 0.05, 0.4, 0.99, 1])
    mu, sigma = 0.2 + 0.5 * rand(1, 4, 4, 4, seed=1), 0.2 + rand(1, 4, 4, 4, seed=2)
    s, v, x_t = wide(t), eps - x_0, wide(1 - t) * x_0 + wide(t) * eps
    Q = (1 - s) ** 2 * sigma**2 + s**2
    linear = -mu + (s - (1 - s) * sigma**2) / Q * (x_t - (1 - s) * mu)
    answers = dict(velocity=v, x0=x_0, residual=(v - linear) * Q.sqrt() / sigma)
    for prediction, answer in answers.items():
        use(PREDICTION=prediction)
        model = flow(mu=mu, sigma=sigma)
        model.net = Says(answer)
        assert rf.loss_fn(model, x_0, t, eps).max() < 1e-6, prediction
        if prediction == "residual":  # and it reads a normalised x_t
            assert torch.allclose(model.net.asked[0], (x_t - (1 - s) * mu) / Q.sqrt(), atol=1e-5)
    use(PREDICTION="x0")
    model = flow(mu=mu, sigma=sigma)
    model.net = Says(x_0 + 1)  # off by 1: v is off by 1 / t, below T_CLIP by 1 / T_CLIP
    assert torch.allclose(rf.loss_fn(model, x_0, t, eps), 1 / t.clamp(min=0.05) ** 2, rtol=1e-4)


def test_times_have_their_distribution(use):
    n = 400_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    use(TIME="uniform", SHIFT=1.0)
    assert torch.equal(rf.time_of(u), u)
    use(TIME="logit-normal")
    t = rf.time_of(u)
    assert torch.allclose(torch.logit(t).quantile(torch.tensor([0.1587, 0.5, 0.8413]).double()),
                          torch.tensor([-1.0, 0, 1]).double(), atol=2e-3)
    masses = {0.04: 7.4e-4, 0.02: 5.0e-5}  # how rarely it looks at the end that the sampler needs
    for low, share in masses.items():
        assert abs(float((t < low).double().mean()) / share - 1) < 0.03
    use(TIME="mixture")
    t = rf.time_of(u)
    for low, share in masses.items():
        assert abs(float((t < low).double().mean()) / (0.8 * share + 0.2 * low) - 1) < 0.01
    assert abs(float(t.mean()) - 0.5) < 1e-3 and t.min() >= 0 and t.max() <= 1
    for shift in (1.5, 2.0, 6.84):
        use(SHIFT=shift, TIME="uniform")
        assert torch.allclose(rf.time_of(u), shift * u / (1 + (shift - 1) * u))
    use(SHIFT=2.0)
    assert abs(float(rf.time_of(u).mean()) - 2 * (1 - math.log(2))) < 1e-4
    for name in ("uniform", "logit-normal", "mixture"):  # the ends of float32 stay inside
        use(TIME=name)
        ends = rf.time_of(torch.tensor([0.0, 0.8, 1 - 2**-24]))
        assert ends.isfinite().all() and ends.min() >= 0 and ends.max() <= 1


def test_times_are_stratified_over_the_batch(use):
    """One uniform number in each n-th of (0, 1), in random order, through ACCUM too."""
    use(MODE="image", TIME="uniform", BATCH_SIZE=8, ACCUM=2)
    data, orders = rf.load_data(), set()
    for step in range(4):
        batch, = rf.draw_batch(data, step)
        places = (16 * batch["t"]).long()
        assert places.sort().values.tolist() == list(range(16)) and batch["x_0"].shape == (16, 1, 16, 16, 16)
        orders.add(tuple(places.tolist()))
    assert len(orders) == 4


def test_batches_are_a_function_of_the_step_and_epochs_see_every_volume_once(use):
    use(MODE="image", BATCH_SIZE=5)
    data = rf.load_data()
    at = {rf.target(data.train, [i]).sum().item(): i for i in range(16)}
    order = [at[x.sum().item()] for step in range(16) for x in rf.draw_batch(data, step)[0]["x_0"]]
    for begin in range(0, 80, 16):  # an epoch ends inside of a batch
        assert sorted(order[begin:begin + 16]) == list(range(16))
    assert order[:16] != order[16:32]
    wanted, again, other = (rf.draw_batch(data, 3, attempt)[0] for attempt in (0, 0, 1))
    assert all(torch.equal(wanted[k], again[k]) for k in wanted)
    assert not torch.equal(wanted["eps"], other["eps"]) and not torch.equal(wanted["x_0"], other["x_0"])


# ---------------------------------------------------------------- Gaussian voxels: everything is known
def exact(x, t, m, s):
    """The best v for x_0 ~ N(m, s^2)."""
    return -m + (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * (x - (1 - t) * m)


class Gaussian(nn.Module):
    """That v as a model; it counts the volumes it was asked about."""

    def __init__(self, m=0.5, s=0.05, shape=(4, 4, 4)):
        super().__init__()
        self.m, self.s, self.asked = m, s, 0
        self.register_buffer("mu", torch.zeros(1, 1, *shape))

    def forward(self, x, t, **condition):
        self.asked += len(x)
        return exact(x, wide(t), self.m, self.s)


@pytest.mark.parametrize("prediction", ("velocity", "x0"))
def test_the_exact_velocity_is_the_minimum_of_the_loss(use, prediction):
    """Its loss is s^2 / Q, and whatever is added to it comes on top as its square."""
    use(PREDICTION=prediction, T_CLIP=0.05)
    m, s, n = 0.4, 0.5, 2**15
    t = torch.tensor([0.1, 0.4, 0.75, 1.0], dtype=torch.float64)
    x_0 = m + s * randn(4, 1, 32, 32, 32, dtype=torch.float64)
    eps = randn(4, 1, 32, 32, 32, seed=1, dtype=torch.float64)
    Q = (1 - t) ** 2 * s**2 + t**2
    best = rf.loss_fn(lambda x, t: exact(x, wide(t), m, s), x_0, t, eps)
    assert ((best * Q / s**2 - 1).abs() < 4 * (2 / n) ** 0.5).all()
    for wrong in (lambda x: 0.1 + 0 * x, lambda x: 0 * x - 0.1, lambda x: 0.1 * x, lambda x: -0.1 * x,
                  lambda x: 0.1 * x**2, lambda x: 0.1 * (20 * x).sin()):
        loss = rf.loss_fn(lambda x, t: exact(x, wide(t), m, s) + wrong(x), x_0, t, eps)
        x_t = wide(1 - t) * x_0 + wide(t) * eps
        added = wrong(x_t).square().mean((1, 2, 3, 4))
        assert (loss > best).all()
        assert torch.allclose(loss - best, added, atol=8 * float((best * added / n).max().sqrt()))


def test_euler_has_the_stated_error_on_the_gaussian_flow():
    x, m, s = torch.tensor([[-1.5], [-0.3], [0.2], [1.7]], dtype=torch.float64), 0.4, 0.5
    for steps, stated in ((25, 0.049), (100, 0.0125), (1000, 0.00126)):
        found = rf.solve_fixed(lambda x, t, rows: exact(x, t[:, None], m, s), x, "euler", steps)
        assert abs(float((found - (m + s * x)).abs().max()) / stated - 1) < 0.03


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize("end", (0.0, 0.02))
def test_sampling_follows_the_exact_flow(use, solver, end):
    """x(t) = (1 - t) m + sqrt(Q) x(1); at T_END one straight step to 0. Values stay inside of [0, 1]. The
    evaluations that sample() states are those that were made."""
    use(MODE="image", T_END=end, STEPS=400 if solver == "euler" else 50, SOLVER=solver, TOLERANCE=1e-6)
    model, m, s = Gaussian(), 0.5, 0.05
    path = []
    x, asked = rf.sample(model, [3, 4, 5], {}, path=path)
    z = path[0][2].double()
    x_end = (1 - end) * m + ((1 - end) ** 2 * s**2 + end**2) ** 0.5 * z
    want = x_end - end * exact(x_end, end, m, s)
    assert (x - want).abs().max() < (0.004 if solver in ("euler", "heun2") else 5e-4), (x - want).abs().max()
    assert asked == model.asked / 3 and len(path) > 2 and abs(float(z.std()) - 1) < 0.2
    if solver in STAGES:
        assert asked == STAGES[solver] * rf.STEPS + (end > 0)
    # the noise of a volume belongs to its seed, and the global numbers are left alone
    before = torch.get_rng_state()
    alone = rf.sample(model, [4], {})[0]
    assert torch.equal(before, torch.get_rng_state()) and (alone - x[1:2]).abs().max() < 1e-6


def test_samples_are_inside_their_range(use):
    use(MODE="image", STEPS=20)
    x = rf.sample(Gaussian(0.5, 1.0), [1, 2], {})[0]
    assert x.min() == 0 and x.max() == 1 and ((x > 0) & (x < 1)).any()
    use(MODE="seg")
    assert set(rf.sample(Gaussian(0.5, 1.0), [1, 2], {})[0].unique().tolist()) == {0.0, 1.0}


FLOORS = {  # sigma -> mean of sigma^2 / Q under each distribution of t
    "uniform": (0.0314, 0.157, 0.393, 0.444, 1.571), "logit-normal": (0.0044, 0.081, 0.328, 0.390, 1.742),
    "mixture": (0.0098, 0.096, 0.341, 0.401, 1.707)}


@pytest.mark.parametrize("name", FLOORS)
def test_linear_floor_has_the_stated_values(use, name):
    use(TIME=name, SHIFT=1.0)
    t = rf.time_of((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    for sigma, stated in zip((0.02, 0.1, 0.25, 0.283, 1.0), FLOORS[name]):
        floor = float(rf.linear_floor(torch.zeros(1), torch.tensor([sigma]).double(), t).mean())
        assert abs(floor - stated) < 0.01 * stated + 5e-5
        assert name != "uniform" or abs(floor / (math.pi / 2 * sigma) - 1) < 1e-3


def test_linear_floor_is_what_a_regression_leaves():
    """Monte Carlo: the best slope and offset of each voxel, fitted to draws, leave sigma^2 / Q."""
    sigma, mu = torch.tensor([0.05, 0.3, 1.2]).double(), torch.tensor([0.7, 0.1, -0.4]).double()
    x_0 = mu + sigma * randn(200_000, 3, dtype=torch.float64)
    eps = randn(200_000, 3, seed=1, dtype=torch.float64)
    for t in (0.05, 0.3, 0.9):
        x_t, v = (1 - t) * x_0 + t * eps, eps - x_0
        slope = ((x_t - x_t.mean(0)) * (v - v.mean(0))).mean(0) / x_t.var(0, correction=0)
        left = v.var(0, correction=0) - slope**2 * x_t.var(0, correction=0)
        for i in range(3):
            floor = float(rf.linear_floor(mu[i:i + 1], sigma[i:i + 1], torch.tensor([t])))
            assert abs(float(left[i]) / floor - 1) < 0.01
        both = float(rf.linear_floor(mu.view(3, 1, 1, 1), sigma.view(3, 1, 1, 1), torch.tensor([t])))
        assert abs(float(left.mean()) / both - 1) < 0.01


def test_first_losses(use):
    """residual: the linear floor; velocity: 1 + E x_0^2, the zero predictor; x0: E x_0^2 / t^2."""
    use(SHAPE=(8, 8, 8))
    sigma, mu = 0.2 + rand(1, 8, 8, 8, seed=1), rand(1, 8, 8, 8, seed=2)
    n = 64
    x_0, eps = mu + sigma * randn(n, 1, 8, 8, 8), randn(n, 1, 8, 8, 8, seed=3)
    t = torch.full((n,), 0.3)
    for prediction, want in (("residual", float(rf.linear_floor(mu, sigma, t[:1]))),
                             ("velocity", 1 + float((mu**2 + sigma**2).mean())),
                             ("x0", float((mu**2 + sigma**2).mean()) * (1 / 0.3) ** 2)):
        use(PREDICTION=prediction)
        first = float(rf.loss_fn(flow(mu=mu, sigma=sigma), x_0, t, eps).mean())
        assert abs(first / want - 1) < 0.03, prediction
    use(PREDICTION="residual")
    x_t = 0.7 * x_0 + 0.3 * eps
    Q = 0.49 * sigma**2 + 0.09
    linear = -mu + (0.3 - 0.7 * sigma**2) / Q * (x_t - 0.7 * mu)
    assert torch.allclose(flow(mu=mu, sigma=sigma)(x_t, t), linear, atol=1e-5)


@pytest.mark.parametrize("mode, augment", (("bravo", "none"), ("bravo", "scoreaug"), ("bravo", "sda"),
                                           ("seg", "none")))
def test_a_fresh_network_starts_below_the_zero_predictor(use, mode, augment):
    """On real batches: voxels that hardly vary make the linear guess steep, and what is moved there, or a
    lesion where no training mask has one, must not blow the loss up."""
    use(MODE=mode, AUGMENT=augment, PREDICTION="residual")
    data = rf.load_data()
    data.sigma[:, :, :2] = data.mu[:, :, :2] = 0  # as after skull stripping
    data.train.images = np.array(data.train.images)
    data.train.images[:, :, :2] = 0
    model = rf.build_model(data)
    with torch.no_grad():
        losses = [rf.loss_fn(model, **b) for step in range(12) for b in rf.draw_batch(data, step)]
    assert torch.cat(losses).mean() < 0.5 and torch.cat(losses).max() < 5, torch.cat(losses).max()


def test_validation_loss_is_the_mean_over_its_volumes(use):
    """The same noise every time, each volume its own row, also where there are fewer than asked for."""
    use(MODE="image", PREDICTION="velocity", SHAPE=(16, 16, 16))
    data = rf.load_data()
    model, ref = flow(mu=data.mu, sigma=data.sigma), SimpleNamespace(t=(torch.arange(16) + 0.5) / 16)
    for count in (32, 4, 2):
        table = rf.loss_by_time(model, data, ref, count=count)
        assert table.shape == (min(count, 4), 16)
        for row in table:  # a network that says 0: 1 + mean x_0^2 of one volume at every t
            assert abs(row - (1 + float(rf.target(data.val, range(4)).square().mean()))).max() < 0.15
    assert np.array_equal(table, rf.loss_by_time(model, data, ref, count=2))
    assert len({round(float(r.mean()), 6) for r in rf.loss_by_time(model, data, ref)}) == 4
    for n, count in ((4, 32), (8, 32), (10, 4), (7, 7), (51, 25)):
        picked = rf.spread(n, count)
        assert len(set(picked)) == len(picked) == min(n, count) and max(picked) < n


@pytest.mark.parametrize("clip", (0.05, 0.2))
def test_validation_loss_does_not_hang_on_t_clip(use, clip):
    """A network whose x_0_hat is 0 has the error x_0^2 / t^2, at every t."""
    use(MODE="image", PREDICTION="x0", T_CLIP=clip)
    data, t = rf.load_data(), (torch.arange(16) + 0.5) / 16
    model = flow(mu=data.mu, sigma=data.sigma)
    model.net = Says(torch.zeros(8, 1, *rf.SHAPE))
    table = rf.loss_by_time(model, data, SimpleNamespace(t=t))
    square = rf.target(data.val, range(4)).square().mean((1, 2, 3, 4))
    np.testing.assert_allclose(table, square[:, None] / t.square(), rtol=1e-5)


# ---------------------------------------------------------------- solvers
def problem(x, t, rows=None):
    """y0' = 1.3 y0 cos s, y1' = -y1^2 + y0 sin 3s in s = 1 - t, so dx/dt = -y'."""
    s, (a, b) = 1 - t, x.unbind(1)
    return -torch.stack([1.3 * a * s.cos(), -b**2 + a * (3 * s).sin()], 1)


def order_of(method, start, counts):
    truth = rf.solve_fixed(problem, start, "dopri8", 96)
    assert abs(float(truth[0, 0]) - float(start[0, 0]) * math.exp(1.3 * math.sin(1))) < 1e-12
    errors = [float((rf.solve_fixed(problem, start, method, n) - truth).abs().max()) for n in counts]
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("method", ORDERS)
def test_solvers_have_their_order(method):
    start = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    p = order_of(method, start, (2, 4, 8, 16) if method.startswith("dopri") else (8, 16, 32, 64))
    assert p > ORDERS[method] - 0.35, p
    if not method.startswith("dopri"):  # those two come out better than they promise
        assert abs(p - ORDERS[method]) < 0.15, p


def test_the_methods_inside_have_one_order_less_or_more():
    """The weights of the error estimate: sum 0, so a constant slope has none; bosh3, dopri5 and dopri8 then
    compare with a method of order 2, 4 and 7, fehlberg2 with order 1."""
    for name, stated in dict(fehlberg2=2, bosh3=3, dopri5=5, dopri8=8).items():
        m = rf.methods[name]
        assert abs(sum(m.error)) < 1e-14
        errors = []
        for n in (2, 4, 8) if name == "dopri8" else (16, 32, 64):
            x, t = torch.tensor([[1.0, 0.5]], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
            errors.append(rf.rk_step(problem, x, t, t / n, torch.arange(1), name)[1].abs().max())
        p = math.log2(errors[-2] / errors[-1])  # one step of a method of order q errs by h^(q + 1)
        assert stated - 0.35 < p < stated + 0.65, (name, p)


NODES = dict(
    euler=[0], midpoint=[0, 1 / 2], heun2=[0, 1], heun3=[0, 1 / 3, 2 / 3], rk4=[0, 1 / 3, 2 / 3, 1],
    fehlberg2=[0, 1 / 2, 1], bosh3=[0, 1 / 2, 3 / 4, 1],
    dopri5=[0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
    dopri8=[0, 1 / 18, 1 / 12, 1 / 8, 5 / 16, 3 / 8, 59 / 400, 93 / 200, 5490023248 / 9719169821, 13 / 20,
            1201146811 / 1299019798, 1, 1])


@pytest.mark.parametrize("method", NODES)
def test_tableaus(method):
    """sum b = 1, row sums are the stated nodes, b.c = 1/2 and b.c^2 = 1/3 from order 2 and 3 on."""
    m = rf.methods[method]
    assert m.order == ORDERS[method] and len(m.rows) == len(m.b) == len(m.c)
    assert abs(sum(m.b) - 1) < 1e-12 and np.allclose(m.c, NODES[method], atol=1e-12, rtol=0)
    for power in range(2, min(m.order, 4) + 1):
        assert abs(sum(b * c ** (power - 1) for b, c in zip(m.b, m.c)) - 1 / power) < 1e-9
    assert set(rf.methods) == set(ORDERS)


def test_a_solver_asks_where_it_should():
    """euler, midpoint and heun3 never look at the end of a step, where the last one would be untrained."""
    for method, nodes in NODES.items():
        seen = []
        rf.solve_fixed(lambda x, t, rows: seen.append(float(t[0])) or 0 * x, torch.zeros(1, 1).double(),
                       method, 2, end=0.1)
        want = [begin - c * 0.45 for begin in (1, 0.55) for c in nodes]
        assert np.allclose(seen, want, atol=1e-9) and (min(seen) > 0.11) == (max(nodes) < 1), method


RATES = torch.tensor([0.3, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def decay(x, t, rows):
    """Each sample at its own pace: dx/dt = rate (x - cos 5t)."""
    return RATES[rows, None] * (x - (5 * t[:, None]).cos())


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("end", (0.0, 0.02))
def test_adaptive_solvers_stay_inside_and_keep_their_tolerance(method, end):
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        for dtype in (torch.float64, torch.float32):
            low, x = [], randn(8, 3, dtype=dtype)

            def f(x, t, rows):
                low.append(float(t.min()))
                assert x.dtype == t.dtype == dtype and t.max() <= 1
                return decay(x, t, rows).to(dtype)
            found = rf.solve_adaptive(f, x, method, tolerance, end)
            assert min(low) >= end - (1e-6 if dtype == torch.float32 else 1e-12), min(low)
            assert found.isfinite().all()
        truth = rf.solve_fixed(decay, randn(8, 3, dtype=torch.float32).double(), "dopri8", 60, end)
        errors.append(float((found - truth).abs().max()))
    assert errors[2] < 0.02 and errors[2] < errors[0], errors


def test_a_batch_gives_what_its_samples_give_alone():
    x = randn(8, 3, dtype=torch.float64)
    for method in ADAPTIVE:
        counts = torch.zeros(9, dtype=torch.long)

        def counted(x, t, rows):
            counts[rows] += 1
            return decay(x, t, rows)
        together = rf.solve_adaptive(counted, x, method, 1e-3)
        batch, counts = counts[:8].tolist(), torch.zeros(9, dtype=torch.long)
        for i in range(8):
            def one(x, t, rows, i=i):
                counts[i] += 1
                return decay(x, t, rows + i)
            alone = rf.solve_adaptive(one, x[i:i + 1], method, 1e-3)
            assert (alone - together[i:i + 1]).abs().max() < 1e-12, (method, i)
        assert counts[:8].tolist() == batch and len(set(batch)) > 1
        coupled = rf.solve_adaptive(decay, x, method, 1e-3, together=True)
        assert 1e-7 < (coupled - together).abs().max() < 0.5


def test_a_field_that_cannot_be_solved_ends():
    """Neither NaN nor a wall may keep the solver busy for ever."""
    for field in (lambda x, t, rows: x * math.nan, lambda x, t, rows: 1e12 * (1e6 * t[:, None]).sin() + x):
        calls = []

        def f(x, t, rows):
            calls.append(1)
            return field(x, t, rows)
        with pytest.raises(RuntimeError):
            rf.solve_adaptive(f, torch.ones(2, 1).double(), "bosh3", 1e-6, limit=200)
        assert len(calls) <= 4 * 202
    calls = []
    with pytest.raises(RuntimeError):
        rf.solve_adaptive(lambda x, t, rows: calls.append(1) or x * math.nan, torch.ones(1, 1), "bosh3", 1e-3)
    assert len(calls) < 200  # a network of NaN is noticed, not asked ten thousand times


@pytest.mark.parametrize("method", STAGES)
def test_fixed_solvers_equal_torchdiffeq(method):
    odeint = pytest.importorskip("torchdiffeq").odeint
    x = rand(4, 2).double()  # below 0 this problem runs away
    times = torch.linspace(1, 0.02, 11, dtype=torch.float64)
    theirs = odeint(lambda t, x: problem(x, t.expand(4)), x, times, method=method)
    assert (theirs[-1] - rf.solve_fixed(problem, x, method, 10, 0.02)).abs().max() < 1e-5


@pytest.mark.parametrize("solver, guidance, end", (
    ("euler", 1.0, 0.0), ("heun3", 2.0, 0.02), ("dopri5", 2.0, 0.02), ("fehlberg2", 1.0, 0.02),
    ("dopri8", 1.0, 0.0)))
def test_evaluations_are_counted(use, solver, guidance, end):
    use(MODE="seg_conditioned", GUIDANCE=guidance, T_END=end, STEPS=4, TOLERANCE=1e-3)
    model = Gaussian(0.3, 0.2)
    asked = rf.sample(model, [0, 1, 2], dict(counts=torch.zeros(3, 7, dtype=torch.long)), solver=solver)[1]
    assert asked == model.asked / 3
    if solver in STAGES:
        assert asked == (4 * STAGES[solver] + (end > 0)) * (2 if guidance != 1 else 1)


# ---------------------------------------------------------------- conditions
def counts_like(n, seed=0):
    return torch.randint(0, 11, (n, 7), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ("seg_conditioned", "seg_conditioned_improved"))
def test_counts_as_vectors(use, mode):
    """They do not matter at first, each of the seven does later; -1 is a row of its own, above 10 is 10."""
    use(MODE=mode, SHAPE=(4, 4, 4), PREDICTION="velocity")
    model, x, t, c = flow(), randn(3, 1, 4, 4, 4), torch.tensor([0.2, 0.5, 0.9]), counts_like(3)
    assert torch.equal(model(x, t, counts=c), model(x, t, counts=c.flip(0)))
    model = alive(model)
    out = model(x, t, counts=c)
    for i in range(7):
        other = c.clone()
        other[:, i] = (c[:, i] + 3) % 11
        assert ((model(x, t, counts=other) - out).abs().amax((1, 2, 3, 4)) > 1e-5).all(), i
    high, cap = c.clone(), c.clone()
    high[:, 2], cap[:, 2] = 37, 10
    assert torch.equal(model(x, t, counts=high), model(x, t, counts=cap))
    null = model(x, t, counts=torch.full_like(c, -1))
    assert all((null - model(x, t, counts=torch.full_like(c, k))).abs().max() > 1e-5 for k in range(11))
    linear = [m for m in model.vectors["counts"] if isinstance(m, nn.Linear)]
    size, layers = (64, 4) if mode.endswith("improved") else (32, 2)
    assert [tuple(table.weight.shape) for table in model.tables] == [(12, size)] * 7 and len(linear) == layers
    if layers == 4:
        assert [m.out_features for m in linear[:-1]] == [512] * 3


def test_counts_as_input_maps(use):
    use(MODE="seg_conditioned_input", SHAPE=(4, 4, 4), PREDICTION="velocity")
    model, x, t, c = flow(), randn(3, 1, 4, 4, 4), torch.rand(3), counts_like(3)
    c[1] = -1
    c[2, 0] = 25
    model.net = Says(torch.zeros(3, 1, 4, 4, 4))
    model(x, t, counts=c)
    seen, = model.net.asked
    assert seen.shape == (3, 8, 4, 4, 4) and torch.equal(seen[:, :1], x)
    want = c.clamp(max=10).float() / 10
    assert torch.allclose(seen[:, 1:], want.view(3, 7, 1, 1, 1).expand(-1, -1, 4, 4, 4))
    model = alive(flow())
    assert (model(x, t, counts=c) - model(x, t, counts=c.flip(1))).abs().max() > 1e-6


def test_counts_are_hidden_from_whole_volumes(use):
    use(MODE="seg_conditioned", COUNT_DROP=0.15)
    data = rf.load_data()
    counts = torch.cat([rf.draw_batch(data, step)[0]["counts"] for step in range(250)])
    hidden = (counts == -1).all(1)
    assert torch.equal(hidden, (counts == -1).any(1)) and 0.11 < hidden.double().mean() < 0.19
    batch, = rf.draw_batch(data, 3)
    for x, c in zip(batch["x_0"], batch["counts"]):
        assert (c == -1).all() or c.tolist() == volumes.count_lesions(x[0].numpy() > 0, 6.0).tolist()
    use(COUNT_DROP=0.0)
    assert (rf.draw_batch(data, 3)[0]["counts"] >= 0).all()


def test_guidance_arithmetic(use):
    """v = v_null + w (v_c - v_null): a model that aims at 0.05 of the first count, at 0.3 without one."""
    use(MODE="image", T_END=0.0)

    class Aims(Gaussian):
        def forward(self, x, t, counts):
            aim = torch.where(counts[:, 0] < 0, 0.3, 0.05 * counts[:, 0])
            return (x - wide(aim)) / wide(t)
    c = torch.zeros(3, 7, dtype=torch.long)
    c[:, 0] = torch.tensor([4, 8, 10])
    for w in (0.0, 1.0, 2.0, 3.0):
        use(GUIDANCE=w)
        x = rf.sample(Aims(), [0, 1, 2], dict(counts=c), solver="euler", steps=3)[0]
        want = 0.3 + w * (0.05 * c[:, 0] - 0.3)
        assert (x - wide(want.clamp(0, 1))).abs().max() < 1e-5, w


def test_adaptive_solvers_keep_conditions_with_their_volumes(use):
    """Samples finish at different times: the rest must keep their own conditions."""
    use(MODE="bravo", T_END=0.0)

    class Toward(Gaussian):
        def forward(self, x, t, mask):
            return exact(x, wide(t), 0.2 + 0.6 * mask, 0.02 + 0.2 * mask.mean((1, 2, 3, 4), keepdim=True))
    mask = (rand(6, 1, 4, 4, 4) < torch.linspace(0, 1, 6).view(-1, 1, 1, 1, 1)).float()
    batch = rf.sample(Toward(), range(6), dict(mask=mask), solver="bosh3", tolerance=1e-4)[0]
    for i in range(6):
        alone = rf.sample(Toward(), [i], dict(mask=mask[i:i + 1]), solver="bosh3", tolerance=1e-4)[0]
        assert (alone - batch[i:i + 1]).abs().max() < 1e-5


def drawn_by_seed():
    """sample() of a network that sets 0 to 3 voxels apart from each other by the seed alone, and what it was
    asked for: {seed: counts}."""
    asked = {}

    def sample(model, seeds, condition, **how):
        x = torch.zeros(len(seeds), 1, 8, 8, 8)
        for i, seed in enumerate(seeds):
            x[i, 0, :2 * (seed % 4):2, 4, 4] = 1
        asked.update(zip(seeds, condition["counts"].tolist(), strict=True))
        return x, 5.0
    return sample, asked


def test_redraw(use, monkeypatch):
    """Rejection: what fits is kept as it is, the rest is drawn anew until it fits, TRIES draws at most, and
    the best of them stays; a mask does not depend on how many are drawn beside it."""
    use(MODE="seg_conditioned", SHAPE=(8, 8, 8))
    sample, asked = drawn_by_seed()
    monkeypatch.setattr(rf, "sample", sample)
    counts, spacing = torch.zeros(40, 7, dtype=torch.long), np.full((40, 3), 3.0)
    counts[:, 0] = torch.arange(40) % 6  # 4 and 5 cannot be had: 3 is the nearest
    seeds = [common.seed_of(7, "sample", i) for i in range(40)]
    first, evaluations = rf.sample_many(None, seeds, dict(counts=counts))
    assert evaluations == 5 and list(asked) == seeds
    want, before = counts.numpy(), rf.count_masks(first, spacing)
    fits = (before == want).all(1)
    assert 2 < fits.sum() < 20
    misses = []
    for tries in (1, 2, 4, 30):
        asked.clear()
        use(TRIES=tries)
        x, more = rf.redraw(None, 7, first, dict(counts=counts), spacing)
        under = {common.seed_of(7, "sample", i, k): want[i].tolist()
                 for i in range(40) for k in range(1, tries)}
        assert more == pytest.approx(5 * len(asked) / 40) and asked.items() <= under.items()
        misses.append(rf.misfit(rf.count_masks(x, spacing), want))
        assert torch.equal(x[fits], first[fits])
    assert torch.equal(first, rf.sample_many(None, seeds, dict(counts=counts))[0])  # not changed in place
    assert (misses[0] == rf.misfit(before, want)).all() and len(np.unique(misses[0])) > 3
    assert all((b <= a).all() and b.sum() < a.sum() for a, b in zip(misses, misses[1:]))
    assert (misses[-1] == 2 * (want[:, 0] - 3).clip(0)).all()
    alone, _ = rf.redraw(None, 7, first[:9], dict(counts=counts[:9]), spacing[:9])
    assert torch.equal(alone, x[:9])


def test_misfit():
    """Missing, too many, of a wrong size: 2 each; arrays of any shape."""
    asked = np.array([0, 1, 2, 0, 0, 0, 0])
    got = asked + np.array([[0] * 7, [0, -1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 3, 0, 0], [0, -1, 1, 0, 0, 0, 0],
                            [0, -1, 0, 0, 1, 0, 1]])
    assert rf.misfit(got, asked).tolist() == [0, 2, 6, 2, 4]
    assert rf.misfit(got[None], asked).shape == (1, 5)


def test_masks_go_in_beside_the_image(use):
    labels = np.random.default_rng(0).integers(0, 4, (1, 4, 4, 4), np.uint8)
    part = SimpleNamespace(masks=labels, images=np.zeros((1, 4, 4, 4), np.float16), counts=None)
    for mode, channels, seen in (("bravo", 1, 1), ("bravo_seg_cond", 3, 1), ("image", 0, 1), ("seg", 0, 3)):
        use(MODE=mode, LABELS=3, SHAPE=(4, 4, 4), PREDICTION="velocity")
        assert rf.mask_channels() == channels and rf.target(part, [0]).shape[1] == seen
        condition = rf.condition_of(part, [0])
        model = flow(seen, channels)
        assert model.net.stem.in_channels == channels + seen
        out = model(torch.zeros(1, seen, 4, 4, 4), torch.tensor([0.5]), **condition)
        assert out.shape == (1, seen, 4, 4, 4) and ("mask" in condition) == (channels > 0)
    one, three = rf.labels_of(part, [0], 1), rf.labels_of(part, [0], 3)
    assert torch.equal(one[0, 0], torch.from_numpy(labels[0] > 0).float())
    for i in range(3):
        assert torch.equal(three[0, i], torch.from_numpy(labels[0] == i + 1).float())
    use(MODE="bravo")
    model, x, t = alive(flow(1, 1)), randn(1, 1, 4, 4, 4), torch.tensor([0.5])
    assert (model(x, t, mask=one) - model(x, t, mask=1 - one)).abs().max() > 1e-4


# ---------------------------------------------------------------- augmentation
TURN, SHIFT, CUT, BIT = slice(0, 4), slice(4, 6), slice(6, 9), 9  # the places of omega


def drawn(n, shape, noisier=False):
    g = torch.Generator().manual_seed(0)
    return [rf.draw_transform(g, shape, noisier) for _ in range(n)]


def test_omega_of_zeros_is_the_identity_and_only_that():
    """No bit for a transform that does nothing, and no transform without a bit; one omega, one transform."""
    for shape in ((6, 8, 10), (6, 8, 8)):
        x, seen, kinds = rand(1, *shape), {}, {}
        for T, omega in drawn(1200, shape):
            y = T(x)
            assert y.shape == x.shape and omega.shape == (rf.omega_size,) and omega.abs().max() <= 1
            assert torch.equal(y, x) == (not omega.any()), omega
            places = dict(turn=TURN, shift=SHIFT, cut=CUT)
            kind = next((k for k, at in places.items() if omega[at].any()), "none")
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind != "cut":  # the place of a cut is not told
                assert torch.equal(seen.setdefault(tuple(omega.tolist()), y), y)
        assert all(200 < kinds[k] < 420 for k in ("turn", "shift", "cut", "none")), kinds
        turns = {y.numpy().tobytes() for omega, y in seen.items() if any(omega[TURN])}
        names = [omega for omega in seen if any(omega[TURN])]
        square = shape[1] == shape[2]
        assert len(turns) == len(names) == (7 if square else 3), (shape, len(turns), len(names))


def test_turns_stay_in_the_plane():
    """A volume that varies along D alone looks the same after every turn and flip."""
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 8, 8).contiguous()
    for T, omega in drawn(200, (6, 8, 8), noisier=True):
        assert torch.equal(T(x), x)


def test_shifts_and_cuts_are_what_omega_says():
    D, H, W = shape = (10, 20, 30)
    x, rights, downs, sizes = 1 + rand(1, *shape), [], [], []
    for T, omega in drawn(600, shape):
        y = T(x)
        if omega[SHIFT].any():
            right, down = (round(float(o) * n) for o, n in zip(omega[SHIFT], (W, H)))
            want = torch.zeros_like(x)
            h, w = torch.arange(H), torch.arange(W)
            hs, ws = h[(h + down >= 0) & (h + down < H)], w[(w + right >= 0) & (w + right < W)]
            want[:, :, (hs + down)[:, None], ws + right] = x[:, :, hs[:, None], ws]
            assert torch.equal(y, want)
            rights.append(right), downs.append(down)
        elif omega[CUT].any():
            size = [round(float(o) * n) for o, n in zip(omega[CUT], shape)]
            where = (y == 0)[0].nonzero()
            extent = (where.amax(0) - where.amin(0) + 1).tolist()
            assert extent == size and len(where) == math.prod(size) and torch.equal(y[y > 0], x[y > 0])
            sizes.append(size)
    assert max(map(abs, rights)) <= 12 and max(map(abs, downs)) <= 4
    assert min(rights) < -9 and max(rights) > 9 and min(downs) < -3 and max(downs) > 3
    sizes = np.array(sizes) / shape
    assert sizes.min() >= 0.1 - 1e-6 and sizes.max() <= 0.3 + 1e-6 and sizes.min(0).max() < 0.15


def test_scoreaug_moves_x_t_and_its_target_alike(use):
    """T is linear, so T(x_t) = (1 - t) T(x_0) + t T(eps) and T(v) = T(eps) - T(x_0); the mask goes along."""
    use(MODE="bravo", AUGMENT="scoreaug")
    x_0, eps = rand(6, 1, 4, 6, 8), randn(6, 1, 4, 6, 8)
    t = rand(6, seed=2)
    x_t = wide(1 - t) * x_0 + wide(t) * eps

    def move(*parts):
        names = ("x_0", "eps", "mask")
        batch = dict(zip(names, parts), t=t)
        return rf.transformed(batch, torch.Generator().manual_seed(5), False)
    moved, noisy = move(x_0, eps, x_0), move(x_t, eps - x_0, x_t)
    assert torch.allclose(noisy["x_0"], wide(1 - t) * moved["x_0"] + wide(t) * moved["eps"], atol=1e-6)
    assert torch.allclose(noisy["eps"], moved["eps"] - moved["x_0"], atol=1e-6)
    assert torch.equal(moved["mask"], moved["x_0"]) and torch.equal(moved["t"], t)
    assert not torch.equal(moved["x_0"], x_0) and moved["omega"].shape == (6, rf.omega_size)
    data = rf.load_data()
    batch, = rf.draw_batch(data, 0)
    assert set(batch) == {"x_0", "eps", "mask", "t", "omega"} and batch["x_0"].shape == batch["mask"].shape


@pytest.mark.parametrize("augment", ("scoreaug", "sda"))
def test_omega_changes_nothing_at_first_and_zeros_mean_none(use, augment):
    use(MODE="bravo", SHAPE=(4, 4, 4), AUGMENT="none")
    plain = alive(flow(1, 1))
    use(AUGMENT=augment)
    model = flow(1, 1, seed=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    x, t, mask = randn(3, 1, 4, 4, 4), rand(3), (rand(3, 1, 4, 4, 4) > 0.5).float()
    for omega in (None, torch.zeros(3, rf.omega_size), rand(3, rf.omega_size)):
        assert torch.equal(model(x, t, mask=mask, omega=omega), plain(x, t, mask=mask))
    model = alive(model)
    zeros, none = (model(x, t, mask=mask, omega=o) for o in (torch.zeros(3, rf.omega_size), None))
    assert torch.equal(zeros, none)
    for i in (0, 3, 5, 7, BIT):
        bit = F.one_hot(torch.tensor([i] * 3), rf.omega_size).float()
        assert (model(x, t, mask=mask, omega=bit) - none).abs().max() > 1e-6


def test_sda_adds_a_noisier_turned_copy(use):
    """To half of the steps: t + 0.1, one bit, turns and flips alone."""
    use(MODE="bravo", AUGMENT="sda", BATCH_SIZE=8)
    data, twice, moved = rf.load_data(), 0, 0
    for step in range(80):
        parts = rf.draw_batch(data, step)
        assert set(parts[0]) == {"x_0", "eps", "mask", "t"}
        if len(parts) == 1:
            continue
        twice += 1
        plain, noisy = parts
        assert torch.equal(noisy["t"], (plain["t"] + 0.1).clamp(max=1)) and noisy["t"].max() <= 1
        bit = F.one_hot(torch.tensor(BIT), rf.omega_size).float()
        assert torch.equal(noisy["omega"], bit.expand(8, -1))
        for x, y in zip(plain["x_0"], noisy["x_0"]):
            assert torch.equal(x.flatten().sort().values, y.flatten().sort().values)
            assert torch.allclose(x.sum((2, 3)), y.sum((2, 3)), rtol=1e-4)
            moved += not torch.equal(x, y)
    assert 25 <= twice <= 55 and moved > 4 * twice


def test_small_lesions_weigh_more(use):
    """By Feret diameter: below 10, 20, 30 mm and above: 2.5, 1.8, 1.4, 1.2; outside 1. Any label counts."""
    masks = torch.zeros(2, 2, 9, 9, 40)
    for row, (voxels, label) in enumerate(((6, 0), (13, 1), (26, 0), (36, 1))):  # n voxels: n - 1 mm
        masks[0, label, 2 * row, 4, :voxels] = 1
    masks[1, 0, 0, 0, :6] = 1
    weight = rf.regional_weight(masks, np.array([[1.0, 1, 1], [1, 1, 5]]))
    assert weight.shape == (2, 1, 9, 9, 40)
    for row, want in enumerate((2.5, 1.8, 1.4, 1.2)):
        inside = masks[0, :, 2 * row, 4].amax(0) > 0
        assert torch.allclose(weight[0, 0, 2 * row, 4][inside], torch.tensor(want)), row
    assert (weight[0, 0][masks[0].amax(0) == 0] == 1).all()
    assert torch.allclose(weight[1, 0, 0, 0, :6], torch.tensor(1.4))  # 25 mm at 5 mm a voxel
    use(MODE="seg_conditioned_improved")
    batch, = rf.draw_batch(rf.load_data(), 0)
    assert batch["weight"].shape == batch["x_0"].shape and batch["weight"].max() > 1


# ---------------------------------------------------------------- numbers
@pytest.fixture(scope="module")
def heads():
    """Images and masks (n, 1, 16, 16, 16) of the middle of 128 heads: 6 mm a voxel, lesions from 14 mm on."""
    images, masks = zip(*(volumes.phantom(seed, (16, 16, 16), volumes.CROP) for seed in range(128)))
    return tuple(torch.from_numpy(np.stack(part))[:, None].float() for part in (images, masks))


def test_there_is_one_threshold():
    source = (ROOT / "train_3d_rflow.py").read_text()
    body = re.search(r"def binarize\(x\):.*?\n\n\n", source, re.S)[0]
    assert re.findall(r">=?\s*0?\.5\b", body) == ["> 0.5"]
    assert not re.findall(r">=?\s*0?\.5\b|\.round\(\)|threshold\s*=", source.replace(body, ""))
    x = torch.tensor([-3.0, 0, 0.4999, 0.5, 0.5001, 1, 9, math.inf])
    assert rf.binarize(x).tolist() == [False] * 4 + [True] * 4 and rf.binarize(x).dtype == torch.bool


def test_haar_packets(heads):
    """Depth 1 against sums and differences written out; depth 2 is depth 1 of depth 1; lengths are kept."""
    x = randn(3, 2, 8, 8, 10)
    packets = rf.wavelet_packets(x)
    assert packets.shape == (2 * 8, 3, 64)  # of 4 x 4 x 5 numbers
    x = randn(3, 2, 8, 8, 8).double()
    packets = rf.wavelet_packets(x).view(2, 2, 2, 2, 3, 4, 4, 4)
    for c in range(2):
        for a, b, e in np.ndindex(2, 2, 2):
            want = sum((-1) ** (a * i + b * j + e * k) * x[:, c, i::2, j::2, k::2]
                       for i, j, k in np.ndindex(2, 2, 2)) / 8**0.5
            assert torch.allclose(packets[c, a, b, e], want, atol=1e-12)
    real = heads[0][:4]
    packets = rf.wavelet_packets(real)
    assert packets.shape == (64, 4, 64)
    assert torch.allclose(packets.square().sum((0, 2)), real.double().square().sum((1, 2, 3, 4)), rtol=1e-12)
    twice = [rf.wavelet_packets(real, side=8, most=512).view(8, 4, 1, 8, 8, 8)[i] for i in range(8)]
    energies = torch.cat([rf.wavelet_packets(band).square().sum((1, 2)) for band in twice]).sort().values
    assert torch.allclose(energies, packets.square().sum((1, 2)).sort().values, rtol=1e-10)
    assert float(rf.wavelet_packets(torch.ones(1, 1, 32, 32, 32)).abs().max()) == pytest.approx(8**1.5)


def test_white_noise_stays_white():
    packets = rf.wavelet_packets(randn(2000, 1, 8, 8, 8))  # (8, 2000, 64)
    rows = packets.permute(1, 0, 2).flatten(1)
    covariance = rows.T.cov()
    assert (covariance - torch.eye(512)).abs().max() < 6 / 2000**0.5 and rows.mean(0).abs().max() < 0.12


def test_long_packets_are_projected():
    x = randn(6, 1, 8, 16, 16)  # 4 x 8 x 8 numbers a packet
    packets = rf.wavelet_packets(x)
    full = rf.wavelet_packets(x, most=10**6)
    assert packets.shape == (8, 6, 64) and full.shape == (8, 6, 256)
    assert torch.equal(packets, rf.wavelet_packets(x))
    assert (packets.square().sum(2) <= full.square().sum(2) * (1 + 1e-9)).all()
    assert abs(float(packets.square().sum() / full.square().sum()) - 0.25) < 0.05


def test_frechet_wavelet(heads):
    """The same set: 0. Offset d: 64 d^2, all of it in one packet. The mean over packets of `frechet`."""
    x, y = heads[0][:24], heads[0][24:48]
    assert abs(rf.frechet_wavelet(x, x)) < 1e-6
    assert rf.frechet_wavelet(x + 0.1, x) == pytest.approx(0.64, rel=1e-4)
    assert rf.frechet_wavelet(x, y) == pytest.approx(rf.frechet_wavelet(y, x), rel=1e-6)
    want = np.mean([metrics.frechet(a, b) for a, b in zip(rf.wavelet_packets(x), rf.wavelet_packets(y))])
    assert rf.frechet_wavelet(x, y) == pytest.approx(want, rel=1e-5)


def blurred(x, masks, a):
    kernel = torch.ones(1, 1, 3, 3, 3) / 27
    return (1 - a) * x + a * F.conv3d(F.pad(x, (1,) * 6, "replicate"), kernel)


def without_lesions(x, masks, a):
    tissue = (x * (1 - masks)).sum((2, 3, 4), keepdim=True) / (1 - masks).sum((2, 3, 4), keepdim=True)
    gone = torch.arange(len(x)).view(-1, 1, 1, 1, 1) < a * len(x)
    return torch.where(gone & (masks > 0), tissue, x)


def fewer_modes(x, masks, a):
    n = round(len(x) * (1 - 0.95 * a))
    return x[torch.arange(len(x)) % n]


def shuffled(x, masks, a):
    order = torch.arange(16)
    picked = torch.randperm(16, generator=torch.Generator().manual_seed(0))[:round(16 * a)]
    order[picked] = order[picked.roll(1)]
    return x[:, :, order]


CORRUPTIONS = dict(blur=blurred, noise=lambda x, m, a: x + 0.2 * a * randn(*x.shape),
                   lesions=without_lesions, intensity=lambda x, m, a: x + 0.2 * a, modes=fewer_modes,
                   slices=shuffled)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_both_distances_grow_with_every_corruption(heads, name):
    """A number that a blur, lost lesions or dropped modes cannot raise would be worth nothing."""
    x, masks = (part[:48] for part in heads)
    encoder = rf.Encoder(1).eval()
    steps = [CORRUPTIONS[name](x, masks, a) for a in (0, 0.25, 0.5, 1)]
    wavelet = [rf.frechet_wavelet(y, x) for y in steps]
    with torch.no_grad():
        real, *features = rf.reduced(encoder(x), *map(encoder, steps))
    learned = [metrics.frechet(f, real) for f in features]
    for values in (wavelet, learned):
        assert abs(values[0]) < 1e-6 and all(b > 1.02 * a + 1e-9 for a, b in zip(values, values[1:])), values


def test_encoder_and_reduced_features(heads):
    x = heads[0][:32]
    before = torch.get_rng_state()
    a, b = rf.Encoder(1)(x[:5]), rf.Encoder(1)(x[3:5])
    assert a.shape == (5, 128) and (a[3:] - b).abs().max() < 1e-5  # fixed weights, no volume sees another
    torch.set_rng_state(before)
    with torch.no_grad():
        f = rf.Encoder(1)(x)
    real, same, moved = rf.reduced(f, f, f + 1)
    assert real.shape == (32, 8) and torch.equal(real, same) and abs(float(real.mean(0).norm())) < 1e-4
    assert torch.allclose(real.T.cov(), torch.diag(real.T.cov().diagonal()), atol=1e-6)
    assert real.var(0)[0] >= real.var(0)[-1] > 0 and (moved - real).std(0).max() < 1e-6


def test_dice():
    a, b = torch.zeros(4, 2, 2, 2, 2), torch.zeros(4, 2, 2, 2, 2)
    a[0, 0, 0], b[0, 0, 0] = 1, 1  # the same: 1
    a[1, 0, 0], b[1, 0, :, 0] = 1, 1  # half of each: 1/2
    b[2, 1, 0, 0, 0] = 1  # missed: 0
    a[3, 1, 0, 0, 0] = 1  # b is empty: no case
    assert rf.dice(a, b) == pytest.approx(0.5) and rf.dice(a.bool(), b.bool()) == pytest.approx(0.5)
    assert math.isnan(rf.dice(a, 0 * b)) and rf.dice(b, b) == 1


def test_similarity(heads):
    """Copies: 1. Heads differ; a set of one mode looks more alike. Too small volumes have none."""
    x = heads[0]
    assert rf.similarity(x[:1].expand(6, -1, -1, -1, -1)) == pytest.approx(1)
    assert rf.similarity(x[:20]) < rf.similarity(fewer_modes(x[:20], None, 0.8)) - 0.02
    assert rf.similarity(x) < 0.95
    assert math.isnan(rf.similarity(x[:4, :, :6])) and math.isnan(rf.similarity(x[:1]))


def test_copies_of_training_volumes_are_seen(heads):
    train, test, fresh = (rf.small(heads[0][i:i + 42]) for i in (0, 42, 84))
    signs = metrics.memorisation(train[:20] + 0.01 * randn(20, train.shape[1]), train, test)
    assert signs["memorised"] > 0.95 and signs["authentic"] == 0
    assert metrics.memorisation(fresh, train, test)["memorised"] <= 2 / 42
    assert rf.small(heads[0][:2]).shape == (2, 16**3)
    assert rf.small(torch.zeros(2, 1, 40, 16, 8)).shape == (2, 32 * 16 * 8)


def quick_evaluate(use, monkeypatch, x, data):
    ref = rf.reference(data, CPU)
    monkeypatch.setattr(rf, "draw_set", lambda *a, **k: (x, list(range(8)), 3.0))
    model = rf.build_model(data).eval().requires_grad_(False)
    return rf.evaluate(model, data, ref, 8)[0]


@pytest.mark.parametrize("mode", ("seg_conditioned", "image"))
def test_evaluate_is_perfect_on_the_test_set_and_sees_copies(use, monkeypatch, mode):
    """The same tensors give the same numbers; test volumes score 0, training volumes count as memorised."""
    use(MODE=mode)
    data = rf.load_data()
    test, train = (rf.target(part, range(8)) for part in (data.test, data.train))
    first, again = (quick_evaluate(use, monkeypatch, test, data) for _ in range(2))
    same = [{k: v for k, v in m.items() if k != "seconds_per_sample"} for m in (first, again)]
    assert same[0] == same[1]
    value = {k: v["value"] for k, v in first.items()}
    assert abs(value["frechet_wavelet"]) < 1e-6 and abs(value["frechet_features"]) < 1e-6
    assert value["ms_ssim_diversity"] == pytest.approx(first["ms_ssim_diversity"]["ceiling"])
    assert value["evaluations"] == 3 and first["val_loss"]["floor"] == pytest.approx(
        float(rf.linear_floor(data.mu, data.sigma, (torch.arange(16) + 0.5) / 16).mean()))
    copies = quick_evaluate(use, monkeypatch, train, data)
    assert copies["memorised"]["value"] == 1 and copies["authentic"]["value"] == 0
    noise = quick_evaluate(use, monkeypatch, rand(*test.shape), data)
    for name in ("frechet_wavelet", "frechet_features")[:2 if mode == "image" else 1]:
        assert noise[name]["value"] > 2 * first[name]["ceiling"] > 0
        assert first[name]["floor"] > first[name]["ceiling"]
    if mode == "seg_conditioned":
        assert value["lesions_within_1"] == value["counts_exact"] == 1 and value["lesions_bias"] == 0
        empty = quick_evaluate(use, monkeypatch, 0 * test, data)
        asked = np.asarray(data.test.counts).sum(1)
        assert empty["lesions_bias"]["value"] == pytest.approx(-asked.mean())
        assert empty["lesions_within_1"]["value"] == pytest.approx((asked <= 1).mean())
        assert "lesions_within_1_first" not in first
        use(TRIES=3)  # of masks, the test set's fit; of nothing, what the network draws may be better
        chosen, empty = (quick_evaluate(use, monkeypatch, x, data) for x in (test, 0 * test))
        assert chosen["evaluations"]["value"] == 3 < empty["evaluations"]["value"]
        assert chosen["counts_exact"]["value"] == chosen["counts_exact_first"]["value"] == 1
        assert empty["lesions_within_1_first"]["value"] == pytest.approx((asked <= 1).mean())
        for name in ("lesions_within_1", "counts_exact"):  # choosing blindly helps, and the floor knows it
            one, three = chosen[name + "_first"]["floor"], chosen[name]["floor"]
            assert one == first[name]["floor"] and 0 < one < three < 1
        learned, asked = np.asarray(data.train.counts), np.asarray(data.test.counts)
        alike = (learned[None] == asked[:, None]).all(2).mean()  # a mask in so many fits by chance
        assert chosen["counts_exact_first"]["floor"] == pytest.approx(alike, abs=0.05)


def test_segmenter_finds_bright_lesions(use):
    """And leaves the global numbers alone."""
    use(SHAPE=(8, 8, 8), MODE="bravo")
    masks = F.max_pool3d((rand(24, 1, 8, 8, 8) > 0.99).float(), 3, 1, 1)
    images = 0.2 * rand(24, 1, 8, 8, 8, seed=1) + 0.7 * masks
    before = torch.get_rng_state()
    net = rf.train_segmenter(lambda i: images[i], lambda i: masks[i], 16, CPU, steps=60)
    assert torch.equal(before, torch.get_rng_state()) and not net.training
    found = rf.segment(net, images[16:])
    assert found.min() >= 0 and found.max() <= 1
    found = rf.binarize(found)
    assert rf.dice(found, masks[16:]) > 0.5 > rf.dice(found.roll(1, 0), masks[16:]) + 0.2


def test_a_segmenter_trained_on_samples_is_as_good_as_they_are(use, monkeypatch):
    """Train-synthetic, test-real: samples like the data teach it, images without lesions do not."""
    use(SHAPE=(8, 8, 8), MODE="bravo", TSTR=16)
    masks = F.max_pool3d((rand(24, 1, 8, 8, 8) > 0.99).float(), 3, 1, 1)
    images = 0.2 * rand(24, 1, 8, 8, 8, seed=1) + 0.7 * masks
    train, test = (SimpleNamespace(names=list(range(b - a)), images=images[a:b, 0].numpy(),
                                   masks=masks[a:b, 0].byte().numpy()) for a, b in ((0, 16), (16, 24)))
    monkeypatch.setattr(rf, "train_segmenter", functools.partial(rf.train_segmenter, steps=60))
    scores = []
    for samples in (images[:16], 0.2 * rand(16, 1, 8, 8, 8, seed=2)):
        monkeypatch.setattr(rf, "draw_set", lambda model, part, n: (samples, list(range(n)), 1.0))
        found = rf.train_on_samples(SimpleNamespace(mu=torch.zeros(1)),
                                    SimpleNamespace(train=train, test=test), [0, 3, 6])
        scores.append(rf.dice(found, masks[[16, 19, 22]]))
    assert scores[0] > 0.5 > scores[1] + 0.2


@pytest.mark.parametrize("often, kept", ((1, False), (2, True), (3, True)))
def test_the_usual_mask_is_the_best_of_constant_ones(use, often, kept):
    """One voxel in every mask, another in `often` of four: Dice with and without it decides."""
    use(MODE="bravo")
    masks = np.ones((4, 1, 1, 2), np.uint8)
    masks[often:, ..., 1] = 0
    part = SimpleNamespace(names=list(range(4)), masks=masks)
    usual = rf.usual_mask(part)
    assert usual.flatten().tolist() == [True, kept]
    with_it, without = (np.mean([2 * min(a, b) / (a + b) for b in masks.sum((1, 2, 3))]) for a in (2, 1))
    assert (with_it >= without) == kept


# ---------------------------------------------------------------- steps, guard
def trainer(use, steps=2, optimizer=None, **settings):
    """Parameters and (loss, rate, norm) of each step of the script's own train_step, without files."""
    use(**settings)
    data = rf.load_data()
    torch.manual_seed(0)
    model = rf.build_model(data)
    ema = copy.deepcopy(model)
    optimizer = (optimizer or torch.optim.SGD)(model.parameters(), lr=0.1)
    run = SimpleNamespace(device=CPU, rank=0, world=1)
    guard, rows = common.Guard(), []
    for step in range(steps):
        rows.append(rf.train_step(model, model, ema, optimizer, guard, data, step, 10, run))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), np.array(rows)


@pytest.mark.parametrize("mode, augment", (("bravo", "sda"), ("seg_conditioned_improved", "scoreaug")))
def test_accumulation_equals_the_large_batch(use, mode, augment):
    settings = dict(MODE=mode, AUGMENT=augment, LR=0.1, DROPOUT=0.0)
    large, rows = trainer(use, BATCH_SIZE=8, ACCUM=1, **settings)
    parts, again = trainer(use, BATCH_SIZE=4, ACCUM=2, **settings)
    assert np.allclose(rows, again, rtol=1e-4) and (large - parts).abs().max() < 1e-5
    other, _ = trainer(use, BATCH_SIZE=4, ACCUM=1, **settings)
    assert (large - other).abs().max() > 1e-4


@pytest.mark.parametrize("R", (6.0, 30.0, 100.0, 1000.0))
def test_guard_recovers_in_the_computed_number_of_steps(R):
    """Row 5: a lasting rise by R is accepted after ln(R / factor) / ln(1 + (1 - b)(factor - 1)) steps."""
    guard = common.Guard()
    assert all(guard.accepts(1.0, 1.0) for _ in range(300))
    refused = 0
    while not guard.accepts(R, 1.0):
        refused += 1
    assert refused == math.ceil(math.log(R / guard.factor) / math.log(1 + (1 - guard.b) * (guard.factor - 1)))
    assert all(guard.accepts(R, 1.0) for _ in range(300))


CPU_ROWS = [name for name in rf.EXPERIMENTS if name.startswith("exp") and name.endswith("_cpu")]
LATER_ROWS = [name for name, row in rf.EXPERIMENTS.items() if "LATER" in row]
GPU_ROWS = [name for name in rf.EXPERIMENTS
            if name.startswith("exp") and name not in (*CPU_ROWS, *LATER_ROWS)]


@pytest.mark.parametrize("name", (*CPU_ROWS, "masks"))
def test_laptop_rows_train(use, name):
    """Their own network on small volumes: finite losses, the first of which is no surprise."""
    row = common.row_of(rf.EXPERIMENTS, name)
    use(**{**PLAIN, **row, "SHAPE": (16, 16, 16), "TRAIN": 6, "VAL": 2, "TEST": 2})
    rf.check_settings()
    _, rows = trainer(use, optimizer=torch.optim.AdamW, BATCH_SIZE=2)
    assert np.isfinite(rows).all() and 0 < rows[0, 0] < 1.5
    assert row["EPOCHS"] > 0 and row["MODE"] and name.removesuffix("_cpu") in (*GPU_ROWS, "masks")


@pytest.mark.parametrize("name", GPU_ROWS)
def test_gpu_rows_build(use, name):
    """On the meta device, at their own size: the network fits its settings and its output fits its input."""
    row = common.row_of(rf.EXPERIMENTS, name)
    use(**{**PLAIN, **row})
    rf.check_settings()
    with torch.device("meta"):
        channels, masks = 1, rf.mask_channels()
        model = rf.Flow(channels, masks, torch.zeros(1, *rf.SHAPE), torch.ones(1, *rf.SHAPE))
        condition = dict(mask=torch.zeros(1, masks, *rf.SHAPE)) if masks else {}
        if rf.counting():
            condition["counts"] = torch.zeros(1, 7, dtype=torch.long)
        with torch.no_grad():
            out = model(torch.zeros(1, 1, *rf.SHAPE), torch.zeros(1), **condition)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    assert out.shape == (1, 1, *rf.SHAPE)
    assert 100 < size < 200 if row.get("BACKBONE") == "dit" else 200 < size < 240, size
    assert row["LR"] <= 1e-4 and row["SHAPE"][0] == 160


@pytest.mark.parametrize("name", LATER_ROWS)
def test_rows_for_later_end_in_one_line(monkeypatch, capsys, name):
    for key, value in common.row_of(rf.EXPERIMENTS, name).items():
        monkeypatch.setattr(rf, key, value)
    monkeypatch.setattr(rf, "EXPERIMENT", name)
    with pytest.raises(SystemExit) as error:
        rf.main()
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.count("\n") == 1
    assert f"EXPERIMENT={name}" in said and "not have yet" in said


# ---------------------------------------------------------------- whole runs
IMPORT = "import train_3d_rflow as script\n"
# A report draws pictures for seconds; most runs do not need them. This one draws a random number instead.
STUB = IMPORT + """
def stub(folder, model, *rest):
    folder.mkdir(parents=True, exist_ok=True)
    torch.rand(1)
    row = dict(value=1.0 - 0.1 * len(list(folder.parent.glob("epoch_*"))), floor=1.0, ceiling=None,
               better="lower", n=1)
    return {"val_loss": row}
script.report, script.segmenter_of = stub, lambda *a: None
script.evaluate = lambda *a, **k: (None, None)
""" + AT_CALL + """now = {}
def draw(data, step, attempt=0, old=script.draw_batch):
    now.update(step=step, attempt=attempt)
    return old(data, step, attempt)
script.draw_batch = draw
def change_loss(action, old=script.loss_fn):
    "Put action(loss, step) in the place of a training loss."
    script.loss_fn = lambda model, *a, **k: (action(old(model, *a, **k), now["step"]) if model.training
                                             else old(model, *a, **k))
"""
QUICK = IMPORT + "script.train_segmenter = functools.partial(script.train_segmenter, steps=5)\n"


@pytest.fixture(scope="module")
def launch(zygote, home, tmp_path_factory):
    """launch(*settings, fault=STUB, out=None) runs train_3d_rflow.py on tiny phantoms, or sample.py; out is
    OUT, by default a new one. Returns code, output, folder of the run."""
    def run(*settings, fault=STUB, out=None, program="train", limit=120, **environment):
        out = Path(out or tmp_path_factory.mktemp("runs"))
        arguments = list(settings)
        if program == "train":
            if not (out / "cache").exists():
                out.mkdir(parents=True, exist_ok=True)
                (out / "cache").symlink_to(home / "cache")
            arguments = [f"OUT={out}", *TINY, *settings]
        result = fork(zygote, tmp_path_factory.mktemp("job"), out / "3d_rflow", limit, arguments=arguments,
                      environment=environment, fault=fault, program=program, script="train_stl10")
        result.out = out
        return result
    return run


FAST = ["SHAPE=8,8,8", "MULTS=1", "BLOCKS=1", "ATTENTION=False"]
RICH = {"bravo": ["MODE=bravo", "AUGMENT=scoreaug"],
        "seg_conditioned": ["MODE=seg_conditioned", "AUGMENT=sda", "ACCUM=2", "BATCH_SIZE=2"]}


@pytest.mark.parametrize("mode", RICH)
def test_killed_and_resumed_equals_unbroken(launch, mode):
    """kill -9 in step 7 with the last save at step 6, then SIGTERM in step 9: the same bits as 12 steps."""
    from test_reliability import difference
    at = [*FAST, *RICH[mode], "EPOCHS=4", "DROPOUT=0.1", "EVAL_EVERY=1000"]
    whole = launch(*at)
    assert whole.code == 0 and len(log(whole.folder)) == 12, whole.output
    run = launch(*at, "SAVE_SECONDS=0", fault=STUB + "at_call('train_step', 7, kill())")
    assert run.code == -9 and state(run.folder)["step"] == 6, run.output
    run = launch(*at, fault=STUB + "at_call('train_step', 3, kill(signal.SIGTERM))", out=run.out)
    assert run.code == 143 and state(run.folder)["step"] == 9 and "Traceback" not in run.output, run.output
    assert "continuing after step 6 of 12" in run.output
    run = launch(*at, out=run.out)
    assert run.code == 0 and "continuing after step 9 of 12" in run.output, run.output
    assert difference(state(run.folder), state(whole.folder)) == "" and log(run.folder) == log(whole.folder)
    assert common.all_finite(state(run.folder))
    if mode == "bravo":
        other = launch(*at, "SEED=1")
        assert difference(state(other.folder)["model"], state(whole.folder)["model"])
        before = (run.folder / "last.pt").read_bytes()  # finished: ends at once and changes nothing
        assert launch(*at, fault=STUB + "at_call('train_step', 1, kill())", out=run.out).code == 0
        refused(launch(*at, "WIDTH=16", out=run.out), "WIDTH: 8 there, 16 now")
        assert (run.folder / "last.pt").read_bytes() == before
        # how it samples may change, and a finished run goes on with more epochs
        more = launch(*at, "EPOCHS=5", "STEPS=7", "SOLVER=bosh3", out=run.out)
        assert more.code == 0 and state(more.folder)["step"] == 15, more.output
        assert log(more.folder)[:12] == log(whole.folder)


def test_a_report_changes_nothing(launch):
    """A run with real reports after each epoch and one without have the same bits."""
    from test_reliability import difference
    at = ["MODE=seg_conditioned", "EPOCHS=2", "DROPOUT=0.1"]
    plain = launch(*at, "EVAL_EVERY=1000")
    watched = launch(*at, "EVAL_EVERY=1", fault=IMPORT + """
old = script.evaluate
script.evaluate = lambda *a, **k: (torch.manual_seed(1), old(*a, **k))[1]
needed = ("draw_batch", "draw_set", "draw_transform")
for name in [n for n in vars(script) if n.startswith("draw_") and n not in needed]:
    setattr(script, name, lambda *a: torch.rand(3))""")
    assert plain.code == watched.code == 0, plain.output + watched.output
    assert difference(state(plain.folder), state(watched.folder)) == ""
    assert json.loads((watched.folder / "epoch_0001" / "metrics.json").read_text())["val_loss"]["value"] > 0


def test_a_nan_batch_is_skipped(launch):
    """Row 5: one refused step, finite weights, no way back."""
    run = launch(*FAST, "EPOCHS=4", fault=STUB + """
change_loss(lambda loss, step: loss * float("nan") if step == 5 else loss)""")
    assert run.code == 0 and "diverged" not in run.output, run.output
    assert [int(r["skipped"]) for r in log(run.folder)] == [0] * 5 + [1] * 7
    assert common.all_finite(state(run.folder))


def test_one_huge_batch_is_skipped(launch):
    """Row 5: noise of 1000 times its size once: one refused step."""
    run = launch(*FAST, "EPOCHS=10", fault=STUB + """
def loud(data, step, attempt=0, old=script.draw_batch):
    batches = old(data, step, attempt)
    return [dict(b, eps=b["eps"] * (1000 if step == 24 else 1)) for b in batches]
script.draw_batch = loud""")
    assert run.code == 0 and "diverged" not in run.output, run.output
    rows = log(run.folder)
    assert [int(r["skipped"]) for r in rows] == [0] * 24 + [1] * 6 and float(rows[24]["loss"]) > 100
    assert float(rows[-1]["loss"]) < 1.5


def test_a_lasting_rise_is_accepted_again(launch):
    """Row 5: gradients 30 times larger for good, from step 30 on: about ln 6 / ln 1.2 = 10 refusals."""
    run = launch(*FAST, "EPOCHS=25", "MODE=seg", "PREDICTION=velocity", fault=STUB + """
change_loss(lambda loss, step: loss + 29 * (loss - loss.detach()) if step >= 30 else loss)""")
    assert run.code == 0 and "diverged" not in run.output, run.output
    skipped = [int(r["skipped"]) for r in log(run.folder)]
    assert skipped[29] == 0 and 6 <= skipped[45] <= 15 and skipped[-1] <= 18, skipped


def test_lasting_nan_goes_back(launch):
    """Row 6: a stretch of NaN: back to the last good state, half the rate, another order of the data."""
    run = launch(*FAST, "EPOCHS=6", "EVAL_EVERY=1", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=3)
change_loss(lambda loss, step: loss * float("nan") if step >= 10 and now["attempt"] == 0 else loss)""")
    assert run.code == 0 and "diverged: back to step 9, learning rate x 0.5" in run.output, run.output
    guard = torch.load(run.folder / "last.pt", weights_only=True)["guard"]
    assert guard["rollbacks"] == 1 and guard["skipped"] == 4 and len(log(run.folder)) == 18


def test_planted_divergence_goes_back_to_a_good_state(launch):
    """Row 6: weights blown up by an accepted step."""
    run = launch(*FAST, "EPOCHS=14", "EVAL_EVERY=1", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=8)
def step(handle, model, ema, optimizer, guard, data, at, *rest, old=script.train_step):
    result = old(handle, model, ema, optimizer, guard, data, at, *rest)
    if at == 28 and guard.rollbacks == 0:
        with torch.no_grad():
            model.net.head.weight.fill_(3.0)
    return result
script.train_step = step""")
    assert run.code == 0, run.output
    said = re.findall(r"back to step (\d+), learning rate x ([\d.]+)", run.output)
    back = [(int(n), float(x)) for n, x in said]
    assert len(back) == 1 and 20 <= back[0][0] <= 28 and back[0][1] == 0.5, back
    assert float(log(run.folder)[-1]["loss"]) < 1.5 and len(log(run.folder)) == 42


def test_divergence_for_ever_ends_with_a_line(launch):
    run = launch(*FAST, "EPOCHS=4", fault=STUB + """
script.Guard = functools.partial(common.Guard, patience=1)
change_loss(lambda loss, step: loss * float("nan"))""")
    refused(run, "sixth time")
    assert run.output.count("diverged: back") == 5 and common.all_finite(state(run.folder))


def test_a_disconnected_output_raises_the_alarm(launch):
    """Row 7: every epoch shows the loss beside both trivial ones; past the warm-up it says "no better". A
    report says so too of a network that is no better than the linear guess it starts from."""
    run = launch("EPOCHS=75", "PREDICTION=velocity", "EVAL_EVERY=25", *FAST, "MODE=image", fault=STUB + """
row = dict(value=0.99, floor=1.0, ceiling=None, better="lower", n=1)  # validation loss and linear guess
script.report = lambda folder, *rest: (folder.mkdir(), {"val_loss": row})[1]
script.loss_fn = lambda model, x_0, t, eps, **k: (
    (eps - x_0).square().flatten(1).mean(1) + 0 * sum(p.sum() for p in model.parameters()))""")
    assert run.code == 0, run.output
    lines = [line for line in run.output.splitlines() if re.match(r"epoch +\d+  loss", line)]
    assert len(lines) == 75 and all("linear guess 0." in line and "zero 1." in line for line in lines)
    assert [("ALARM" in line) for line in lines] == [3 * (i + 1) > 200 for i in range(75)]
    reports = re.findall(r"^epoch \d+: val_loss.*", run.output, re.M)
    assert [("ALARM" in line) for line in reports] == [False, False, True]


def test_evaluation_runs_before_training(launch):
    """Row 20: a broken number shows before the first step, not after hours."""
    run = launch("EPOCHS=2", fault=IMPORT + "script.segmenter_of = lambda *a: None\n"
                 "script.evaluate = lambda *a, **k: torch.zeros(2, 3) @ torch.zeros(2, 3)")
    assert run.code == 1 and "mat1" in run.output, run.output
    assert not (run.folder / "log.csv").exists()


def test_torchrun_matches_one_process(launch, home, tmp_path):
    """Two gloo processes give the losses of one, both augmentations' batches split alike."""
    fixed = ["MODE=seg_conditioned", "AUGMENT=sda", "EPOCHS=2", "ACCUM=2"]
    one = launch(*fixed)
    assert one.code == 0, one.output
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "cache").symlink_to(home / "cache")
    two = torchrun(tmp_path, STUB, f"OUT={tmp_path / 'two'}", *TINY, *fixed)
    assert two.returncode == 0, two.stderr[-3000:]
    folders = (one.folder, tmp_path / "two" / "3d_rflow")
    losses = [[float(row["loss"]) for row in log(folder)] for folder in folders]
    assert len(losses[0]) == len(losses[1]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_row_from_the_command_line(launch):
    """EXPERIMENT=name, with single settings on top of it."""
    run = launch("EXPERIMENT=exp2c_cpu", "SHAPE=8,8,8", "PATCH=1", "EPOCHS=1", "ATTENTION=False,False")
    assert run.code == 0, run.output
    kept = json.loads((run.folder / "settings.json").read_text())
    assert kept["MODE"] == "seg_conditioned_improved" and kept["COUNT_DROP"] == 0.25 and kept["WIDTH"] == 8
    assert kept["EMA_DECAY"] == 0 and kept["SHAPE"] == [8, 8, 8]
    refused(launch("EXPERIMENT=exp6a"), "ControlNet")
    refused(launch("EXPERIMENT=exp999"), "exp1_cpu")


# ---------------------------------------------------------------- folders, sample.py
@pytest.fixture(scope="module")
def bravo(launch):
    run = launch("MODE=bravo", "EPOCHS=2", fault=QUICK)
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="module")
def seg(launch):
    run = launch("MODE=seg_conditioned", "EPOCHS=1", "GUIDANCE=2.0", "T_END=0.0", "TRIES=2", fault=QUICK)
    assert run.code == 0, run.output
    return run


def shapes(folder):
    return {p.name: np.load(p).shape for p in folder.glob("*.npy")}


def test_folder_of_images(bravo):
    folder = bravo.folder / "epoch_0002"
    names = {p.name for p in folder.iterdir()}
    pictures = ("samples", "loss_by_t", "loss", "strip", "x0hat_by_t", "neighbours")
    assert {f"{n}.{end}" for n in pictures for end in ("png", "npy")} <= names, names
    assert {f"sample_0{i}{m}.nii.gz" for i in range(4) for m in ("", "_mask")} <= names
    assert {"metrics.json", "samples.txt"} <= names
    found = shapes(folder)
    assert found["samples.npy"] == (8, 1, *CORNERS) and found["features.npy"] == (8, 128)
    assert found["counts.npy"] == (8, 2, 7)
    assert found["loss_by_t.npy"] == (3, 16) and found["loss.npy"] == (4, 6)
    assert found["strip.npy"] == (9, 2, 12, 16)
    assert found["x0hat_by_t.npy"] == (6,) and found["neighbours.npy"] == (8, 2)
    samples = np.load(folder / "samples.npy")
    assert samples.dtype == np.float16 and 0 <= samples.min() and samples.max() <= 1
    assert all(p.stat().st_size > 2000 for p in folder.glob("*.png"))
    for name in ("last.pt", "best.pt", "log.csv", "settings.json", "train_3d_rflow.py", "metrics.json"):
        assert (bravo.folder / name).exists(), name
    assert len(log(bravo.folder)) == 6


def test_metrics_have_floor_and_ceiling(bravo, seg):
    def no(word):
        raise AssertionError(f"{word} in metrics.json")
    counted = "lesions_within_1 counts_exact lesions_within_1_first counts_exact_first"
    for run, epoch, more in ((bravo, 2, "dice lesions_within_1"), (seg, 1, counted)):
        table = json.loads((run.folder / f"epoch_000{epoch}" / "metrics.json").read_text(), parse_constant=no)
        both = "frechet_wavelet frechet_features ms_ssim_diversity memorised " + more
        for name in both.split():
            assert {"value", "floor", "ceiling", "better", "n"} == set(table[name])
            assert all(isinstance(table[name][k], float) for k in ("value", "floor", "ceiling")) or (
                name == "ms_ssim_diversity" and table[name]["ceiling"]), (name, table[name])
        assert isinstance(table["val_loss"]["floor"], float) and 0 < table["val_loss"]["value"] < 2
        calls = [4] if run is bravo else [6 + 6 * again / 8 for again in range(1, 9)]  # k of 8 twice
        assert table["evaluations"]["value"] in calls
        whole = json.loads((run.folder / "metrics.json").read_text(), parse_constant=no)
        assert whole["val_loss"] == table["val_loss"] and whole["parameters"] > 1000
        assert "val_loss" in run.output and "lesions_within_1" in run.output
    assert table["val_loss"]["n"] == 4


def test_files_for_viewers_have_the_right_spacing(bravo, seg):
    folder = bravo.folder / "epoch_0002"
    samples = np.load(folder / "samples.npy")
    for i in range(4):
        volume, affine, spacing = volumes.read_nifti(folder / f"sample_0{i}.nii.gz")
        assert np.allclose(spacing, (160 / 8, 200 / 12, 200 / 16)) and volume.shape == CORNERS
        assert np.abs(volume - samples[i, 0].astype(float)).max() < 1e-3 and volume.dtype == np.float32
        mask, *_, spacing = volumes.read_nifti(folder / f"sample_0{i}_mask.nii.gz")
        assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1} and np.allclose(spacing[0], 20)
    folder = seg.folder / "epoch_0001"
    mask, *_, spacing = volumes.read_nifti(folder / "sample_00.nii.gz")
    assert mask.dtype == np.uint8 and np.allclose(spacing, (96 / 8, 96 / 12, 96 / 16))
    assert np.array_equal(mask, np.load(folder / "samples.npy")[0, 0])
    assert not list(folder.glob("*_mask.nii.gz"))


def test_folder_of_masks(seg):
    folder = seg.folder / "epoch_0001"
    samples, counts = np.load(folder / "samples.npy"), np.load(folder / "counts.npy")
    assert set(np.unique(samples)) <= {0, 1} and counts.shape == (8, 2, 7)
    for i in range(8):
        assert counts[i, 1].tolist() == volumes.count_lesions(samples[i, 0] > 0, (12, 8, 6)).tolist()
    assert (counts[:, 0].sum(1) > 0).any() and (folder / "counts_by_size.png").exists()
    assert "asked" in (folder / "samples.txt").read_text()


@pytest.mark.parametrize("mode", ("bravo", "seg"))
def test_full_repeats_the_report(request, launch, tmp_path, mode):
    """sample.py --full: the same bits in every number and array, however long it took."""
    run, epoch = request.getfixturevalue(mode), dict(bravo=2, seg=1)[mode]
    cold = launch("--checkpoint", str(run.folder / "last.pt"), "--out", str(tmp_path), "--full",
                  program="sample", fault=QUICK)
    assert cold.code == 0, cold.output
    folder = run.folder / f"epoch_000{epoch}"
    names = {p.name for p in folder.iterdir()}
    assert names == {p.name for p in tmp_path.iterdir()}
    for name in sorted(n for n in names if n.endswith((".npy", ".nii.gz", ".txt"))):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    tables = [json.loads((f / "metrics.json").read_text()) for f in (folder, tmp_path)]
    for table in tables:
        table.pop("seconds_per_sample")
    assert tables[0] == tables[1]


def test_sample_py(launch, bravo, seg, tmp_path):
    last = str(bravo.folder / "last.pt")
    draw = ["--checkpoint", last, "--out", str(tmp_path), "--num-samples", "3"]
    assert launch(*draw, program="sample", fault=IMPORT).code == 0
    x = np.load(tmp_path / "samples.npy")
    assert x.shape == (3, 1, *CORNERS) and (tmp_path / "samples.png").exists()
    volume, _, spacing = volumes.read_nifti(tmp_path / "sample_02.nii.gz")
    assert np.allclose(volume, x[2, 0], atol=1e-6) and np.allclose(spacing, (20, 200 / 12, 12.5))
    assert launch(*draw, program="sample", fault=IMPORT).code == 0
    assert np.array_equal(x, np.load(tmp_path / "samples.npy"))
    for more in (["--seed", "1"], ["--sampling-steps", "7"], ["SOLVER=bosh3"]):
        assert launch(*draw, *more, program="sample", fault=IMPORT).code == 0
        assert not np.array_equal(x, np.load(tmp_path / "samples.npy")), more
    refused(launch(*draw, "--prompt", "0,0,0,1,0,2,0", program="sample", fault=IMPORT), "takes none")
    out = launch("--checkpoint", last, "--out", str(tmp_path / "small.pt"), "--export", program="sample",
                 fault=IMPORT)
    assert out.code == 0, out.output
    out = launch("--checkpoint", str(tmp_path / "small.pt"), "--out", str(tmp_path), "--num-samples", "3",
                 program="sample", fault=IMPORT)
    assert out.code == 0 and np.array_equal(x, np.load(tmp_path / "samples.npy")), out.output


def test_prompts_are_counts(launch, seg, tmp_path):
    draw = ["--checkpoint", str(seg.folder / "last.pt"), "--out", str(tmp_path), "--num-samples", "2"]
    seen = []
    for prompt in ("0,0,0,0,0,0,0", " 0, 0,0,1,0,10,0 "):
        run = launch(*draw, "--prompt", prompt, program="sample", fault=IMPORT + """
def see(model, seeds, condition, old=script.sample):
    print("asked", condition["counts"].tolist())
    return old(model, seeds, condition)
script.sample = see""")
        assert run.code == 0, run.output
        seen.append(re.search(r"asked (.*)", run.output)[1])
        asked, got = json.loads(seen[-1])[0], np.load(tmp_path / "samples.npy")
        fit = sum(volumes.count_lesions(x[0] > 0, (12, 8, 6)).tolist() == asked for x in got)
        assert f"as asked for in {fit} of 2 masks (TRIES=2)" in run.output
    assert seen == [str([[0] * 7] * 2), str([[0, 0, 0, 1, 0, 10, 0]] * 2)]
    for prompt in ("three", "0,0,0,1,0,2", "0,0,0,1,0,2,0,0", "0,0,0,1,0,11,0", "0,0,x,0,1,0,2,0",
                   "0,0,0,1,0,2,0,oops", "-3,0,0,0,1,0,2,0", "0,0,0,1.5,0,2,0", "\u00b2,0,0,0,0,0,0"):
        refused(launch(*draw, f"--prompt={prompt}", program="sample", fault=IMPORT), "7 counts up to 10")


def test_sweep(launch, bravo):
    """Every solver setting from the same noise: a row each, and euler nears the exact solution."""
    refused(launch("SWEEP=all"), "does not exist")
    refused(launch("SWEEP=euler,heun9"), "all, or some of euler")
    run = launch("SWEEP=all", "MODE=seg", "TRAIN=10", "WIDTH=16", out=bravo.out, fault=QUICK + """
class Exact(torch.nn.Module):
    def __init__(self, channels, shape):
        super().__init__()
        self.register_buffer("mu", torch.zeros(1, channels, *shape))
    def forward(self, x, t, mask):
        s, m, d = t.view(-1, 1, 1, 1, 1), 0.5 + 0.2 * mask, 0.1
        return -m + (s - (1 - s) * d**2) / ((1 - s) ** 2 * d**2 + s**2) * (x - (1 - s) * m)
script.build_ema = lambda checkpoint, data, device: Exact(1, data.mu.shape[1:])""")
    assert run.code == 0, run.output
    rows = np.load(bravo.folder / "solver_sweep_all_0.02.npy")
    assert rows.shape == (33, 8) and (bravo.folder / "solver_sweep_all_0.02.png").exists() and np.isfinite(rows).all()
    lines = (bravo.folder / "solver_sweep_all_0.02.md").read_text().splitlines()
    assert len(lines) == 35 and lines[2].startswith("| euler | 5 | 6 |")
    for i, stages in enumerate(STAGES.values()):
        part = rows[5 * i:5 * i + 5]
        assert part[:, 1].tolist() == [stages * n + 1 for n in (5, 10, 25, 50, 100)]
        assert (np.diff(part[:, 6]) < 1e-6).all() and part[-1, 6] < 0.004, i
    assert rows[26::2, 6].max() < 0.05 and (rows[:, 3] <= rows[:, 4]).all(), rows[25:]


# ---------------------------------------------------------------- own data, bad input
SPACING = (1.5, 0.9375, 0.9375)


@pytest.fixture(scope="module")
def brains(tmp_path_factory):
    """A folder of 60 volumes 8 x 12 x 16 with masks of two labels."""
    folder, rng = tmp_path_factory.mktemp("brains"), np.random.default_rng(0)
    for i in range(60):
        image = rng.random(CORNERS, np.float32)
        mask = np.zeros(CORNERS, np.uint8)
        mask[2:4, 3:6, 4:4 + i % 3 + 2], mask[5:7, 8:10, 10:13] = 1, 2
        volumes.write_nifti(folder / f"case{i:02d}.nii.gz", image + mask, SPACING)
        volumes.write_nifti(folder / f"case{i:02d}_seg.nii.gz", mask, SPACING)
    return folder


def test_own_files_in_and_out(launch, brains):
    """A whole run on two labels: a mask channel for each, and files of the spacing that came in."""
    run = launch(f"DATA={brains}", "LABELS=2", "MODE=bravo_seg_cond", "EPOCHS=1", fault=QUICK)
    assert run.code == 0, run.output
    folder = run.folder / "epoch_0001"
    volume, _, spacing = volumes.read_nifti(folder / "sample_00.nii.gz")
    mask, *_ = volumes.read_nifti(folder / "sample_00_mask.nii.gz")
    assert np.allclose(spacing, SPACING) and volume.shape == CORNERS and set(np.unique(mask)) == {0, 1, 2}
    assert state(run.folder)["channels"] == [1, 2]
    assert np.load(folder / "samples.npy").shape == (8, 1, *CORNERS)
    run = launch(f"DATA={brains}", "LABELS=2", "MODE=seg", "EPOCHS=1")
    assert run.code == 0 and state(run.folder)["channels"] == [2, 0], run.output


BAD = {
    "SHAPE=9,12,16": "does not divide", "SHAPE=8,8": "three sides", "SHAPE=4,8,8": "at least 8",
    "SHAPE=8,a": "SHAPE", "MODE=bravoo": "one of bravo", "SOLVER=rk5": "one of euler",
    "BACKBONE=vit": "one of unet", "PREDICTION=eps": "one of residual", "TIME=cosine": "one of mixture",
    "AUGMENT=all": "one of none", "WIDTH=9": "divisible by 8", "EPOCHS=0": "above 0", "MULTS=0,1": "MULTS",
    "MULTS=1,1,1 SHAPE=8,8,8": "one entry for each level", "SAMPLES=4": "at least 8", "TRAIN=1": "TRAIN=1",
    "LABELS=0 DATA=/nowhere": "LABELS=0", "LABELS=2": "label 1 alone", "T_END=0.9": "T_END",
    "LRR=1": "did you mean LR", "BACKBONE=dit DIM=26 HEADS=4": "DIM=26", "TOLERANCE=0": "TOLERANCE",
    "BACKBONE=dit DIM=28 HEADS=4": "DIM=28", "DATA=/nowhere": "not found",
    "OUT=/proc/nowhere": "cannot write"}


@pytest.mark.parametrize("setting", BAD)
def test_bad_settings(launch, setting):
    """Each mistake is one clear line and exit code 2, and makes no checkpoint."""
    run = launch("EPOCHS=1", *setting.split(" "))
    refused(run, BAD[setting])
    assert not list(run.folder.rglob("last.pt"))


def four_axes(path):
    """The same file with a fourth axis of two volumes."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[40:56] = np.array([4, 16, 12, 8, 2, 1, 1, 1], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(raw) + bytes(raw[352:])))


def rewritten(path, change):
    volume, affine, spacing = volumes.read_nifti(path)
    volumes.write_nifti(path, change(volume.copy()), spacing)


def with_value(value):
    def change(volume):
        volume[1, 2, 3] = value
        return volume
    return change


FILES = {"truncated": ("case07.nii.gz", lambda p: os.truncate(p, p.stat().st_size // 2), "cut off"),
         "nan": ("case07.nii.gz", lambda p: rewritten(p, with_value(np.nan)), "NaN"),
         "four axes": ("case07.nii.gz", four_axes, "expected one volume, found 2"),
         "another shape": ("case07_seg.nii.gz", lambda p: rewritten(p, lambda v: v[:, 1:]), "8x12x16"),
         "label": ("case07_seg.nii.gz", lambda p: rewritten(p, with_value(3)), "labels 0..2"),
         "no mask": ("case07_seg.nii.gz", lambda p: p.unlink(), "expected a mask"),
         "text": ("case07.nii.gz", lambda p: p.write_text("hello"), "NIfTI")}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(launch, brains, tmp_path, name):
    """One line that names the file and what was expected, before anything is trained."""
    file, damage, said = FILES[name]
    shutil.copytree(brains, tmp_path / "brains")
    damage(tmp_path / "brains" / file)
    run = launch(f"DATA={tmp_path / 'brains'}", "LABELS=2", "MODE=bravo", "EPOCHS=1")
    refused(run, "case07", said)
    assert not list(run.folder.rglob("last.pt"))


def test_too_few_files(launch, brains, tmp_path):
    for file in ("case00.nii.gz", "case00_seg.nii.gz"):
        shutil.copy(brains / file, tmp_path)
    refused(launch(f"DATA={tmp_path}", "LABELS=2", "EPOCHS=1"), "give more")
    (tmp_path / "empty").mkdir()
    refused(launch(f"DATA={tmp_path / 'empty'}", "EPOCHS=1"), "found none")


@pytest.mark.parametrize("kind", ("image", "mask", "validation"))
def test_a_run_on_other_data_is_not_continued(launch, brains, tmp_path, kind):
    shutil.copytree(brains, tmp_path / "brains")
    at = [f"DATA={tmp_path / 'brains'}", "LABELS=2", "MODE=bravo"]
    run = launch(*at, "EPOCHS=1")
    assert run.code == 0, run.output
    data = volumes.load_folder(tmp_path / "brains", CORNERS, 1, 2, cache=run.out / "cache")
    case = (data.val if kind == "validation" else data.train).names[0]
    if kind == "mask":
        rewritten(tmp_path / "brains" / f"{case}_seg.nii.gz", with_value(2))
    else:
        rewritten(tmp_path / "brains" / f"{case}.nii.gz", lambda v: v[::-1])
    before = (run.folder / "last.pt").read_bytes()
    refused(launch(*at, "EPOCHS=2", out=run.out), "other data")
    assert (run.folder / "last.pt").read_bytes() == before


def test_damaged_checkpoints(launch, tmp_path):
    run = launch("EPOCHS=1", "MODE=image")
    good = torch.load(run.folder / "last.pt", weights_only=True)
    smaller = {k: v for k, v in good["model"].items() if k != "mu"}
    for content, said in ((dict(good, data="other"), "other data"), (dict(good, optimizer={}), "optimizer"),
                          (dict(good, model=smaller), "missing mu"),
                          (dict(good, script="train_lm"), "train_lm.py"),
                          ({k: v for k, v in good.items() if k != "guard"}, "no 'guard'")):
        torch.save(content, run.folder / "last.pt")
        refused(launch("EPOCHS=2", "MODE=image", out=run.out), said)
    torch.save(dict(good, data="other"), run.folder / "last.pt")
    refused(launch("--checkpoint", str(run.folder / "last.pt"), "--out", str(tmp_path), "--full",
                   program="sample", fault=IMPORT), "other data")
