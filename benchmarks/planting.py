"""Faults that are planted into real text, each known exactly: what an audit must find, and what it must leave alone.

A fault is only exact where nature has not planted the same one: the texts that are changed or copied are *lone*, which
means that less than half of their shingles, and none of their runs of 13 words, are in any other text. No other text
can then be their near duplicate (Jaccard similarity of 0.5 and more needs half of the shingles) or hold a leak of them.
"""

import importlib
import random
import re
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from data_pipelines.duplicates import SHINGLE, jaccard, shingles
from data_pipelines.ngrams import Words
from data_pipelines.pii import IBAN_LENGTHS
from data_pipelines.words import word_places, words_of

RUN = 13
LEVELS = (0.95, 0.9, 0.85, 0.8, 0.78, 0.7, 0.6)
"""Jaccard similarities at which near duplicates are planted; those under the threshold must be left alone."""
MOST_SHARED = 0.5
FEWEST_SHINGLES = 45
SYLLABLES = (
    "ba",
    "dor",
    "fen",
    "gul",
    "hix",
    "jom",
    "kav",
    "lur",
    "mip",
    "nuz",
    "pof",
    "quem",
    "rys",
    "tav",
    "vob",
    "zel",
)
TELLING = re.compile(r"[\d@]|PRIVATE KEY|\S{40}")
"""What every piece of personal data has: a text without it has none before some is planted."""


class Loneliness:
    """Which of ``candidates`` share next to nothing with any other text: ``count`` all texts, these among them, then
    ask ``lone``. Memory: 10 bytes a shingle of the candidates."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self._words = Words.of([words_of(text) for text in candidates])
        self._known = {n: np.unique(self._words.hashes(n)[0]) for n in (SHINGLE, RUN)}
        self._texts = {n: np.zeros(len(known), dtype=np.int32) for n, known in self._known.items()}

    def count(self, texts: Sequence[str]) -> dict[int, np.ndarray]:
        """In how many of ``texts`` each n-gram of the candidates is, by n; give the sum over all texts to ``add``."""
        words = Words.of([words_of(text) for text in texts])
        found = {}
        for n, known in self._known.items():
            hashes, at = words.hashes(n)
            place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            hit = known[place] == hashes
            once = np.unique(np.stack([words.owners[at[hit]], place[hit]]), axis=1)[1]
            found[n] = np.bincount(once, minlength=len(known)).astype(np.int32)
        return found

    def add(self, found: dict[int, np.ndarray]) -> None:
        """Take what ``count`` saw."""
        for n, counts in found.items():
            self._texts[n] += counts

    def lone(self) -> list[int]:
        """The places of the lone candidates that have words enough to be changed."""
        number = len(self._words.counts)
        shared, whole = {}, {}
        for n, known in self._known.items():
            hashes, at = self._words.hashes(n)
            place = np.searchsorted(known, hashes)
            owner, place = np.unique(np.stack([self._words.owners[at], place]), axis=1)
            whole[n] = np.bincount(owner, minlength=number)
            shared[n] = np.bincount(owner[self._texts[n][place] > 1], minlength=number)
        chosen = (whole[SHINGLE] >= FEWEST_SHINGLES) & (shared[SHINGLE] < MOST_SHARED * whole[SHINGLE])
        return np.flatnonzero(chosen & (shared[RUN] == 0)).tolist()


def new_word(rng: random.Random) -> str:
    """A word that is in no text."""
    return "".join(rng.choices(SYLLABLES, k=4))


def exact_copy(text: str, rng: random.Random) -> str:
    """The same words in the same order in another case, spacing and punctuation, and no longer than ``text``."""
    words = [match.group() for match in word_places(text)]
    style = rng.randrange(3)
    if style == 0:
        return text
    return " ".join(words).upper() if style == 1 and " ".join(words).isascii() else " ".join(words)


def near_copy(text: str, similarity: float, rng: random.Random) -> tuple[str, float]:
    """(a text with words exchanged and added, its true similarity to ``text``): as little above ``similarity`` as
    words allow. Half of the copies only have words added, so that some are of exactly that similarity."""
    own = shingles(words_of(text))
    places = list(word_places(text))
    copy, reached = text, 1.0
    if rng.random() < 0.5:
        changed: list[int] = []
        for place in rng.sample(range(len(places)), len(places)):
            if all(abs(place - other) > 2 * SHINGLE for other in changed):
                attempt = _exchanged(text, [places[at] for at in [*changed, place]], rng)
                if (now := jaccard(own, shingles(words_of(attempt)))) < similarity:
                    break
                changed.append(place)
                copy, reached = attempt, now
    while (now := jaccard(own, shingles(words_of(attempt := f"{copy} {new_word(rng)}")))) >= similarity:
        copy, reached = attempt, now
    return copy, reached


def _exchanged(text: str, matches: Iterable[re.Match[str]], rng: random.Random) -> str:
    for match in sorted(matches, key=re.Match.start, reverse=True):
        text = f"{text[: match.start()]}{new_word(rng)}{text[match.end() :]}"
    return text


def with_run(host: str, text: str, words: int, rng: random.Random) -> str:
    """``host`` with exactly ``words`` consecutive words of ``text`` put into its middle, between two new words."""
    theirs = list(word_places(text))
    first = rng.randrange(len(theirs) - words)
    run = text[theirs[first].start() : theirs[first + words - 1].end()]
    return put_into(host, f"{new_word(rng)} {run} {new_word(rng)}", rng)


def put_into(host: str, what: str, rng: random.Random) -> str:
    """``host`` with ``what`` between two of its words that are separated by a space or a line's end."""
    gaps = [match.start() for match in re.finditer(r"(?<=\w)\s(?=\w)", host)] or [len(host)]
    at = rng.choice(gaps)
    return f"{host[:at]} {what}{host[at:]}"


