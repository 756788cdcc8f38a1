"""Personal and secret data in text: e-mail addresses, phone numbers, public IP addresses, IBANs, payment cards,
national ids and credentials.

A number counts only when its checksum, length and prefix are right, so that versions, hashes and tables of digits are
not taken for people: IBAN by ISO 13616 (mod 97), cards by ISO/IEC 7812 (Luhn), phones by libphonenumber's rules,
national ids by python-stdnum's.
"""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from data_pipelines.credentials import find_credentials
from data_pipelines.national_ids import find_national_ids
from data_pipelines.words import UNSPACED

KINDS = ("email", "phone", "ipv4", "ipv6", "iban", "card", "national_id", "secret")
"""Where two findings overlap and are equally long, the later kind has it."""
BETWEEN_PARTS = "\n\n"
"""What stands between the turns of an exchange in its text."""

SOME = rf"[^\W{UNSPACED}]"
"""A letter, a digit or _; an address that stands within Chinese ends where that goes on."""
EMAIL = re.compile(
    rf"(?<!{SOME})(?<![.+-])(?!_){SOME}+(?:[.%+'-]+{SOME}+)*[.%+-]*"
    rf"@(?:(?!_){SOME}(?:[\w-]{{0,61}}{SOME})?\.)+[^\W\d_{UNSPACED}]{{2,24}}(?!{SOME}|-)"
)
IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
IBAN = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z]{2}|[a-z]{2})\d{2} ?[A-Za-z0-9]{4}")
CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?=(?:[ -]?\d){9})")
"""How they begin: what follows may be a number of its own, so that the lengths that there are decide the end."""
CARD_DIGITS = (19, 16, 15, 14, 13)
PHONE = re.compile(r"\+\d[\d ().-]{6,}\d")
DIGITS = re.compile(r"\d")

IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip
"""Characters of an IBAN by country (SWIFT IBAN registry)."""


@dataclass(frozen=True)
class Finding:
    """One piece of personal data: its kind, one of ``KINDS``, the text at ``start:end``, and what exactly it is."""

    kind: str
    start: int
    end: int
    text: str
    detail: str = ""

    def masked(self) -> str:
        """The finding with all but its shape hidden, fit for a report."""
        if self.kind == "email":
            name, _, domain = self.text.partition("@")
            return f"{name[0]}***@***.{domain.rpartition('.')[2]}"
        if self.kind == "secret":
            return f"{self.text[:4]}*** ({self.detail})"
        shown = self.text[:3]
        note = f" ({self.detail})" if self.detail else ""
        return shown + re.sub(r"\w", "*", self.text[len(shown) :]) + note


def find(text: str, phone_region: str = "") -> list[Finding]:
    """All findings in ``text``, left to right, none within another. ``phone_region`` (such as "US") also finds numbers
    without a +."""
    findings: list[Finding] = []
    if "@" in text:
        findings += (Finding("email", *m.span(), m.group()) for m in EMAIL.finditer(text))
    findings += (Finding("secret", start, end, text[start:end], what) for what, start, end in find_credentials(text))
    if DIGITS.search(text):
        findings += (Finding("ipv4", *m.span(), m.group()) for m in IPV4.finditer(text) if is_public_ipv4(m.group()))
        if ":" in text:
            findings += (Finding("ipv6", *m.span(), m.group()) for m in IPV6.finditer(text) if is_public(m.group()))
        findings += (Finding("iban", start, end, text[start:end]) for start, end in _ibans(text))
        findings += (Finding("card", start, end, text[start:end]) for start, end in _cards(text))
        found = find_national_ids(text)
        findings += (Finding("national_id", start, end, text[start:end], what) for what, start, end in found)
        if phone_region or PHONE.search(text):
            findings += _phones(text, phone_region)
    return _apart(findings) if len(findings) > 1 else findings


def _apart(findings: list[Finding]) -> list[Finding]:
    """Left to right, of findings that overlap only the longest."""
    kept: list[Finding] = []
    for finding in sorted(findings, key=lambda f: (f.start - f.end, -KINDS.index(f.kind), f.start)):
        if all(finding.end <= other.start or other.end <= finding.start for other in kept):
            kept.append(finding)
    return sorted(kept, key=lambda finding: finding.start)


