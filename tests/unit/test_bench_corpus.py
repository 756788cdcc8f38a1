"""The benchmark's corpus: passages, planted faults that are what they are said to be, and an audit that finds them."""

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from made_corpus import audited

from benchmarks import broken, planting
from benchmarks.corpus import Plan, build
from benchmarks.debian_docs import LONGEST, SHORTEST, Passage, kind_of, manual_text, split, text_of
from benchmarks.planted import score
from data_pipelines.duplicates import jaccard, shingles
from data_pipelines.pii import KINDS, counts
from data_pipelines.reading import Reading, open_reading
from data_pipelines.words import words_of
from workbench.errors import UserError


def passages(number: int, seed: int = 3) -> list[Passage]:
    """Random words, some of them twice as nature has it, some with digits."""
    rng = random.Random(seed)
    words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{chr(97 + i // 676)}" for i in range(3000)]
    texts = [" ".join(rng.choices(words, k=rng.randrange(90, 140))) for _ in range(number)]
    for at in range(0, number, 40):
        texts[at] = texts[at + 1]
    texts[5] = f"{texts[5]} 2024"
    return [Passage(f"title {at}", f"file {at}", text) for at, text in enumerate(texts)]


def source(number: int) -> Iterator[Passage]:
    yield from passages(number)


def test_passages_have_their_length_and_all_words_of_the_text() -> None:
    rng = random.Random(2)
    text = "\n".join(
        " ".join(rng.choices(["one", "three.", "seven", "x" * 30], k=rng.randrange(1, 300))) for _ in range(60)
    )
    found = split(text)
    assert len(found) > 20
    assert all(SHORTEST <= len(passage) <= LONGEST for passage in found)
    whole = " ".join(passage for passage in found).split()
    assert whole == text.split()[: len(whole)]
    assert len(" ".join(text.split()[len(whole) :])) < SHORTEST
    assert split("x" * 2000) == ["x" * LONGEST] * 2 + ["x" * SHORTEST]
    assert split("too short") == []


def test_files_are_known_by_their_names() -> None:
    names = ["a/man/man3/open.3.gz", "a/wordnet/data.noun", "a/doc/x.html", "a/doc/_sources/x.txt", "a/x.png"]
    assert [kind_of(name) for name in names] == ["man", "wordnet", "html", "", ""]
    page = '.TH OPEN 2\n.\\" a comment\n.SH NAME\nopen \\- open a \\fIfile\\fP\n.B int open("x");'
    assert manual_text(page).split("\n") == ["NAME", "open - open a file", "int open(x);"]
    gloss = b"00005930 03 n 02 dwarf 0 small_one 0 001 @ 00004475 n 0000 | a small plant  \n"
    assert text_of(gloss, "wordnet") == ("", "dwarf, small one: a small plant")


@pytest.mark.parametrize("level", planting.LEVELS)
def test_near_copies_are_as_similar_as_is_said(level: float) -> None:
    rng = random.Random(4)
    for passage in passages(30):
        copy, similarity = planting.near_copy(passage.text, level, rng)
        assert similarity == jaccard(shingles(words_of(passage.text)), shingles(words_of(copy)))
        assert level <= similarity < level + 0.02


def test_personal_data_is_of_its_kind_and_lookalikes_are_of_none() -> None:
    rng = random.Random(5)
    for _ in range(200):
        for kind, make in planting.PERSONAL.items():
            text = planting.put_into("some words around it", f"{make(rng)} ", rng)
            assert dict(zip(KINDS, counts(text), strict=True)) == dict.fromkeys(KINDS, 0) | {kind: 1}, text
        for make in planting.LOOKALIKES.values():
            text = planting.put_into("some words around it", f"{make(rng)} ", rng)
            assert sum(counts(text)) == 0, text


def test_lone_texts_are_those_that_share_little() -> None:
    texts = [passage.text for passage in passages(60)]
    texts += [f"{planting.new_word(random.Random(6))} {texts[10]}", texts[20][:200] + texts[30][200:]]
    looked = planting.Loneliness(texts)
    looked.add(looked.count(texts[:30]))
    looked.add(looked.count(texts[30:]))
    runs = [{tuple(words[i : i + 13]) for i in range(len(words) - 12)} for words in map(words_of, texts)]
    sets = [shingles(words_of(text)) for text in texts]
    expected = []
    for place, own in enumerate(sets):
        others = [i for i in range(len(texts)) if i != place]
        shared = {each for each in own if any(each in sets[i] for i in others)}
        if len(shared) < planting.MOST_SHARED * len(own) and not any(runs[place] & runs[i] for i in others):
            expected.append(place)
    assert looked.lone() == expected
    assert {0, 1, 10, 20} & set(expected) == set()


def test_an_audit_finds_exactly_what_was_planted(tmp_path: Path) -> None:
    plan = Plan(rows=700, exact=12, near=6, personal=4, leaks=6, clean=12, broken=3)
    planted = build(source(900), tmp_path / "corpus", plan, ["made 1"])
    assert len(planted.near) == 6 * len(planting.LEVELS)
    columns = {"id_column": "id", "title_column": "title", "source_column": "source"}
    rows = {}
    for name in ("train", "test"):
        opened = open_reading(Reading(source=str(tmp_path / "corpus" / name), **columns))
        rows[name] = [row for item in opened.items for row in item.rows()]
    audited(tmp_path / "audit", rows, evaluation=("test",), blocks=3)
    scores = score(tmp_path / "corpus", tmp_path / "audit")
    assert [each for each in scores if not each.right] == []
    found = {each.fault: each.planted for each in scores}
    assert found["exact duplicate"] == 12
    assert found["leak: ngram"] == found["leak: near"] == found["leak: exact"] == 6
    assert found["personal: iban"] == 4
    assert found["not read: undecodable line"] == found["not read: the same id twice"] == 3


def test_what_an_audit_missed_is_named(tmp_path: Path) -> None:
    plan = Plan(rows=400, exact=5, near=2, personal=2, leaks=2, clean=4, broken=1)
    build(source(500), tmp_path / "corpus", plan, [])
    opened = open_reading(Reading(source=str(tmp_path / "corpus" / "train"), id_column="id", source_column="source"))
    rows = [row for item in opened.items for row in item.rows() if row.key != "exact-00003"]
    audited(tmp_path / "audit", {"train": rows}, threshold=0.99)
    wrong = {each.fault: each for each in score(tmp_path / "corpus", tmp_path / "audit") if not each.right}
    assert wrong["exact duplicate"].missed == ["exact-00003"]
    assert len(wrong["near duplicate, Jaccard 0.8"].missed) == 2
    assert len(wrong["leak: ngram"].missed) == 2
    assert wrong["documents"].missed


def test_the_same_seed_makes_the_same_corpus(tmp_path: Path) -> None:
    plan = Plan(rows=400, exact=5, near=2, personal=2, leaks=2, clean=4, broken=2)
    made = [build(source(500), tmp_path / name, plan, []) for name in ("a", "b")]
    assert made[0] == made[1]
    tables = [ds.dataset(str(tmp_path / name / "test")).to_table() for name in ("a", "b")]
    assert tables[0] == tables[1]
    assert len({row["reason"] for row in broken.write(tmp_path, 1, random.Random(1))}) >= 12


def test_too_few_passages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the packages have 100 passages"):
        build(source(100), tmp_path / "corpus", Plan.of(1000), [])
    with pytest.raises(UserError, match="at least 200"):
        Plan.of(10)
