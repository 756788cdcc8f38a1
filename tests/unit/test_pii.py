"""Personal data detectors against a labelled set that is made here, and against what looks like it and is not."""

import base64
import importlib
import itertools
import json
import random
import string
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.pii import IBAN_LENGTHS, KINDS, counts, find, is_card, is_iban, is_public_ipv4, redact

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


DIGITS_AND_LETTERS = string.ascii_letters + string.digits


def some(rng: random.Random, alphabet: str, number: int) -> str:
    return "".join(rng.choices(alphabet, k=number))


def with_check(rng: random.Random, make: Callable[[random.Random], str], module: str) -> str:
    """The first of many that python-stdnum takes."""
    check = importlib.import_module(f"stdnum.{module}").is_valid
    return next(number for number in (make(rng) for _ in range(100_000)) if check(number))


def token(rng: random.Random) -> str:
    """A JSON web token."""
    parts = [json.dumps({"alg": "HS256", "typ": "JWT"}), json.dumps({"sub": rng.randrange(10**9)})]
    encoded = [base64.urlsafe_b64encode(part.encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, some(rng, DIGITS_AND_LETTERS, 43)])


def private_key(rng: random.Random) -> str:
    body = "\n".join(some(rng, DIGITS_AND_LETTERS, 64) for _ in range(4))
    return f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"


SECRETS: dict[str, Callable[[random.Random], str]] = {
    "AWS access key": lambda rng: "AKIA" + some(rng, string.ascii_uppercase + string.digits, 16),
    "GitHub token": lambda rng: "ghp_" + some(rng, DIGITS_AND_LETTERS, 36),
    "GitLab token": lambda rng: "glpat-" + some(rng, DIGITS_AND_LETTERS, 20),
    "OpenAI key": lambda rng: "sk-proj-" + some(rng, DIGITS_AND_LETTERS, 60),
    "Anthropic key": lambda rng: "sk-ant-api03-" + some(rng, DIGITS_AND_LETTERS, 93),
    "Hugging Face token": lambda rng: "hf_" + some(rng, string.ascii_letters, 34),
    "Google API key": lambda rng: "AIza" + some(rng, DIGITS_AND_LETTERS, 35),
    "Slack token": lambda rng: f"xoxb-{some(rng, string.digits, 12)}-{some(rng, DIGITS_AND_LETTERS, 24)}",
    "Stripe key": lambda rng: "sk_live_" + some(rng, DIGITS_AND_LETTERS, 24),
    "SendGrid key": lambda rng: f"SG.{some(rng, DIGITS_AND_LETTERS, 22)}.{some(rng, DIGITS_AND_LETTERS, 43)}",
    "JSON web token": token,
    "private key": private_key,
}

NATIONAL: dict[str, Callable[[random.Random], str]] = {
    "US social security": lambda rng: with_check(
        rng, lambda r: f"{r.randrange(100, 899)}-{r.randrange(10, 99)}-{r.randrange(1000, 9999)}", "us.ssn"
    ),
    "GB national insurance": lambda rng: f"AB {some(rng, string.digits, 2)} 34 56 {rng.choice('ABCD')}",
    "ES identity": lambda rng: with_check(
        rng, lambda r: some(r, string.digits, 8) + some(r, string.ascii_uppercase, 1), "es.nif"
    ),
    "IT fiscal code": lambda rng: with_check(
        rng, lambda r: f"RSSMRA{r.randrange(50, 99)}A{r.randrange(10, 28)}H501" + some(r, string.ascii_uppercase, 1),
        "it.codicefiscale",
    ),
    "FR social security": lambda rng: with_check(
        rng, lambda r: f"1 {r.randrange(50, 99)} 05 75 {r.randrange(100, 999)} 042 {r.randrange(10, 98)}", "fr.nir"
    ),
    "BR CPF": lambda rng: with_check(
        rng, lambda r: f"{some(r, string.digits, 3)}.{some(r, string.digits, 3)}.{some(r, string.digits, 3)}-"
        + some(r, string.digits, 2), "br.cpf",
    ),
    "FI identity": lambda rng: with_check(
        rng, lambda r: f"1311{r.randrange(50, 99)}-{r.randrange(100, 899)}{r.choice('0123456789ABCDEFHJK')}", "fi.hetu"
    ),
    "SE identity": lambda rng: with_check(
        rng, lambda r: f"8{r.randrange(9)}0{r.randrange(1, 9)}1{r.randrange(9)}-{some(r, string.digits, 4)}",
        "se.personnummer",
    ),
    "CN identity": lambda rng: with_check(
        rng, lambda r: f"11010519{r.randrange(50, 99)}1231{some(r, string.digits, 3)}{r.choice('01234X')}", "cn.ric"
    ),
    "PL PESEL": lambda rng: "PESEL: " + with_check(
        rng, lambda r: f"8{r.randrange(9)}0{r.randrange(1, 9)}1{r.randrange(9)}{some(r, string.digits, 5)}", "pl.pesel"
    ),
    "DE tax": lambda rng: "Steuer-ID " + with_check(rng, lambda r: some(r, "123456789", 11), "de.idnr"),
    "NL citizen": lambda rng: "BSN " + with_check(rng, lambda r: "1" + some(r, string.digits, 8), "nl.bsn"),
}  # fmt: skip


