"""The page of points written by hand: what it draws, what its script is told, and that nothing of a user's is code."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from marble.pareto.figure import HEIGHT, LEFT, TOP, WIDTH, Axis, paint, scatter
from marble.pareto.fronts import describe
from marble.pareto.page import verdict, write_page
from marble.pareto.script import SCRIPT

from .made import measured

EVIL = '<script>alert("x")</script>'
BASE = np.array([[0.0, 0, 0], [2, 2, 2]] * 3)


def content_of(names=("a", "b", "c"), rewards=("a", "b"), **options):
    ups = [[2, 1, 0.0], [1, 2, 1.0], [0.5, 0.5, 2.0]]
    return describe(measured([BASE, *(BASE + np.array(up) for up in ups)], names, **options), list(rewards))


class Elements(HTMLParser):
    """Every element's name and attributes, and what is in scripts."""

    def __init__(self, text):
        super().__init__()
        self.found, self.code, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.code.append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def of(self, tag, **having):
        return [attrs for name, attrs in self.found if name == tag and having.items() <= attrs.items()]


def test_circles_lie_where_their_scores_are():
    content = content_of()
    circles = Elements(scatter(content)).of("circle")
    assert [circle["data-index"] for circle in circles] == ["0", "1", "2", "3"]
    across, up = (Axis.of(name, content) for name in "ab")
    for circle, point in zip(circles, content["points"], strict=True):
        share, height = across.share(point["means"]["a"]), up.share(point["means"]["b"])
        assert float(circle["cx"]) == pytest.approx(LEFT + share * WIDTH, abs=0.1)
        assert float(circle["cy"]) == pytest.approx(TOP + (1 - height) * HEIGHT, abs=0.1)
        assert float(circle["data-at"].split()[0]) == pytest.approx(share, abs=1e-4)
        assert circle["tabindex"] == "0"


def test_the_front_steps_from_point_to_point():
    elements = Elements(scatter(content_of()))
    at = {c["data-index"]: (c["cx"], c["cy"]) for c in elements.of("circle")}
    (front,) = elements.of("path", id="front")
    (x2, y2), (x1, y1) = at["2"], at["1"]
    assert front["d"] == f"M{LEFT} {y2}H{x2}V{y1}H{x1}V{TOP + HEIGHT}"


def test_states_tell_the_script_of_every_pair():
    states = [c["data-states"] for c in Elements(scatter(content_of())).of("circle")]
    # rows: across a, b, c; columns: up a, b, c
    assert states[1] == "-ff" + "f-d" + "fd-"
    assert states[2] == "-ff" + "f-f" + "ff-"
    assert states[3] == "-df" + "d-f" + "ff-"
    assert states[0] == "-dd" + "d-d" + "dd-"


def test_one_axis_of_each_way_is_shown():
    groups = Elements(scatter(content_of(rewards=("c", "a")))).of("g")
    assert [g["data-axis"] for g in groups if "display" not in g] == ["y0", "x2"]
    assert len(groups) == 6


def test_a_third_reward_is_the_size():
    circles = Elements(scatter(content_of(rewards=("a", "b", "c")))).of("circle")
    radii = [float(c["r"]) for c in circles]
    assert radii[0] == radii[1] < radii[2] < radii[3]


def test_a_point_without_a_score_is_not_drawn():
    rows = [BASE, BASE + 1, BASE + 2]
    rows[2] = rows[2] * np.array([1, np.nan, 1])
    circles = Elements(scatter(describe(measured(rows, ("a", "b", "c")), ["a", "b"]))).of("circle")
    assert ["display" in circle for circle in circles] == [False, False, True]
    assert circles[2]["data-states"] == "--f---f--"


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.02), (-3.0, 500.0), (1.0, 1.0), (0.0, 0.0), (1e-6, 2e-6)])
def test_ticks_are_round_and_on_the_axis(low, high):
    content = {"points": [], "spreads": {"a": 1.0}}
    for mean in (low, high):
        gain = {"means": {"a": mean}, "gains": {"a": 0.0}, "gain_intervals": {"a": [0.0, 0.0]}}
        content["points"].append(gain)
    axis = Axis.of("a", content)
    assert 3 <= len(axis.ticks) <= 8
    assert all(0 <= share <= 1 for share, _ in axis.ticks)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_the_page_is_escaped_and_self_contained(tmp_path):
    names = (EVIL, 'b" onload="x', "c&d")
    content = content_of(names, names[:2], methods=["", EVIL, "'>", "m"]) | {"left_out": {EVIL: EVIL}}
    folder = tmp_path / "points" / content["points"][1]["file"]
    folder.mkdir(parents=True)
    Image.new("RGB", (300, 200)).save(folder / "000_0.png")
    path = write_page(tmp_path, content, [EVIL])
    text = path.read_text()
    elements = Elements(text)
    assert elements.code == [SCRIPT]  # the only script, as it stands in the package
    assert not any(name.startswith("on") for _, attrs in elements.found for name in attrs)
    (picture,) = elements.of("img")
    assert picture["alt"] == EVIL
    assert picture["src"].startswith("data:image/png;base64,")
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert len(elements.of("article")) == len(content["points"])
    assert all("hidden" in article for article in elements.of("article"))
    assert len(elements.of("tr")) > len(content["points"])


def test_a_run_called_all_has_a_row_beside_all_points(tmp_path):
    (tmp_path / "points").mkdir()
    text = write_page(tmp_path, content_of(methods=["", "all", "all methods", "m"]), []).read_text()
    rows = re.findall(r"<tr><td>([^<]*)</td><td>\d\.\d{3}</td><td>[^<]* … ", text)
    assert rows == ["all points", "all methods", "all", "all methods", "m"]


def test_what_a_screen_reader_is_told(tmp_path):
    content = content_of()
    elements = Elements(write_page(tmp_path, content, []).read_text())
    label = elements.of("circle", **{"data-index": "1"})[0]["aria-label"]
    assert label == "p1 (method): a 3, b 2, c 1"
    assert [tag for tag, attrs in elements.found if "aria-live" in attrs] == ["p"]


def test_methods_beyond_the_colours_differ():
    assert len(set(paint([{"method": f"m{i}"} for i in range(40)]).values())) == 41


def test_without_intervals_the_axis_reaches_the_points():
    axis = Axis.of("a", describe(measured([BASE[:2], BASE[:2] + 2], ("a", "b", "c")), ["a", "b"]))
    assert (axis.low, axis.high) == (pytest.approx(0.9), pytest.approx(3.1))


def test_verdicts_in_words():
    row = {"front": False, "share": 0.34, "dominated_by": "x", "told_apart": True}
    assert verdict(row) == "perhaps dominated by x (34%)"
    assert verdict(row | {"share": 0.0}) == "dominated by x (0%)"
    assert verdict(row | {"told_apart": False}) == "not told apart from x (34%)"
    assert verdict({"front": True, "share": 0.6, "dominated_by": None, "told_apart": None}) == "on the front (60%)"
    assert verdict(None) == "not measured"
