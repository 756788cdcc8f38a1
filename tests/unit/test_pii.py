"""Personal data detectors against a labelled set that is made here, and against what looks like it and is not."""

import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.pii import IBAN_LENGTHS, KINDS, counts, find, is_card, is_iban, is_public_ipv4

FILLER = ["the", "value", "of", "this", "option", "is", "read", "once", "and", "kept", "for", "later"]


def luhn_digit(body: str) -> str:
    """The digit that makes ``body`` a valid card number."""
    total = sum(sum(divmod(int(d) * (2 if i % 2 == 0 else 1), 10)) for i, d in enumerate(reversed(body)))
    return str(-total % 10)


def iban(country: str, rng: random.Random) -> str:
    """A valid IBAN with a random account."""
    account = "".join(rng.choices(string.digits, k=IBAN_LENGTHS[country] - 4))
    number = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    return f"{country}{98 - number % 97:02d}{account}"


def card(rng: random.Random) -> str:
    """A valid Visa number in groups of four."""
    body = "4" + "".join(rng.choices(string.digits, k=14))
    digits = body + luhn_digit(body)
    return rng.choice(["", " ", "-"]).join(digits[i : i + 4] for i in range(0, 16, 4))


def labelled(rng: random.Random) -> tuple[str, dict[str, int]]:
    """A text with a known number of findings of each kind."""
    make = {
        "email": lambda: f"{rng.choice(['ann', 'b.o', 'c+d'])}{rng.randrange(99)}@mail{rng.randrange(9)}.example.org",
        "phone": lambda: f"+49 30 {rng.randrange(200000, 999999)}",
        "ipv4": lambda: f"8.{rng.randrange(1, 255)}.{rng.randrange(1, 255)}.{rng.randrange(1, 255)}",
        "iban": lambda: iban(rng.choice(["DE", "GB", "NO", "MT"]).replace("GB", "FR"), rng),
        "card": lambda: card(rng),
    }
    truth = {kind: rng.randrange(3) for kind in KINDS}
    pieces = [make[kind]() for kind, number in truth.items() for _ in range(number)]
    rng.shuffle(pieces)
    words = []
    for piece in pieces:
        words += [*rng.choices(FILLER, k=4), f"({piece})," if rng.random() < 0.3 else piece]
    return " ".join([*words, "end."]), truth


def test_all_of_a_labelled_set_is_found_and_nothing_else() -> None:
    rng = random.Random(7)
    for _ in range(300):
        text, truth = labelled(rng)
        assert dict(zip(KINDS, counts(text), strict=True)) == truth, text


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4.5 of 2026-11-21 10:00:00",
        "hosts 127.0.0.1, 10.1.2.3, 192.168.0.1, 0.0.0.0 and 192.0.2.7",
        "release v8.8.8.8",
        "@decorator and user@host without a domain",
        "3.14159265358979323846 and 0x4111111111111111",
        "1111 1111 1111 1111 and 4111111111111112",
        "DE00 1234 5678 9012 3456 78",
        "sha 4111111111111111abcdef",
        "a + 1 (2) 3",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert counts(text) == [0] * len(KINDS)


@pytest.mark.parametrize("number", ["GB82 WEST 1234 5698 7654 32", "DE89370400440532013000", "NO9386011117947"])
def test_published_ibans(number: str) -> None:
    assert is_iban(number)
    assert counts(f"Pay to {number}.")[KINDS.index("iban")] == 1


@pytest.mark.parametrize("number", ["4111111111111111", "5555555555554444", "378282246310005", "30569309025904"])
def test_published_test_cards(number: str) -> None:
    assert is_card(number)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(4, 21), st.sampled_from(string.digits))
def test_one_wrong_digit_breaks_an_iban(seed: int, place: int, digit: str) -> None:
    right = iban("DE", random.Random(seed))
    wrong = right[:place] + digit + right[place + 1 :]
    assert is_iban(right)
    assert is_iban(wrong) == (wrong == right)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 15), st.sampled_from(string.digits))
def test_one_wrong_digit_breaks_a_card(seed: int, place: int, digit: str) -> None:
    right = card(random.Random(seed)).replace(" ", "").replace("-", "")
    wrong = right[:place] + digit + right[place + 1 :]
    assert is_card(right)
    assert is_card(wrong) == (wrong == right)


def test_public_addresses_only() -> None:
    assert is_public_ipv4("8.8.8.8")
    assert not is_public_ipv4("300.1.1.1")
    assert not is_public_ipv4("224.0.0.5")


def test_national_phone_numbers_need_a_region() -> None:
    text = "call (650) 253-0000 today"
    assert counts(text)[KINDS.index("phone")] == 0
    assert counts(text, "US")[KINDS.index("phone")] == 1


def test_masks_show_the_kind_and_hide_the_person() -> None:
    text = "ann.smith@example.org and 4111 1111 1111 1111"
    masked = [finding.masked() for finding in find(text)]
    assert masked == ["a***@***.org", "411* **** **** ****"]