def labelled(rng: random.Random) -> tuple[str, dict[str, int]]:
    """A text with a known number of findings of each kind."""
    make = {
        "email": lambda: f"{rng.choice(['ann', 'b.o', 'c+d'])}{rng.randrange(99)}@mail{rng.randrange(9)}.example.org",
        "phone": lambda: f"+49 30 {rng.randrange(200000, 999999)}",
        "ipv6": lambda: f"2a00:1450:{rng.randrange(4096, 65535):x}::{rng.randrange(1, 65535):x}",
        "national_id": lambda: NATIONAL[rng.choice(sorted(NATIONAL))](rng),
        "secret": lambda: SECRETS[rng.choice(sorted(SECRETS))](rng),
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


def decoy(rng: random.Random) -> str:
    """What looks like a finding and is none: a wrong checksum, a private address, a version, a placeholder."""
    number = "".join(rng.choices(string.digits, k=16))
    last = str((int(luhn_digit("4" + number[:14])) + rng.randrange(1, 10)) % 10)
    return rng.choice(
        [
            f"v{rng.randrange(9)}.{rng.randrange(99)}.{rng.randrange(99)}.{rng.randrange(99)}",
            f"10.{rng.randrange(255)}.{rng.randrange(255)}.{rng.randrange(255)}",
            "4" + number[:14] + last,
            f"sha256:{rng.getrandbits(128):032x}",
            f"DE00 {number[:4]} {number[4:8]} {number[8:12]} {number[12:]} 00",
            f"000-{number[:2]}-{number[2:6]}",
            f"{number[:11]}",
            f"fe80::{rng.randrange(1, 65535):x}",
            "AKIAIOSFODNN7EXAMPLE",
            "sk-your-key-goes-here-and-nowhere-else-in-the-file",
            f"user@host{rng.randrange(99)}",
            f"{rng.randrange(10, 28)}.{rng.randrange(10, 13)}.{rng.randrange(1950, 2030)}",
            f"1{number[:3]}-{number[3:5]}",
        ]
    )


def test_precision_and_recall_on_a_labelled_set() -> None:
    """Each kind is hidden among as many decoys; prints what was measured where it fails."""
    rng = random.Random(11)
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    unlike = []
    for _ in range(600):
        text, truth = labelled(rng)
        words = text.split(" ")
        for _ in range(4):
            words.insert(0, f"{rng.choice(FILLER)} {decoy(rng)} {rng.choice(FILLER)}")
        text = " ".join(words)
        for kind, found in zip(KINDS, counts(text), strict=True):
            right[kind] += min(found, truth[kind])
            wrong[kind] += max(0, found - truth[kind])
            missed[kind] += max(0, truth[kind] - found)
            if found != truth[kind]:
                unlike.append((kind, found, truth[kind], text))
    for kind in KINDS:
        assert right[kind] > 400
        precision, recall = right[kind] / (right[kind] + wrong[kind]), right[kind] / (right[kind] + missed[kind])
        assert (precision > 0.99) and (recall > 0.99), (
            kind,
            precision,
            recall,
            [u for u in unlike if u[0] == kind][:3],
        )


@pytest.mark.parametrize(("name", "make"), [*SECRETS.items(), *NATIONAL.items()])
def test_each_scheme_is_found_whole_and_named(name: str, make: Callable[[random.Random], str]) -> None:
    rng = random.Random(5)
    for _ in range(5):
        number = make(rng)
        [finding] = find(f"here it is: {number} and no more")
        assert finding.detail == name
        assert number.endswith(finding.text)


def test_findings_do_not_overlap() -> None:
    rng = random.Random(2)
    for _ in range(100):
        findings = find(labelled(rng)[0])
        assert all(a.end <= b.start for a, b in itertools.pairwise(findings))


def test_redaction_leaves_nothing_to_find() -> None:
    rng = random.Random(8)
    for _ in range(100):
        text, truth = labelled(rng)
        clean, number = redact(text, KINDS)
        assert number == sum(truth.values())
        assert not find(clean), clean
    assert redact("mail a@b.org or 8.8.8.8", ["email"]) == ("mail [email] or 8.8.8.8", 1)


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("4111 1111 1111 1111 12/25", "4111 1111 1111 1111"),
        ("4111111111111111 123", "4111111111111111"),
        ("2024 4111-1111-1111-1111, 2025", "4111-1111-1111-1111"),
        ("2223003122003222", "2223003122003222"),
        ("2223 0031 2200 3222", "2223 0031 2200 3222"),
        ("AT611904300234573201 BKAUATWW", "AT611904300234573201"),
        ("ES9121000418450200051332 EUR 50", "ES9121000418450200051332"),
        ("PL61109010140000071219812874 PLN", "PL61109010140000071219812874"),
        ("SE4550000000058398257466 SEB", "SE4550000000058398257466"),
        ("de89 3704 0044 0532 0130 00 eur", "de89 3704 0044 0532 0130 00"),
        ("o'brien@mail.com", "o'brien@mail.com"),
        ("mail='ann@mail.com'", "ann@mail.com"),
        ("jürgen@müller.de", "jürgen@müller.de"),
        ("写信给ann@mail.com谢谢", "ann@mail.com"),
    ],
)
def test_a_finding_ends_where_the_next_thing_begins(text: str, found: str) -> None:
    assert [finding.text for finding in find(text)] == [found]


def test_a_table_of_numbers_is_no_card() -> None:
    assert not find("4111 1111 1111 1111 4096 8192 1024 2048")


def test_a_private_key_that_is_cut_off_is_found_as_far_as_it_goes() -> None:
    key = private_key(random.Random(3)).rpartition("\n")[0]
    assert redact(f"{key}\n\nRead on here.", ["secret"])[0] == "[secret]\n\nRead on here."


@pytest.mark.parametrize("text", ["setting 86095742719", "guid 234123412346", "Sofia 111222333"])
def test_the_word_that_names_a_number_is_a_whole_one(text: str) -> None:
    assert not find(text)
    assert [f.kind for f in find(text.replace("setting", "user_tin:").replace("guid", "UID").replace("Sofia", "sofi"))]