def has_no_personal_data(text: str) -> bool:
    """Whether nothing in it can be taken for personal data, whatever the detector."""
    return not TELLING.search(text)


def _digits(rng: random.Random, number: int) -> str:
    return "".join(rng.choices(string.digits, k=number))


def _letters(rng: random.Random, number: int) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits, k=number))


def _phone(rng: random.Random) -> str:
    import phonenumbers

    while True:
        number = rng.choice(["+49 30 {}", "+44 20 {}", "+33 1 {}", "+1 212 {}"]).format(_digits(rng, 8))
        if phonenumbers.is_valid_number(phonenumbers.parse(number)):
            return number


def _ipv6(rng: random.Random) -> str:
    return f"2a01:{':'.join(f'{rng.randrange(1, 1 << 16):x}' for _ in range(7))}"


def _iban(rng: random.Random) -> str:
    country = rng.choice(["DE", "AT", "ES", "PL"])  # digits only after the country
    account = _digits(rng, IBAN_LENGTHS[country] - 4)
    check = 98 - int(f"{account}{int(country[0], 36)}{int(country[1], 36)}00") % 97
    return f"{country}{check:02d}{account}"


def _card(rng: random.Random) -> str:
    body = f"4{_digits(rng, 14)}"
    doubled = [sum(divmod(2 * int(d), 10)) for d in body[::2]]
    digits = f"{body}{-(sum(doubled) + sum(map(int, body[1::2]))) % 10}"
    return rng.choice(["", " ", "-"]).join(digits[at : at + 4] for at in range(0, 16, 4))


def _national_id(rng: random.Random) -> str:
    number = rng.randrange(10**7, 10**8)
    spanish = f"{number}{'TRWAGMYFPDXBNJZSQVHLCKE'[number % 23]}"
    american = f"{rng.randrange(100, 600):03d}-{rng.randrange(1, 100):02d}-{rng.randrange(1, 10000):04d}"
    ok = importlib.import_module("stdnum.us.ssn").is_valid(american)  # leaves out the numbers of known frauds
    return american if ok and rng.random() < 0.5 else spanish


def _secret(rng: random.Random) -> str:
    key = "".join(rng.choices(string.ascii_uppercase + "234567", k=16))
    pem = "\n".join(_letters(rng, 64) for _ in range(3))
    kinds = [f"AKIA{key}", f"ghp_{_letters(rng, 36)}", f"hf_{''.join(rng.choices(string.ascii_letters, k=34))}"]
    return rng.choice([*kinds, f"-----BEGIN PRIVATE KEY-----\n{pem}\n-----END PRIVATE KEY-----"])


PERSONAL: dict[str, Callable[[random.Random], str]] = {
    "email": lambda rng: f"{new_word(rng)}.{new_word(rng)}@{new_word(rng)}.{rng.choice(['com', 'org', 'co.uk'])}",
    "phone": _phone,
    "ipv4": lambda rng: f"8.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}",
    "ipv6": _ipv6,
    "iban": _iban,
    "card": _card,
    "national_id": _national_id,
    "secret": _secret,
}
"""How a piece of each kind is made; each is right in form and checksum."""


def _off_by_one(number: str) -> str:
    return f"{number[:-1]}{(int(number[-1]) + 1) % 10}"


LOOKALIKES: dict[str, Callable[[random.Random], str]] = {
    "ipv4": lambda rng: f"192.168.{rng.randrange(256)}.{rng.randrange(1, 255)}",
    "iban": lambda rng: _off_by_one(_iban(rng)),
    "card": lambda rng: _off_by_one(_card(rng).replace(" ", "").replace("-", "")),
    "email": lambda rng: f"{new_word(rng)}@{new_word(rng)}",
    "secret": lambda rng: f"ghp_{new_word(rng)[:8]}",
}
"""What looks like a piece of a kind and is none: a private address, a wrong checksum, no domain, too short."""
