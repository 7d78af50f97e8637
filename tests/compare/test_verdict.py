"""The verdict: differences by hand, and what is said of them."""

import pytest

from marble.compare.table import choose_baseline, summarise
from marble.compare.verdict import Contrast, contrast, duel, verdict

from .made import result, results


def words(found, baseline=None):
    baseline = choose_baseline(found, baseline)
    return verdict(found, summarise(found, baseline), baseline)


def test_a_contrast_is_paired_by_seed():
    # differences 1, 2, 3 on the common seeds, the fourth left out: mean 2, half width 4.302653 / √3
    found = contrast({0: 11.0, 1: 22.0, 2: 33.0, 9: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.sure == 0


def test_a_contrast_without_common_seeds_is_welchs():
    # variances 2 and 2 over two seeds each: standard error √2, 2 degrees of freedom, half width 4.302653 · √2
    found = contrast({0: 10.0, 1: 12.0}, {2: 0.0, 3: 2.0})
    assert found.mean == 10.0
    assert found.low == pytest.approx(10 - 4.302653 * 2**0.5, abs=1e-5)
    assert found.sure == 1


def test_seeds_that_are_all_alike_have_no_welch_interval():
    assert contrast({0: 3.0, 1: 3.0}, {2: 1.0, 3: 1.0}) == Contrast(2.0, None, None)


def test_too_few_seeds_have_no_interval():
    assert contrast({0: 3.0}, {0: 1.0}) == Contrast(2.0, None, None)
    assert contrast({0: 3.0, 1: 5.0}, {2: 1.0}) == Contrast(3.0, None, None)
    assert Contrast(2.0, None, None).sure == 0


def test_contrasts_are_told_with_their_interval():
    assert Contrast(0.214, 0.1, -0.02).tell() == "+0.21 [+0.10, −0.02]"
    assert Contrast(0.184, 0.11, 0.25).tell("%", 100, 0) == "+18% [+11, +25]"
    assert Contrast(-1.0, None, None).tell() == "−1.00"


def test_a_duel_by_hand():
    found = results(
        marble={s: result(1.0 + 0.01 * s, 0.8, 0.0) for s in (0, 1, 2)},
        ppo={s: result(1.5, 0.2 - 0.01 * s, 0.0) for s in (0, 1, 2)},
    )
    fight = duel(found, "marble", "ppo")
    assert (fight.seeds, fight.common) == (3, 3)
    assert fight.rewards["a"].mean == pytest.approx(-0.49)
    assert fight.rewards["b"].sure == 1
    assert fight.mean.mean == pytest.approx((1.81 - 1.69) / 2)
    assert fight.worst.mean == pytest.approx(0.8 - 0.19)
    assert fight.weakest == ("b", "b")


def test_a_sure_win_is_called_one():
    found = results(
        marble={s: result(1.0 + 0.01 * s, 0.8, 0.0, seconds=66.0) for s in (0, 1, 2)},
        ppo={s: result(0.5, 0.2, 0.0) for s in (0, 1, 2)},
    )
    text = words(found)
    assert text.startswith(
        "marble gains more than ppo on average (3 seeds, paired, on these prompts; 95% intervals in brackets). "
    )
    assert "more on 2 of 2 training rewards (surely on 2, less on 0)" in text
    assert "cannot be told apart" not in text
    assert (
        "Its scores relative to ppo's, averaged over the training rewards: +24%" in text
    )  # (1.505/1.25 − 1 + 2.8/2.2 − 1) / 2 = 0.2384
    assert "It takes 1.10 times as long." in text


def test_an_interval_with_zero_is_no_win():
    found = results(
        marble={0: result(1.0, 0.8, 0.0), 1: result(0.2, 0.2, 0.0)},
        weighted_sum={0: result(0.5, 0.4, 0.0), 1: result(0.5, 0.4, 0.0)},
    )
    text = words(found)
    assert "marble and weighted-sum cannot be told apart by their mean gain (2 seeds, paired" in text
    assert "which tells the two apart neither way" in text


def test_a_loss_is_called_one():
    found = results(
        marble={s: result(0.1 + 0.01 * s, 0.1, 0.0) for s in (0, 1, 2)},
        standardised_sum={s: result(0.5, 0.2, 0.0) for s in (0, 1, 2)},
    )
    assert words(found).startswith("marble gains less than standardised-sum on average")


def test_one_seed_is_said():
    found = results(marble={0: result(1.0, 0.8, 0.0, noise=0.1)}, ppo={0: result(0.5, 0.2, 0.0)})
    text = words(found)
    assert text.startswith("With this one seed marble gains more than ppo on average")
    assert "one seed, too few for an interval over seeds" in text
    assert "training again may differ" in text
    assert "[" in text  # over prompts
    assert "surely" not in text
    assert "ppo (−" in text
    assert "too few seeds that all arms have" in text


def test_no_seed_in_common_and_too_few_of_them():
    text = words(results(marble={0: result(1.0, 0.8, 0.0)}, ppo={1: result(0.5, 0.2, 0.0)}))
    assert text.startswith(
        "marble against ppo: too few seeds for an interval, so that nothing is sure (no seed in common)"
    )


def test_one_seed_and_a_reward_of_a_single_prompt():
    found = results(marble={0: result(1.0, 0.8, 0.0)}, ppo={0: result(0.5, 0.2, 0.0)})
    for seeds in found.done.values():
        seeds[0].prompt_gains[1, 1] = float("nan")
    text = words(found)
    assert "nothing is sure (one seed, and a reward judges a single prompt)" in text
    assert "(with the whole bracket on 1, less on 0)" in text  # the other reward judges all


def test_every_rival_has_its_paragraph_and_the_ranking_comes_last():
    arms = {s: result(1.0, 0.5, 0.1) for s in (0, 1)}
    found = results(marble=arms, weighted_sum={s: result(0.5, -0.5, 0.3) for s in (0, 1)}, ppo=arms, gdpo=arms)
    lines = words(found, "gdpo").splitlines()
    assert [line.split(" cannot")[0] for line in lines[:1]] == ["marble and ppo"]
    assert lines[1].startswith("marble gains more than weighted-sum")
    assert lines[2].startswith("marble and gdpo")
    assert lines[3].startswith("Highest composite z of the 4 arms: ")
    assert lines[3].endswith("Below the base model (95%): weighted-sum on b.")


def test_without_marble_the_first_arm_is_judged_and_without_rivals_all_others():
    alone = results(uniform={0: result(1, 1, 1)}, gdpo={0: result(0, 0, 0)})
    assert "uniform" in words(alone).splitlines()[0]
    assert "gdpo" in words(alone).splitlines()[0]
    assert words(results(uniform={0: result(1, 1, 1)})).startswith("Highest composite z of the 1 arms: uniform")


def test_nothing_measured_is_said():
    assert words(results(marble={0: "broke"})).startswith("Nothing has been measured yet")


def test_cells_that_are_in_no_number_are_named():
    found = results(marble={0: "broke", 1: "broke"}, ppo={0: result(1, 1, 1), 1: "broke"}, gdpo={0: result(0, 0, 0)})
    last = words(found).splitlines()[-1]
    assert last == "Failed or unfinished, and in no number here: marble (seeds 0, 1, all of it), ppo (seed 1)."
    assert "marble (seed 0, all of it)" in words(results(marble={0: "broke"}))
    assert "Failed" not in words(results(marble={0: result(1, 1, 1)}))


def test_what_was_not_made_under_one_budget_is_named():
    arms = {"marble": {0: result(1, 1, 1), 1: result(1, 1, 1, updates=1)}, "ppo": {0: result(0, 0, 0)}}
    assert words(results(**arms)).splitlines()[-1] == (
        "Not one budget: marble (seed 1) made 1 update from 6 images; the others made 2 updates from 12 images."
    )
    assert "Not one budget" not in words(results(marble={0: result(1, 1, 1)}, ppo={0: result(0, 0, 0)}))


def test_times_of_other_places_are_not_compared():
    found = results(marble={0: result(1, 1, 1)}, ppo={0: result(0, 0, 0, place=("cpu", 2))})
    assert "times as long" not in words(found)


def test_the_ranking_says_who_is_surely_ahead_and_whether_the_base_model_is():
    ahead = {s: result(2 + 0.1 * s, 2, 2) for s in (0, 1, 2)}
    behind = {s: result(1, 1 + 0.1 * s, 1) for s in (0, 1, 2)}
    text = words(results(marble=ahead, ppo=behind)).splitlines()[1]
    assert text.startswith("Highest composite z of the 2 arms: marble (+")
    assert ", ahead of ppo (" in text
    crossing = {0: result(1, 1, 1), 1: result(2.5, 2.5, 2.5), 2: result(2, 2, 2)}
    assert ", which cannot be told apart from " in words(results(marble=ahead, ppo=crossing))
    worse = words(results(marble={0: result(-1, -1, -1)}, ppo={0: result(-2, -2, -2)}))
    assert ", below the base model (+1.22)" in worse


def test_seeds_that_went_into_the_relative_gain_are_counted():
    zero = result(-2.0, 0, 0)  # a mean of 0 to be relative to
    found = results(
        marble={s: result(1, 1, 1) for s in (0, 1, 2)}, ppo={0: zero, 1: result(0, 0, 0), 2: result(0.1, 0, 0)}
    )
    assert "(over 2 of 3 seeds)" in words(found)
