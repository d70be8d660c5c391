"""win_rates and pair_loss: every back end against the N x N expression, properties, memory, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import windkern as wk
from windkern import _checks, naive
from windkern.ops.pairs import LINKS, LOSSES

CASES = [(loss, link, given) for loss in LOSSES for link in LINKS for given in ("rewards", "prefs")]


def group(groups=3, n=13, dtype=torch.float64):
    """Return scores and rewards with ties, gaps beyond the hinge, and one large gap."""
    scores = 2 * torch.randn(groups, n, dtype=dtype)
    rewards = torch.randn(groups, n, dtype=dtype).round(decimals=1)
    if n > 3:
        rewards[:, 1] = rewards[:, 0]
        scores[:, 2] = 60.0
    return scores, rewards


def arguments(rewards, link, given):
    return {"rewards": rewards, "link": link} if given == "rewards" else {"prefs": naive.preferences(rewards, link)}


@pytest.mark.parametrize(("loss", "link", "given"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [2, 13, 70])
def test_parity(backend, loss, link, given, dtype, masked, n):
    scores, rewards = group(n=n, dtype=dtype)
    where = torch.rand(3, n) < 0.6 if masked else None
    given = arguments(rewards, link, given)
    leaf, exact_leaf = scores.clone().requires_grad_(), scores.double().requires_grad_()
    ours = wk.pair_loss(leaf, loss=loss, where=where, reduction="none", backend=backend, **given)
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    exact = naive.pair_loss(exact_leaf, loss=loss, where=where, reduction="none", **wide)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(ours.double(), exact, **tolerance)
    upstream = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (got,) = torch.autograd.grad(ours, leaf, upstream.to(dtype))
    (want,) = torch.autograd.grad(exact, exact_leaf, upstream)
    torch.testing.assert_close(got.double(), want, **tolerance)
    rates = wk.win_rates(**given, where=where, backend=backend)
    torch.testing.assert_close(rates.double(), naive.win_rates(**wide, where=where), **tolerance)


@pytest.mark.parametrize("loss", ["square", "logistic"])
def test_gradcheck(backend, loss):
    scores, rewards = group(n=6)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: wk.pair_loss(s, rewards=rewards, loss=loss, reduction="none", backend=backend), scores
    )


def check_well_ordered(backend, loss, dtype):
    """Small losses and slopes keep their relative digits: no term near 1 is added and subtracted again."""
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    for gap in (0.6, 12.0, 16.0, 25.0, 60.0):
        scores = gap * torch.arange(5, dtype=dtype).flip(0).unsqueeze(0)
        rewards = (gap + 0.7) * torch.arange(5, dtype=dtype).flip(0).unsqueeze(0)
        for link, source in (("step", "rewards"), ("step", "prefs"), ("bradley_terry", "rewards")):
            leaf, exact = scores.clone().requires_grad_(), scores.double().requires_grad_()
            ours = wk.pair_loss(leaf, loss=loss, backend=backend, **arguments(rewards, link, source))
            d = exact.unsqueeze(-1) - exact.unsqueeze(-2)  # (1, 5, 5)
            r = rewards.double().unsqueeze(-1) - rewards.double().unsqueeze(-2)
            p = torch.sigmoid(r) if link == "bradley_terry" else 0.5 * (1 + r.sign())
            terms = {
                "square": lambda d=d, p=p: (d - (p - 0.5)).square(),
                "logistic": lambda d=d, p=p: -p * torch.nn.functional.logsigmoid(d),
                "hinge": lambda d=d, p=p: p * (1 - d).clamp(min=0),
            }[loss]()
            want = (terms * (1 - torch.eye(5, dtype=torch.float64))).sum() / 20
            torch.testing.assert_close(ours.double(), want, rtol=tolerance, atol=0)
            (got,) = torch.autograd.grad(ours, leaf)
            (slope,) = torch.autograd.grad(want, exact)
            # The slopes of one response come from both sides and can cancel: relative to the largest of the group.
            torch.testing.assert_close(got.double(), slope, rtol=tolerance, atol=tolerance * float(slope.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_well_ordered_groups_are_exact(backend, loss, dtype):
    check_well_ordered(backend, loss, dtype)


def check_diagonal(backend):
    """P_ii counts as 1/2 whatever the kernel is given there: on a GPU nothing checks it first."""
    kernels = wk.backends.BACKENDS[backend].kernels()
    rewards = torch.randn(2, 37)
    prefs = naive.preferences(rewards)
    exact = naive.win_rates(prefs)
    for value in (0.0, torch.nan, 7.0):
        broken = prefs.clone()
        broken.diagonal(dim1=1, dim2=2).fill_(value)
        torch.testing.assert_close(kernels.win_rates(broken, None, None, "step"), exact)
        torch.testing.assert_close(naive.win_rates(broken), exact)
        for loss in LOSSES:
            right, wrong = (kernels.pair_terms(rewards, given, None, None, "step", loss) for given in (prefs, broken))
            assert all(torch.equal(one, two) for one, two in zip(right, wrong, strict=True))


def test_the_diagonal_counts_one_half(backend):
    check_diagonal(backend)


@pytest.mark.parametrize(
    ("prefs", "match"),
    [
        ([[0.5, 7.0], [-3.0, 0.5]], r"prefs must lie in \[0, 1\]"),
        ([[0.5, 1.0], [1.0, 0.5]], "must be 1 .* off by up to 1;"),
        ([[0.5, torch.nan], [torch.nan, 0.5]], "hold no NaN"),
        ([[0.0, 0.7], [0.3, 0.0]], "1/2 on the diagonal"),
        ([[torch.nan, 0.7], [0.3, torch.nan]], "hold no NaN"),
    ],
)
def test_preferences_are_checked_as_the_losses_do(backend, prefs, match):
    prefs = torch.tensor([prefs])
    for call in (
        lambda: wk.win_rates(prefs, backend=backend),
        lambda: wk.pair_loss(torch.zeros(1, 2), prefs, backend=backend),
        lambda: wk.losses.sppo(torch.zeros(1, 2), torch.zeros(1, 2), prefs, eta=1.0),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    # Entries that take no part can hold anything: two good responses next to a bad one, and a group that is masked.
    wide = torch.full((2, 3, 3), 0.5)
    wide[0, 2], wide[0, :, 2], wide[1] = torch.nan, 7.0, torch.nan
    where = torch.tensor([[True, True, False], [True, False, False]])
    assert wk.win_rates(wide, where=where, backend=backend).tolist() == [[0.5, 0.5, 0], [0.5, 0, 0]]
    assert wk.pair_loss(torch.zeros(2, 3), wide, where=where, backend=backend) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rewards_must_be_finite(backend, bad):
    rewards = torch.tensor([[1.0, bad, 0.0]])
    where = torch.tensor([[True, False, True]])
    for call in (
        lambda **options: wk.win_rates(rewards=rewards, backend=backend, **options),
        lambda **options: wk.pair_loss(torch.zeros(1, 3), rewards=rewards, backend=backend, **options),
    ):
        with pytest.raises(ValueError, match="rewards must be finite for every response that is not masked"):
            call()
        assert call(where=where).isfinite().all()


def test_large_preferences_are_checked_in_blocks(monkeypatch):
    """Checks by blocks of rows and of groups find what one check would, asymmetry across blocks included."""
    monkeypatch.setattr(_checks, "_PREFS_BLOCK", 30)
    for shape in ((4, 3), (2, 13), (1, 37)):
        prefs = naive.preferences(torch.randn(shape))
        wk.win_rates(prefs)
        prefs[-1, -1, 0] += 0.01
        with pytest.raises(ValueError, match=r"off by up to 0\.01"):
            wk.win_rates(prefs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, reduction):
    scores, rewards = group()
    ours = wk.pair_loss(scores, rewards=rewards, reduction=reduction, backend=backend)
    torch.testing.assert_close(ours, naive.pair_loss(scores, rewards=rewards, reduction=reduction))


@pytest.mark.parametrize("loss", LOSSES)
def test_masked_responses_equal_dropped_ones_even_as_nan(backend, loss):
    scores, rewards = group(groups=1)
    where = torch.rand(1, 13) < 0.5
    where[0, :2] = True
    broken_scores, broken_rewards = (torch.where(where, value, torch.nan) for value in (scores, rewards))
    leaf = broken_scores.requires_grad_()
    small = scores[where].unsqueeze(0).requires_grad_()
    ours = wk.pair_loss(leaf, rewards=broken_rewards, loss=loss, where=where, backend=backend)
    dropped = wk.pair_loss(small, rewards=rewards[where].unsqueeze(0), loss=loss, backend=backend)
    torch.testing.assert_close(ours, dropped)
    (grad,), (want,) = torch.autograd.grad(ours, leaf), torch.autograd.grad(dropped, small)
    torch.testing.assert_close(grad[where], want[0])
    assert torch.equal(grad[~where], torch.zeros_like(grad[~where]))


@pytest.mark.parametrize("left", [0, 1])
def test_groups_with_fewer_than_two_contribute_zero(backend, left):
    scores, rewards = group()
    where = torch.ones(3, 13, dtype=torch.bool)
    where[1] = torch.arange(13) < left
    scores.requires_grad_()
    per_group = wk.pair_loss(scores, rewards=rewards, where=where, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(per_group.sum(), scores)
    assert per_group[1] == 0 and torch.equal(grad[1], torch.zeros_like(grad[1]))
    mean = wk.pair_loss(scores, rewards=rewards, where=where, backend=backend)
    torch.testing.assert_close(mean, per_group.sum() / 3)


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(0, 2**31), st.sampled_from(LOSSES), st.sampled_from(LINKS), st.floats(-50, 50))
def test_permutation_shift_and_antisymmetry(n, seed, loss, link, shift):
    torch.manual_seed(seed)
    scores, rewards = group(groups=2, n=n)
    scores.requires_grad_()

    def both(s, r):
        value = wk.pair_loss(s, rewards=r, link=link, loss=loss, reduction="none")
        return value.detach(), torch.autograd.grad(value.sum(), s)[0]

    value, grad = both(scores, rewards)
    order = torch.randperm(n)
    moved = both(scores.detach()[:, order].requires_grad_(), rewards[:, order])
    torch.testing.assert_close(moved, (value, grad[:, order]))
    shifted = both((scores.detach() + shift).requires_grad_(), rewards + 3.0 if link == "step" else rewards)
    torch.testing.assert_close(shifted, (value, grad), rtol=1e-7, atol=1e-9)
    mirrored = both((-scores.detach()).requires_grad_(), -rewards)
    torch.testing.assert_close(mirrored, (value, -grad))
    torch.testing.assert_close(grad.sum(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_win_rates_average_to_one_half(backend):
    _, rewards = group()
    for link in LINKS:
        rates = wk.win_rates(rewards=rewards, link=link, backend=backend)
        torch.testing.assert_close(rates.mean(-1), torch.full((3,), 0.5, dtype=torch.float64))


def test_square_is_the_pair_objective_of_wind(backend):
    """c^2 * pair_loss(s / c) with prefs is wind's square_pair of the same scores."""
    scores, rewards = group()
    prefs = naive.preferences(rewards)
    eta, beta = 0.7, 0.4
    c = eta / (1 + eta * beta)
    zero = torch.zeros_like(scores)
    wind = wk.losses.wind(scores, zero, zero, prefs, eta=eta, beta=beta, objective="square_pair")
    torch.testing.assert_close(c**2 * wk.pair_loss(scores / c, prefs, backend=backend), wind)


