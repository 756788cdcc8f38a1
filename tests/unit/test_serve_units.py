"""What serving computes and refuses before any engine starts."""

import stat
from pathlib import Path

import pytest

from serve.application import causes
from serve.engine import ModelConfig
from serve.keys import client_key, make_key, read_key
from serve.passages import preference, rank, sentences, share, trim
from serve.up import ServeConfig
from workbench.config import load
from workbench.errors import UserError


def test_a_new_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "key"
    key = make_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(key) > 40


def test_an_existing_key_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert make_key(path) == make_key(path) == read_key(path)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key(path)
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_key(path)


def test_an_empty_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    with pytest.raises(UserError, match="holds no key"):
        make_key(path)


def test_the_client_key_is_the_files_then_the_environments(
    tmp_path: Path, runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key"
    key = make_key(path)
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    assert client_key(path) == key
    assert client_key(None) == "from-environment"
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="serve up"):
        client_key(None)


def test_the_causes_are_the_exceptions_a_log_names() -> None:
    log = """(EngineCore pid=1) ERROR 11-21 11:15:18 [core.py:1510]   File "x.py", line 1, in load
(EngineCore pid=1) ERROR 11-21 11:15:18 [core.py:1510] safetensors._rust.SafetensorError: incomplete metadata
Traceback (most recent call last):
safetensors._rust.SafetensorError: incomplete metadata
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
    assert causes(log) == ["safetensors._rust.SafetensorError: incomplete metadata"]


def test_a_cause_keeps_the_indented_lines_that_explain_it() -> None:
    log = "RuntimeError: 1 validation error for VllmConfig\n  Value error, too long\n  File x\nnext"
    assert causes(log) == ["RuntimeError: 1 validation error for VllmConfig\n  Value error, too long"]


def words(text: str) -> int:
    return len(text.split())


def test_passages_that_fit_are_untouched() -> None:
    passages = ["one two three", "four five"]
    assert trim(passages, 5, words) == passages


def test_the_longest_passages_are_cut_to_fit() -> None:
    short, long = "one two", "word " * 100
    kept = trim([short, long, long], 42, words)
    assert kept[0] == short
    assert sum(map(words, kept)) <= 42
    assert words(kept[1]) == words(kept[2]) >= 15


@pytest.mark.parametrize("budget", [0, 1, 7, 50])
def test_the_budget_is_never_exceeded(budget: int) -> None:
    assert sum(map(words, trim(["a b c d " * 20, "long " * 3, ""], budget, words))) <= budget


def test_a_share_is_equal_but_no_more_than_wanted() -> None:
    assert share([10, 2, 100], 30) == [10, 2, 18]
    assert share([5, 5], 100) == [5, 5]


def test_sentences_end_at_full_stops_but_not_at_abbreviations() -> None:
    text = "Use a pool, e.g. Ray Data. It reads\nin parallel! Why? (Because it can.) Done"
    assert sentences(text) == [
        "Use a pool, e.g. Ray Data.",
        "It reads in parallel!",
        "Why?",
        "(Because it can.)",
        "Done",
    ]


def test_no_text_is_lost_between_sentences() -> None:
    text = "See Fig. 3 of A. Smith. Lists:\n- one\n- two. End."
    assert " ".join(sentences(text)).split() == text.split()


def test_sentences_that_share_rare_words_rank_first() -> None:
    candidates = ["The file is the thing.", "Read a parquet file in parallel.", "The cat is in the house."]
    assert rank("how do I read a parquet file", candidates)[0] == 1


@pytest.mark.parametrize(
    ("question", "best", "other", "by_similarity", "quoted"),
    [
        (
            "how do I read a parquet file in parallel",
            "Load a parquet object from the path of a file, as a table.",
            "A list of read tasks that run in parallel.",
            1,
            0,
        ),
        (
            "how do I limit the size of a dataset",
            "Truncate the dataset to at most ``limit`` rows.",
            "Return the dataset's size.",
            1,
            0,
        ),
        (  # the other one shares clearly more
            "when is a trial stopped early",
            "End all trials, whatever their state is.",
            "A trial is stopped early by its scheduler.",
            1,
            1,
        ),
    ],
)
def test_the_best_hit_is_quoted_unless_another_shares_clearly_more(
    question: str, best: str, other: str, by_similarity: int, quoted: int
) -> None:
    similarity = [0.62, 0.58]
    assert rank(question, [best, other], similarity)[0] == by_similarity
    assert rank(question, [best, other], preference(similarity))[0] == quoted


def test_words_that_say_nothing_of_the_matter_do_not_count() -> None:
    candidates = ["How a class such as this can do with what it has.", "A trial ends when its rule says stop."]
    assert rank("how can I stop a trial", candidates)[0] == 1
    assert rank("what can this do", candidates)[0] == 0


def test_without_similarities_the_best_hit_still_comes_first() -> None:
    assert preference([0.6, 0.3]) == [1.0, pytest.approx(1 / 3)]
    assert preference([-0.1, -0.2]) == [1.0, 0.0]
    assert preference([]) == []


def test_a_model_source_that_looks_like_a_path_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig(name="m", source=str(tmp_path / "nothing"))
    assert ModelConfig(name="m", source="owner/model").source == "owner/model"


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match="one name"):
        load(ServeConfig, None, ["models=[{name: a, source: o/a}, {name: a, source: o/b}]"])


def test_the_default_host_is_loopback() -> None:
    config = load(ServeConfig, None, ["models=[{name: a, source: o/a}]"])
    assert config.host == "127.0.0.1"
