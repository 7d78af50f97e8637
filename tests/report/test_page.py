from marble.report.page import _opposed


def test_says_which_rewards_opposed_each_other_and_in_how_many_solves():
    rows = [
        {"refreshed": True},
        {"refreshed": False},
        {"refreshed": True, "opposed": [["a", "<b>"]]},
        {"refreshed": True, "opposed": [["a", "<b>"], ["a", "c"]]},
    ]
    said = _opposed(rows)
    assert "In 2 of 3 solves" in said
    assert "(a and &lt;b&gt;; a and c)" in said
    assert _opposed(rows[:2]) == ""
