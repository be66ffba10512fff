import pytest
import torch

from hm.errors import UserError
from hm.feature_maps import HedgehogFeatureMap


def randomized(per_head: bool, softmax: str = "joint", heads: int = 3, d: int = 4) -> HedgehogFeatureMap:
    phi = HedgehogFeatureMap(heads, d, per_head=per_head, softmax=softmax).double()
    torch.manual_seed(0)
    with torch.no_grad():
        phi.weight.normal_()
        phi.bias.normal_()
    return phi


def plain(phi: HedgehogFeatureMap, x: torch.Tensor) -> torch.Tensor:
    """The formula, one token and one head at a time."""
    out = torch.empty(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
        W, bias = (phi.weight[h], phi.bias[h]) if phi.per_head else (phi.weight, phi.bias)
        positive = [
            sum(W[i, j] * x[b, t, h, j] for j in range(x.shape[3])) + bias[i] for i in range(x.shape[3])
        ]
        u = torch.stack([*positive, *[-p for p in positive]]).exp()
        halves = u.chunk(2)
        out[b, t, h] = u / u.sum() if phi.softmax == "joint" else torch.cat([s / s.sum() for s in halves])
    return out


@pytest.mark.parametrize("softmax", ["joint", "separate"])
@pytest.mark.parametrize("per_head", [False, True])
def test_equals_the_plain_formula(per_head, softmax):
    phi = randomized(per_head, softmax)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(phi(x), plain(phi, x))


@pytest.mark.parametrize("per_head", [False, True])
def test_starts_as_the_softmax_of_x_and_minus_x(per_head):
    x = torch.randn(2, 5, 3, 4)
    phi = HedgehogFeatureMap(3, 4, per_head=per_head)
    expected = torch.cat([x, -x], dim=-1).softmax(-1)
    torch.testing.assert_close(phi(x), expected)
    with torch.no_grad():
        phi.weight.add_(1.0)
        phi.bias.add_(1.0)
    phi.reset_parameters()
    torch.testing.assert_close(phi(x), expected)


def test_features_are_positive_and_sum_to_one_jointly_or_two_separately():
    x = 3 * torch.randn(2, 5, 3, 4, dtype=torch.float64)
    for softmax, total in (("joint", 1.0), ("separate", 2.0)):
        features = randomized(False, softmax)(x)
        assert (features > 0).all()
        torch.testing.assert_close(features.sum(-1), torch.full((2, 5, 3), total, dtype=torch.float64))


def test_the_form_of_fla_is_the_joint_form_with_doubled_parameters():
    x = torch.randn(1, 5, 3, 4, dtype=torch.float64)
    phi = randomized(False)
    u = x @ phi.weight.T + phi.bias
    with torch.no_grad():
        phi.weight.mul_(2)
        phi.bias.mul_(2)
    torch.testing.assert_close(phi(x), torch.cat([2 * u, -2 * u], dim=-1).softmax(-1))


def test_a_shared_map_of_pythia_1b_adds_2_1_million_parameters_and_one_per_head_16_8():
    with torch.device("meta"):
        shared, per_head = (HedgehogFeatureMap(8, 256, per_head=p) for p in (False, True))
    maps = 16 * 2
    assert sum(p.numel() for p in shared.parameters()) * maps == 2_105_344
    assert sum(p.numel() for p in per_head.parameters()) * maps == 8 * 2_105_344
    assert shared.out_dim == 512


def test_softmax_of_bfloat16_input_is_computed_in_float32():
    x = torch.randn(2, 64, 3, 4).bfloat16()
    phi = HedgehogFeatureMap(3, 4).bfloat16()
    assert phi(x).dtype == torch.bfloat16
    exact = torch.cat([x, -x], dim=-1).float().softmax(-1)
    assert torch.equal(phi(x), exact.bfloat16())


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_are_right(per_head):
    phi = randomized(per_head, heads=2, d=3)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, weight, bias):
        return torch.func.functional_call(phi, {"weight": weight, "bias": bias}, (x,))

    torch.autograd.gradcheck(run, (x, phi.weight, phi.bias))


def test_unknown_softmax_is_refused_by_name():
    with pytest.raises(UserError, match=r"feature_map\.softmax='sparse'.*joint.*separate"):
        HedgehogFeatureMap(3, 4, softmax="sparse")