def counts(text: str, phone_region: str = "") -> list[int]:
    """How many findings of each of ``KINDS``."""
    kinds = [finding.kind for finding in find(text, phone_region)]
    return [kinds.count(kind) for kind in KINDS] if kinds else [0] * len(KINDS)


def redact(text: str, kinds: Collection[str], phone_region: str = "") -> tuple[str, int]:
    """(``text`` with every finding of ``kinds`` replaced by its kind in brackets, how many there were)."""
    [clean], found = redact_parts([text], kinds, phone_region)
    return clean, found.total()


def redact_parts(
    parts: Sequence[str], kinds: Collection[str], phone_region: str = ""
) -> tuple[list[str], Counter[str]]:
    """(the parts of a text, such as the turns of an exchange, with what is found in the whole of them replaced in each
    that holds some of it, how many findings of each kind there were).

    A turn alone would not do: the word that says what a number is may stand in the turn before.
    """
    wanted = [finding for finding in find(BETWEEN_PARTS.join(parts), phone_region) if finding.kind in kinds]
    clean = []
    start = 0
    for part in parts:
        redacted = part
        for finding in reversed(wanted):
            first, end = max(finding.start - start, 0), min(finding.end - start, len(part))
            if first < end:
                redacted = f"{redacted[:first]}[{finding.kind}]{redacted[end:]}"
        clean.append(redacted)
        start += len(part) + len(BETWEEN_PARTS)
    return clean, Counter(finding.kind for finding in wanted)


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for begin in IBAN.finditer(text):
        length = IBAN_LENGTHS.get(begin[0][:2].upper(), 0)
        own = _iban_form(length).match(text, begin.start()) if length else None
        if own and is_iban(own[0]):
            yield own.span()


@functools.cache
def _iban_form(length: int) -> re.Pattern[str]:
    groups, rest = divmod(length - 4, 4)
    tail = f" ?[A-Za-z0-9]{{{rest}}}" if rest else ""
    return re.compile(rf"[A-Za-z]{{2}}\d\d(?: ?[A-Za-z0-9]{{4}}){{{groups}}}{tail}(?![A-Za-z0-9])")


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for begin in CARD.finditer(text):
        for digits in CARD_DIGITS:
            own = _card_form(digits).match(text, begin.start())
            if own and is_card(own[0]):
                yield own.span()
                break


@functools.cache
def _card_form(digits: int) -> re.Pattern[str]:
    """So many digits; where they are in groups another group of four after them makes a table of numbers."""
    return re.compile(rf"(?:\d{{{digits}}}|\d(?:[ -]?\d){{{digits - 1}}}(?![ -]\d{{4}}))(?![\w-]|\.\d)")


def _phones(text: str, region: str) -> Iterator[Finding]:
    import phonenumbers  # a second of imports that most texts never need

    for match in phonenumbers.PhoneNumberMatcher(text, region or None):
        yield Finding("phone", match.start, match.end, match.raw_string)


def is_public_ipv4(text: str) -> bool:
    """Four octets that are a globally routable address: not private, loopback, multicast or documentation."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and address.packed[-1] != 0


def is_public(text: str) -> bool:
    """An IPv6 address that is globally routable."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def is_iban(text: str) -> bool:
    """Right length for its country and checksum 1 modulo 97 (ISO 13616); all in capitals or none."""
    compact = text.replace(" ", "").upper()
    if text != text.upper() and text != text.lower():
        return False
    if IBAN_LENGTHS.get(compact[:2]) != len(compact):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """A length and prefix that Visa, Mastercard, American Express, Discover, Diners or JCB issue, and Luhn's sum."""
    digits = re.sub(r"[ -]", "", text)
    if not CARD_ISSUERS.fullmatch(digits) or len(set(digits)) == 1:
        return False
    doubled = [int(d) * 2 for d in digits[-2::-2]]
    return (sum(int(d) for d in digits[-1::-2]) + sum(d - 9 if d > 9 else d for d in doubled)) % 10 == 0


CARD_ISSUERS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}"  # Visa
    r"|5[1-5]\d{14}|2(?:2[2-9]|[3-6]\d|7[01])\d{13}|2720\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|6(?:011|5\d\d|4[4-9]\d)\d{12}"  # Discover
    r"|3(?:0[0-5]|[68]\d)\d{11}"  # Diners
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
)
