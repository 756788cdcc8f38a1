"""The table of the training benchmark, whichever side could not be measured."""

from benchmarks.train_speed import lines

ROUND = {"tokens": 100.0, "seconds": 2.0, "cpu_seconds": 1.0, "memory": 1e9}


def test_a_side_that_failed_is_compared_with_nothing() -> None:
    both = lines({"workbench": [ROUND], "trl": [{**ROUND, "seconds": 4.0}]}, {}, None)
    assert [row["ours is faster by"] for row in both] == ["", "2.00"]
    alone = lines({"trl": [ROUND]}, {}, 0.001)
    assert alone[0]["ours is faster by"] == ""
    assert alone[0]["model FLOP utilisation"] == "5.0%"