def test_large_groups_take_linear_memory(backend):
    """N = 4096: nothing of size N x N (64 MiB) is allocated."""
    n = 4096
    scores, rewards = torch.randn(1, n), torch.randn(1, n)
    leaf = scores.requires_grad_()
    sizes = []

    class Witness(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(
                value.numel()
                for value in (result if isinstance(result, tuple) else (result,))
                if isinstance(value, torch.Tensor)
            )
            return result

    kernels = wk.backends.BACKENDS[backend].kernels()
    with Witness():
        kernels.pair_terms(leaf.detach(), None, rewards, None, "bradley_terry", "logistic")
        kernels.win_rates(None, rewards, None, "step")
    assert max(sizes) <= 1 << 18 < n * n / 16
    wk.pair_loss(leaf, rewards=rewards, backend=backend).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("fault", ["value", "slope", "link", "mask"])
def test_planted_faults_are_caught(fault, monkeypatch):
    from windkern.kernels.torch import pairs as torch_pairs
    from windkern.kernels.torch import rows as torch_rows

    def broken(scores, prefs, rewards, where, link, loss):
        link = {"bradley_terry": "step", "step": "bradley_terry"}[link] if fault == "link" else link
        value, slope = torch_pairs.pair_terms(scores, prefs, rewards, None if fault == "mask" else where, link, loss)
        return value * (1.01 if fault == "value" else 1), slope * (0 if fault == "slope" else 1)

    monkeypatch.setattr(torch_rows, "pair_terms", broken)
    with pytest.raises(AssertionError):
        test_parity("torch", "logistic", "step", "rewards", torch.float64, True, 13)


def test_opcheck_and_compile(backend):
    torch.use_deterministic_algorithms(False)
    scores, rewards = group(dtype=torch.float32)
    where = torch.rand(3, 13) < 0.7
    options = ("step", "square", backend)
    torch.library.opcheck(torch.ops.windkern.pair_terms.default, (scores, None, rewards, where, *options))
    torch.library.opcheck(torch.ops.windkern.win_rates.default, (None, rewards, where, "step", backend))


def test_no_groups_and_no_responses(backend):
    for shape in ((0, 4), (2, 0), (2, 1)):
        scores = torch.zeros(shape, requires_grad=True)
        loss = wk.pair_loss(scores, rewards=torch.zeros(shape), backend=backend)
        loss.backward()
        assert loss.item() == 0 and scores.grad.shape == shape
        assert wk.win_rates(rewards=torch.zeros(shape), backend=backend).shape == shape


SCORES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({}, ValueError, "exactly one of prefs and rewards, got neither"),
        ({"rewards": SCORES, "prefs": torch.zeros(2, 3, 3)}, ValueError, "got both"),
        ({"rewards": torch.zeros(2, 3, 3)}, ValueError, r"rewards must have shape \(B, N\), got \(2, 3, 3\)"),
        ({"prefs": torch.zeros(2, 3, 4)}, ValueError, r"prefs must have shape \(B, 3, 3\)"),
        ({"rewards": torch.zeros(2, 4)}, ValueError, r"scores must have shape \(2, 4\), got \(2, 3\)"),
        ({"rewards": SCORES.double()}, TypeError, "rewards must have the dtype of scores"),
        ({"rewards": SCORES.half()}, TypeError, "rewards must be float32 or float64"),
        ({"rewards": torch.zeros(2, 3, requires_grad=True)}, ValueError, "rewards requires grad"),
        ({"rewards": SCORES, "link": "logit"}, ValueError, "link must be one of 'bradley_terry', 'step'"),
        (
            {"rewards": SCORES, "where": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"where must have shape \(2, 3\)",
        ),
        ({"rewards": SCORES, "reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"rewards": SCORES, "where": SCORES}, TypeError, r"where must be torch.bool, got torch.float32"),
        (
            {"rewards": SCORES, "where": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"where must have shape \(2, 3\)",
        ),
    ],
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        wk.pair_loss(SCORES, **kwargs)
