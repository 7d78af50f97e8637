import pytest
import torch

from marble import AffineLoss, nft_loss, reference_gradients


@pytest.fixture
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()


@pytest.fixture
def loss(network):
    torch.manual_seed(1)
    x0, old, x = torch.randn(3, 6, 4, dtype=torch.float64)
    return nft_loss(x0, network(x), old, beta=0.5, amax=5.0)


def flat(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def test_equals_one_backward_a_reward(network, loss):
    advantages = torch.randn(6, 3, dtype=torch.float64) * 4
    rows = reference_gradients(loss, advantages, list(network.parameters()))
    for k in range(3):
        network.zero_grad()
        loss.at(advantages[:, k]).mean().backward(retain_graph=True)
        torch.testing.assert_close(rows[k], flat(network), atol=1e-12, rtol=1e-12)


def test_a_mixture_of_gradients_is_the_gradient_of_the_mixture(network, loss):
    """What amortising rests on: exact once every advantage is clipped before it is combined."""
    advantages = (torch.randn(6, 3, dtype=torch.float64) * 4).clamp(-5, 5)
    alpha = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    parameters = list(network.parameters())
    rows = reference_gradients(loss, torch.cat([advantages, (advantages @ alpha)[:, None]], dim=1), parameters)
    torch.testing.assert_close(alpha @ rows[:3], rows[3], atol=1e-12, rtol=1e-10)


def test_average_over_the_applicable_images_only(network, loss):
    advantages = torch.randn(6, 1, dtype=torch.float64)
    applies = torch.tensor([[True], [True], [False], [False], [True], [False]])
    parameters = list(network.parameters())
    row = reference_gradients(loss, advantages, parameters, applies)[0]
    network.zero_grad()
    loss.at(advantages[:, 0])[applies[:, 0]].mean().backward(retain_graph=True)
    torch.testing.assert_close(row, flat(network), atol=1e-12, rtol=1e-10)
    none = reference_gradients(loss, advantages, parameters, torch.zeros_like(applies))
    assert none.abs().max() == 0


def test_parameter_that_is_not_used_gets_zero(network, loss):
    extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    rows = reference_gradients(loss, torch.ones(6, 2, dtype=torch.float64), [extra, *network.parameters()])
    assert rows[:, :3].abs().max() == 0


def test_refuses_bad_input(network, loss):
    parameters = list(network.parameters())
    with pytest.raises(ValueError, match=r"\[N=6, K\]"):
        reference_gradients(loss, torch.ones(5, 2), parameters)
    with pytest.raises(ValueError, match="finite"):
        reference_gradients(loss, torch.full((6, 1), torch.inf), parameters)
    parameters[0].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        reference_gradients(loss, torch.ones(6, 2), parameters)


def test_affine_loss_without_graph_through_slope():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    loss = AffineLoss(const=weight * torch.tensor([1.0, 3.0]), slope=torch.zeros(2))
    assert reference_gradients(loss, torch.ones(2, 1), [weight]).item() == pytest.approx(2.0)
