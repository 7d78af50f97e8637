"""Portions: what a reward is given does not depend on when images come, or on who else judges."""

import sys
import threading
import time
import weakref
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marble import Reward
from marble.prompts import Record
from marble.rewards import Judging, score_images
from marble.rewards.crew import Crew, Job
from marble.rewards.judging import _covered

RED, BLUE = Record("red", "s", {"text": "R"}), Record("blue", "s")


class Recorder(Reward):
    """Scores an image by its first pixel and remembers what it was given together."""

    name = "recorder"
    batch = 3

    def __init__(self, **contract):
        self.calls = []
        for name, value in contract.items():
            setattr(self, name, value)

    def applies(self, record):
        return not self.only_text or "text" in record.targets

    only_text = False

    def score(self, images, records):
        self.calls.append(images[:, 0, 0, 0].tolist())
        return images[:, 0, 0, 0].double()


def pictures(count):
    return torch.arange(count).float()[:, None, None, None].expand(count, 3, 2, 2) / 255


def judged(rewards, records, groups, sizes):
    judging, images = Judging(rewards, records, groups), pictures(len(records))
    for part in images.split(sizes):
        judging.add(part)
    return judging.table()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 3), st.booleans(), st.booleans())
def test_portions_do_not_depend_on_the_batches_that_images_come_in(sizes, workers, groupwise, only_text):
    count = sum(sizes)
    records = [RED if i % 3 else BLUE for i in range(count)]
    groups = torch.arange(count) // 4
    whole = Recorder(groupwise=groupwise, only_text=only_text)
    expected = score_images([whole], pictures(count), records, groups)
    beside = Recorder(groupwise=groupwise, only_text=only_text, workers=workers)
    table = judged([beside], records, groups, sizes)
    assert sorted(beside.calls) == sorted(whole.calls)
    assert torch.equal(table.scores, expected.scores) or table.scores.isnan().equal(expected.scores.isnan())
    assert table.scores.nan_to_num(-1).equal(expected.scores.nan_to_num(-1))
    wanted = [i for i in range(count) if not only_text or records[i] is RED]
    assert sorted(i for call in whole.calls for i in call) == wanted
    if groupwise:
        assert all(len({int(i) // 4 for i in call}) == 1 for call in whole.calls)
    else:
        assert [len(call) for call in whole.calls] == [3] * (len(wanted) // 3) + [len(wanted) % 3] * (
            len(wanted) % 3 > 0
        )


def test_threads_judge_while_the_next_images_are_made():
    started = threading.Event()

    class Beside(Recorder):
        def score(self, images, records):
            started.set()
            time.sleep(0.1)
            return super().score(images, records)

    reward, inline = Beside(workers=1), Recorder(name="inline")
    judging = Judging([reward, inline], [RED] * 6, torch.zeros(6, dtype=torch.long))
    judging.add(pictures(6)[:3])
    assert started.wait(10)  # before the other images are there
    assert inline.calls == []
    time.sleep(0.15)
    judging.add(pictures(6)[3:])
    table = judging.table()
    assert table.scores[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    times = judging.times()
    assert 0.2 <= times["judging"]["recorder"] < times["judging"]["recorder"] + times["judging"]["inline"] < 60
    assert 0.1 <= times["hidden"] <= times["judging"]["recorder"]  # the second portion was waited for


def test_what_is_in_line_hides_nothing():
    judging = Judging([Recorder()], [RED] * 4, torch.zeros(4, dtype=torch.long))
    judging.add(pictures(4))
    judging.table()
    assert judging.times()["hidden"] == 0


def test_seconds_covered_by_spans():
    assert _covered([]) == 0
    assert _covered([(1, 3), (2, 4), (6, 7), (6.5, 6.6)]) == pytest.approx(4)  # 1 to 4, and 6 to 7
    assert _covered([(5, 4)]) == 0  # began after the sampling


def test_more_images_than_asked_for_are_not_looked_at():
    reward = Recorder(workers=1)
    judging = Judging([reward], [RED] * 2, torch.zeros(2, dtype=torch.long))
    judging.add(pictures(5))
    assert judging.table().scores.tolist() == [[0], [1]]


def test_a_crew_has_as_many_threads_as_it_says():
    at_once, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return torch.ones(1)

    crew, jobs = Crew(3), [Job(work) for _ in range(12)]
    for job in jobs:
        crew.submit(job)
    for job in jobs:
        crew.wait(job, 10)
    assert most == 3
    assert all(job.scores is not None and not job.error for job in jobs)


def test_a_crew_goes_on_with_the_threads_that_do_not_hang():
    release = threading.Event()
    crew = Crew(2)
    stuck, fine = Job(lambda: release.wait() or torch.ones(1)), [Job(lambda: torch.ones(1)) for _ in range(5)]
    for job in [stuck, *fine]:
        crew.submit(job)
    crew.wait(stuck, 0.05)
    for job in fine:
        crew.wait(job, 10)
    assert stuck.given_up
    assert all(job.scores is not None for job in fine)
    release.set()


def test_pictures_are_let_go_of_once_they_are_judged():
    given = []

    class Watching(Recorder):
        def score(self, images, records):
            given.append(weakref.ref(images))
            return super().score(images, records)

    rewards = [Watching(), Watching(name="beside", workers=1), Watching(name="floats", wants_floats=True)]
    judging = Judging(rewards, [RED] * 7, torch.zeros(7, dtype=torch.long))
    judging.add(pictures(7))
    judging.table()
    assert len(given) == 9
    assert [images() for images in given] == [None] * 9  # the judging is still there
    assert not judging._bytes + judging._floats


def test_what_a_reward_raises_ends_no_thread():
    class Leaving(Recorder):
        name = "leaving"

        def score(self, images, records):
            sys.exit("goodbye")

    reward = Leaving(timeout=30)
    for _ in range(2):  # the second time there is a thread, too
        began = time.perf_counter()
        table = score_images([reward], pictures(2), [RED] * 2, torch.zeros(2))
        assert table.silent == ["leaving"]
        assert time.perf_counter() - began < 10


def test_a_failure_is_told_of_once_and_when_it_is_over(caplog):
    class Flaky(Recorder):
        name, why = "flaky", "one"

        def score(self, images, records):
            if self.why:
                raise ValueError(self.why)
            return super().score(images, records)

    reward = Flaky()
    for why in ("one", "one", "two", "two", "one", "", "", "one"):
        reward.why = why
        score_images([reward], pictures(2), [RED] * 2, torch.zeros(2))
    told = [record.getMessage().removeprefix("reward flaky: ") for record in caplog.records]
    one, two = (f"no score for 2 of 2 images: ValueError: {why}" for why in ("one", "two"))
    assert told == [one, two, one, "answers again", one]


def test_one_column_of_scores_will_do():
    class Column(Recorder):
        def score(self, images, records):
            return super().score(images, records)[:, None]

    assert score_images([Column()], pictures(2), [RED] * 2, torch.zeros(2)).scores.tolist() == [[0], [1]]


def test_rewards_that_cannot_be_hashed_or_hold_nothing():
    @dataclass
    class Data(Recorder):
        scale: float = 1.0

        def __post_init__(self):
            self.calls = []

    class Bare:
        __slots__ = ()
        name = "bare"

        def applies(self, record):
            return True

        def score(self, images, records):
            return images[:, 0, 0, 0].float()

    table = score_images([Data(), Bare()], pictures(2), [RED] * 2, torch.zeros(2))
    assert table.scores.tolist() == [[0, 0], [1, 1]]
