"""Steps with noise and their log-probabilities against numbers worked out by hand."""

import math

import pytest
import torch

from marble.noise import NoiseLevels, Trajectory, transitions_of

HALF_LOG_2PI = 0.9189385


def levels(alphas, sigmas, prediction):
    return NoiseLevels(torch.tensor(alphas), torch.tensor(sigmas), torch.zeros(len(sigmas)), prediction)


def flow(*sigmas):
    return levels([1 - s for s in sigmas], list(sigmas), "flow_prediction")


def row(*values):
    return torch.tensor([values])


def test_a_flows_steps_by_hand():
    # a = 0.8. From 1 to 0.5, where the next level stands in: s² = 0.64 / 0.5 = 1.28, std = sqrt(1.28 · 0.5) = 0.8,
    # keep = 1 − 1.28 · 0.5 / 2 = 0.68, gain = −0.5. From 0.5 to 0.25: s² = 0.64, std = 0.8 · 0.5 = 0.4,
    # keep = 1 − 0.64 · 0.25 = 0.84, gain = −1.32 · 0.25 = −0.33. The last step is Euler's: keep 1, gain −0.25.
    steps = transitions_of(flow(1.0, 0.5, 0.25), (1.0, 0.0), noise=0.8)
    torch.testing.assert_close(steps.keep, torch.tensor([0.68, 0.84, 1.0]))
    torch.testing.assert_close(steps.gain, torch.tensor([-0.5, -0.33, -0.25]))
    torch.testing.assert_close(steps.std, torch.tensor([0.8, 0.4, 0.0]))
    torch.testing.assert_close(steps.unit, torch.tensor([math.sqrt(1.28), 0.8, 0.0]))


def test_a_flows_log_probability_by_hand_is_a_mean_over_dimensions():
    step = transitions_of(flow(1.0, 0.5, 0.25), (1.0, 0.0), noise=0.8)[torch.tensor([1])]
    # x = 2, v = 1: mean 1.68 − 0.33 = 1.35; x = 1, v = −2: mean 0.84 + 0.66 = 1.5
    mean = step.mean(row(2.0, 1.0), row(1.0, -2.0))
    torch.testing.assert_close(mean, row(1.35, 1.5))
    # one standard deviation off and none: −0.5 + 0.9162907 − 0.9189385 = −0.5026478 and −0.0026478
    found = step.log_prob(row(1.75, 1.5), mean)
    torch.testing.assert_close(found, torch.tensor([-0.2526478]))  # their mean, not their sum −0.5052956
    torch.testing.assert_close(step.log_prob(row(1.75), mean[:, :1]), torch.tensor([-0.5026478]))


def test_the_divergence_is_flow_grpos():
    step = transitions_of(flow(1.0, 0.5, 0.25), (1.0, 0.0), noise=0.8)[torch.tensor([1])]
    # mean (0.2², 0.4²) = 0.1 over 2 · 0.64: std without sqrt(−dt)
    torch.testing.assert_close(step.divergence(row(1.0, 1.0), row(1.2, 0.6)), torch.tensor([0.078125]))


# alpha 0.6 → 0.8: std² = 0.36 / 0.64 · (1 − 0.36 / 0.64) = 0.24609375, rest = sqrt(0.36 − 0.24609375) = 0.3375.
# x0 = 1 and noise 0.5, so x = 1, however the network puts it; mean = 0.8 + 0.3375 · 0.5 = 0.96875.
@pytest.mark.parametrize(
    ("prediction", "output"),
    [("epsilon", 0.5), ("v_prediction", 0.6 * 0.5 - 0.8 * 1.0), ("sample", 1.0)],
)
def test_ddims_log_probability_by_hand(prediction, output):
    steps = transitions_of(levels([0.6], [0.8], prediction), (0.8, 0.6))
    std = 0.4960784
    mean = steps.mean(row(1.0), row(output))
    torch.testing.assert_close(mean, row(0.96875))
    torch.testing.assert_close(steps.std, torch.tensor([std]))
    found = steps.log_prob(row(0.96875 + std), mean)
    torch.testing.assert_close(found, torch.tensor([-0.5 + 0.7010214 - HALF_LOG_2PI]))
    torch.testing.assert_close(steps.divergence(mean + 0.1, mean), torch.tensor([0.01 / (2 * 0.24609375)]))


