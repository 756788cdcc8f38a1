"""What a load test sends, what it makes of the answers, and what it refuses."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve import compare
from serve.load_figures import BLOCKS, Objective, knee, ratio_interval, summarise, throughput_ratio
from serve.load_prompts import read_prompts, read_replay, with_prefixes
from serve.load_report import latency_against_throughput, read_requests, write_requests
from serve.loadtest import LoadTestConfig, _doubts
from serve.traffic import Arrival, Driven, Level, Outcome, Watch, error_kind, planned_requests
from workbench.config import load
from workbench.errors import UserError

CALM = Watch(cpu=0.1, lag=0.001, drift=0.0)


def outcome(latency: float, first: float = 0.1, tokens: int = 11, error: str = "", started: float = 0.0) -> Outcome:
    gaps = tuple([(latency - first) / (tokens - 1)] * (tokens - 1)) if tokens > 1 else ()
    return Outcome(started, latency, first, tokens, 5, error, gaps)


def figures(outcomes: list[Outcome], wall: float = 1.0, **objective: float) -> dict[str, Any]:
    return summarise(Driven(outcomes, wall, CALM), Objective(**objective))


def test_percentiles_interpolate_linearly() -> None:
    summary = figures([outcome(latency=i / 1000) for i in range(1, 101)])
    assert summary["latency_p50_ms"] == pytest.approx(50.5)
    assert summary["latency_p90_ms"] == pytest.approx(90.1)
    assert summary["latency_p95_ms"] == pytest.approx(95.05)
    assert summary["latency_p99_ms"] == pytest.approx(99.01)


def test_throughput_counts_what_succeeded_over_the_wall_time() -> None:
    summary = figures([outcome(1.0), outcome(1.0), outcome(0.1, error="HTTP 503")], wall=2.0)
    assert (summary["requests"], summary["errors"]) == (3, 1)
    assert summary["requests_per_s"] == 1.0
    assert summary["output_tokens_per_s"] == 11.0
    assert summary["error_kinds"] == "HTTP 503: 1"


def test_failed_requests_have_no_part_in_the_latencies() -> None:
    summary = figures([outcome(1.0), outcome(100.0, error="TimeoutError")])
    assert summary["latency_p99_ms"] == pytest.approx(1000)


def test_inter_token_latency_leaves_out_the_first_token() -> None:
    assert outcome(latency=1.1, first=0.1, tokens=11).inter_token == pytest.approx(0.1)
    assert outcome(latency=0.1, first=0.1, tokens=1).inter_token is None
    assert figures([outcome(latency=1.1, first=0.1, tokens=11)])["itl_p99_ms"] == pytest.approx(100)


def test_a_level_without_success_has_no_percentiles() -> None:
    assert figures([outcome(1.0, error="ClientConnectorError")])["ttft_p50_ms"] is None


def test_goodput_counts_the_answers_that_keep_to_all_of_the_objective() -> None:
    outcomes = [
        outcome(1.0, first=0.1),
        outcome(1.0, first=0.6),
        outcome(3.0, first=0.1),
        outcome(0.1, error="HTTP 429"),
    ]
    assert figures(outcomes)["goodput_per_s"] == 3.0
    assert figures(outcomes, ttft_ms=500)["goodput_per_s"] == 2.0
    assert figures(outcomes, ttft_ms=500, latency_ms=2000)["goodput_per_s"] == 1.0


def test_the_knee_is_where_throughput_over_latency_is_highest() -> None:
    """Service of 100 ms a request, four at a time: more than four in flight wait."""
    rows = [
        {"output_tokens_per_s": 10.0 * min(n, 4), "latency_p50_ms": 100.0 * max(1, n / 4)} for n in (1, 2, 4, 8, 16)
    ]
    assert knee(rows) == 2
    assert knee(rows[:2]) is None


def test_the_figure_marks_the_knee() -> None:
    rows = [
        {"level": f"x{n}", "output_tokens_per_s": 10.0 * min(n, 4), "latency_p50_ms": 100.0 * max(1, n / 4),
         "latency_p95_ms": 120.0 * max(1, n / 4)}
        for n in (1, 2, 4, 8)
    ]  # fmt: skip
    knees = [trace for trace in latency_against_throughput({"m": rows}).data if "knee" in trace.name]
    assert [(trace.x[0], trace.y[0]) for trace in knees] == [(40.0, 100.0)]


def made_level(mean: float, count: int = 200, seed: int = 1) -> list[Outcome]:
    """A closed loop of one client, whose answers take ``mean`` seconds, give or take a tenth."""
    draw, at, outcomes = random.Random(seed), 0.0, []
    for _ in range(count):
        took = mean * draw.uniform(0.9, 1.1)
        outcomes.append(outcome(took, first=took / 10, started=at))
        at += took
    return outcomes


def test_an_interval_holds_the_truth_and_not_what_is_false() -> None:
    import numpy as np

    slow, fast = made_level(0.2), made_level(0.1, seed=2)
    ratio, low, high = ratio_interval(slow, fast, lambda v: np.median(v[..., 1], axis=1))
    assert low < 0.5 < high < 0.6 and low <= ratio <= high
    walls = [sum(o.latency for o in side) for side in (slow, fast)]
    ratio, low, high = throughput_ratio(slow, walls[0], fast, walls[1])
    assert 1.9 < low < 2.0 < high < 2.1
    same = ratio_interval(slow, made_level(0.2, seed=3), lambda v: np.median(v[..., 1], axis=1))
    assert same[1] < 1 < same[2]
    assert BLOCKS * (walls[0] / BLOCKS) == pytest.approx(walls[0])


def test_requests_are_kept_and_two_runs_compared(tmp_path: Path) -> None:
    levels = []
    for name, mean in (("a", 0.2), ("b", 0.1)):
        outcomes = made_level(mean)
        (tmp_path / name / "artifacts").mkdir(parents=True)
        row = {"model": f"model-{name}", "level": "x1", "load": 1}
        driven = Driven(outcomes, sum(o.latency for o in outcomes), CALM)
        write_requests(tmp_path / name / "artifacts" / "requests.parquet", [row], [driven])
        levels.append(read_requests(tmp_path / name))
    assert levels[0]["model-a", "x1"][0] == made_level(0.2)
    [row] = compare.compare(*levels)
    assert row["model"] == "model-a and model-b"
    assert row["latency_p50"].startswith("0.50")
    assert row["throughput"].startswith(("1.99", "2.0"))


def test_a_folder_that_is_no_load_test_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run of 'serve loadtest'"):
        read_requests(tmp_path)


def test_prompts_come_from_instruction_and_input(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"instruction": "Count rings.", "input": "C1CC1"}\n\n{"prompt": "Hello"}\n')
    assert read_prompts(path, 10) == ["Count rings.\nC1CC1", "Hello"]
    assert read_prompts(path, 1) == ["Count rings.\nC1CC1"]


def test_a_line_without_a_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello"}\n{"question": "?"}\n')
    with pytest.raises(UserError, match=r"prompts\.jsonl:2"):
        read_prompts(path, 10)


def test_prompts_share_so_many_prefixes() -> None:
    texts = with_prefixes([f"question {n}" for n in range(12)], prefixes=3, words=50, seed=0)
    beginnings = {text.split("\n\n")[0] for text in texts}
    assert len(beginnings) == 3 and {len(text.split()) for text in beginnings} == {50}
    assert texts == with_prefixes([f"question {n}" for n in range(12)], prefixes=3, words=50, seed=0)


def test_a_replay_keeps_the_order_the_times_and_the_lengths(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    rows = [
        {"time": 103.0, "messages": [{"role": "user", "content": "late"}], "max_tokens": 7},
        {"time": 100.0, "body": json.dumps({"prompt": "early"})},
        {"time": 104.0, "prompt": "told", "completion_tokens": 90},
        {"time": 105.0, "prompt": "told", "max_tokens": 256, "completion_tokens": 41},
        {"time": 106.0, "prompt": "told", "max_tokens": 9, "completion_tokens": 18},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    early, late, *told = read_replay(path, 10, speed=2.0, max_tokens=32)
    assert (early.at, early.max_tokens, early.messages[0]["content"]) == (0.0, 32, "early")
    assert (late.at, late.max_tokens) == (1.5, 7)
    assert [prompt.max_tokens for prompt in told] == [90, 41, 9]


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        '{"time": 1}',
        '{"prompt": "x"}',
        "[1]",
        "nonsense",
        '{"time": NaN, "prompt": "x"}',
        '{"time": 1, "prompt": "x", "max_tokens": "many"}',
        '{"time": 1, "prompt": "x", "completion_tokens": -1}',
    ],
)
def test_a_recorded_request_without_time_or_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "traffic.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=r"traffic\.jsonl:1"):
        read_replay(path, 10, 1.0, 32)


def test_the_request_log_of_the_gateway_can_be_replayed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bodies = [
        json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}),
        None,
        json.dumps({"prompt": "hi", "max_tokens": -1}),
    ]
    log = {"time": [5.0, 6.0, 7.0], "body": bodies, "served": ["m", "m", "m"], "completion_tokens": [2, 2, 2]}
    pq.write_table(pa.table(log), tmp_path / "requests-1.parquet")
    [prompt] = read_replay(tmp_path, 10, 1.0, 32)
    assert (prompt.at, prompt.max_tokens) == (0.0, 2)


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("Too Many Requests", "HTTP 429"),
        ("Service Unavailable", "HTTP 503"),
        ("Traceback (most recent call last):\n  File x\naiohttp.ClientError.Odd: no", "Odd"),
        ("Traceback (most recent call last):\n  File x\nTimeoutError", "TimeoutError"),
        ("Never received a valid chunk to calculate TTFT.This", "Never received a valid chunk to calculate TTFT"),
        ("", "HTTP error without a reason"),
    ],
)
def test_errors_are_counted_by_kind(told: str, kind: str) -> None:
    assert error_kind(told) == kind


def test_an_open_loop_sends_rate_times_seconds() -> None:
    assert planned_requests(Level("poisson", 4.0, 5.0), 8) == 20
    assert planned_requests(Level("ramp", 9.0, 10.0, start=1.0), 8) == 50
    assert planned_requests(Level("replay", 1.0, 5.0), 8) == 8


def test_a_generator_at_its_limit_says_so() -> None:
    assert CALM.saturated() == ""
    assert "97% of a core" in Watch(0.97, 0.0, 0.0).saturated()
    assert "late" in Watch(0.1, 0.2, 0.0).saturated()


@pytest.mark.parametrize("arrival", ["constant", "poisson", "ramp", "replay"])
def test_requests_that_were_sent_late_are_doubted_in_every_open_loop(arrival: Arrival) -> None:
    level = Level(arrival, 1.0, 5.0, start=1.0)
    for late, doubts in ((0.01, 0), (0.2, 1)):
        sent = [replace(outcome(0.2, started=float(at)), late=late) for at in range(5)]
        driven = Driven(sent, 5.0, CALM)
        found = _doubts("m", level, driven, summarise(driven, Objective()))
        assert len(found) == doubts and all("200 ms after their time" in text for text in found)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["arrival=ramp", "rates=[1, 2, 3]"], "a first and a last rate"),
        (["arrival=replay"], "belong together"),
        (["concurrency=[0]"], "above 0"),
        (["arrival=poisson", "rates=[.nan]"], "give numbers"),
        (["arrival=poisson", "rates=[.inf]"], "give numbers"),
        (["concurrency=[4, 4]"], "each level once"),
        (["objective={ttft: 3}"], "ttft_ms"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load(LoadTestConfig, None, overrides)


def test_a_ramp_is_one_level_from_the_first_rate_to_the_last() -> None:
    [level] = load(LoadTestConfig, None, ["arrival=ramp", "rates=[1, 8]"]).levels()
    assert (level.start, level.load) == (1.0, 8.0) and math.isfinite(level.seconds)