def test_log_probabilities_are_a_normal_distributions():
    step = transitions_of(flow(0.9, 0.6), (1.0, 0.0))[torch.tensor([0, 0])]
    mean, reached = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(mean, step.std[0])
    torch.testing.assert_close(step.log_prob(reached, mean), normal.log_prob(reached).mean(dim=(1, 2, 3)))


def test_each_sample_has_its_own_step():
    steps = transitions_of(flow(1.0, 0.7, 0.3, 0.1), (1.0, 0.0))
    x, output, reached = torch.randn(3, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([2, 0, 1])
    together = steps[chosen].log_prob(reached, steps[chosen].mean(x, output))
    for n, step in enumerate(chosen):
        one = steps[step[None]]
        alone = one.log_prob(reached[n : n + 1], one.mean(x[n : n + 1], output[n : n + 1]))
        torch.testing.assert_close(together[n : n + 1], alone)


def test_a_reversed_flow_takes_the_same_steps_with_its_output_turned_around():
    plain, turned = (
        transitions_of(levels([0.0, 0.6], [1.0, 0.4], name), (1.0, 0.0))
        for name in ("flow_prediction", "reversed_flow_prediction")
    )
    torch.testing.assert_close(turned.keep, plain.keep)
    torch.testing.assert_close(turned.gain, -plain.gain)
    torch.testing.assert_close(turned.std, plain.std)


def test_pure_noise_leads_to_where_v_says():
    """At zero terminal SNR (alpha 0) nothing is kept: the next latents are `alpha' x0 + sigma' noise`, all drawn."""
    steps = transitions_of(levels([0.0], [1.0], "v_prediction"), (0.6, 0.8))
    for found, expected in ((steps.keep, 0.0), (steps.gain, -0.6), (steps.std, 0.8)):
        torch.testing.assert_close(found, torch.tensor([expected]))


def variance_kept(prediction, count, spread=0.5):
    """Of the last latents, over what it should be: clean latents of N(0, spread²), and a network that knows.

    Everything is linear, so that variances can be followed exactly.
    """
    sigmas = torch.linspace(0.999, 0.001, count + 1, dtype=torch.float64)
    alphas = 1 - sigmas if prediction == "flow_prediction" else (1 - sigmas**2).sqrt()
    here = NoiseLevels(alphas[:-1], sigmas[:-1], sigmas[:-1], prediction)
    steps = transitions_of(here, (alphas[-1].item(), sigmas[-1].item()))
    right = alphas**2 * spread**2 + sigmas**2
    x0, noise = alphas * spread**2 / right, sigmas / right  # expected, for x = 1
    says = {"flow_prediction": noise - x0, "epsilon": noise, "v_prediction": alphas * noise - sigmas * x0}
    variance = right[0]
    for t in range(count):
        factor = steps.keep[t] + steps.gain[t] * says.get(prediction, x0)[t]
        variance = factor**2 * variance + steps.std[t] ** 2
    return (variance / right[-1]).item()


@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "v_prediction", "sample"])
def test_the_distribution_of_images_is_kept(prediction):
    """But for the steps' length, which noise-free steps pay for as well."""
    assert variance_kept(prediction, 800) == pytest.approx(1, abs=0.01)
    assert variance_kept(prediction, 50) == pytest.approx(1, abs=0.1)


def test_trajectories_are_put_together_and_taken_apart():
    steps = transitions_of(flow(1.0, 0.5), (1.0, 0.0))

    def call(start, count):
        before = [torch.arange(start, start + count)[:, None] + 100 * t for t in range(2)]
        return Trajectory.of_steps([(x, x[:, 0].float()) for x in before], steps)

    whole = Trajectory.join([call(0, 2), call(2, 3)])
    assert whole.latents[:, :, 0].tolist() == [[n, 100 + n] for n in range(5)]
    assert whole.log_probs.tolist() == [[n] for n in range(5)]  # of every step but the last
    some = whole[torch.tensor([4, 1])]
    assert some.latents[:, 1, 0].tolist() == [104, 101]
    assert some.log_probs.tolist() == [[4], [1]]
