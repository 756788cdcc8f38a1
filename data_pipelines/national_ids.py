"""National identity, tax and insurance numbers of sixteen countries, checked by python-stdnum where it knows them.

A number that is nothing but digits is taken only where a word before it says what it is: one in ten passes its
checksum by chance.
"""

import functools
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CUE_CHARACTERS = 40
"""How far before a number the word may stand that says what it is."""


@dataclass(frozen=True)
class Scheme:
    """One kind of number: how it is written, the module of python-stdnum that checks it (empty: its form is all there
    is), and the words, whole ones, of which one must stand before it (empty: none)."""

    name: str
    form: str
    module: str = ""
    cues: str = ""


SCHEMES = (
    Scheme("US social security", r"\d{3}-\d{2}-\d{4}", "us.ssn"),
    Scheme("GB national insurance", r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?(?:\d\d ?){3}[A-D]"),
    Scheme("ES identity", r"(?:\d{8}|[XYZ]-?\d{7})-?[A-HJ-NP-TV-Z]", "es.nif"),
    Scheme("IT fiscal code", r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", "it.codicefiscale"),
    Scheme("FR social security", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?\d[\dAB] ?\d{3} ?\d{3} ?\d\d", "fr.nir"),
    Scheme("BR CPF", r"\d{3}\.\d{3}\.\d{3}-\d\d", "br.cpf"),
    Scheme("FI identity", r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", "fi.hetu"),
    Scheme("SE identity", r"(?:\d\d)?\d{6}[-+]\d{4}", "se.personnummer"),
    Scheme("CH insurance", r"756\.\d{4}\.\d{4}\.\d\d", "ch.ssn"),
    Scheme("BE national", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", "be.nn"),
    Scheme("KR registration", r"\d{6}-\d{7}", "kr.rrn"),
    Scheme("CN identity", r"\d{17}[\dX]", "cn.ric"),
    Scheme("IN Aadhaar", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}", "in_.aadhaar", r"aadhaar\w*|uidai|uid"),
    Scheme("PL PESEL", r"\d{11}", "pl.pesel", r"pesel\w*"),
    Scheme("DE tax", r"\d{2} ?\d{3} ?\d{3} ?\d{3}", "de.idnr", r"\w*steuer\w*|id-?nr|tins?|tax(?:es|payers?)?"),
    Scheme("NL citizen", r"\d{9}", "nl.bsn", r"bsn|burgerservice\w*|sofi(?:nummer)?"),
)

LIKELY = re.compile(r"\d(?:[A-Z .+-]?\d){5}")
"""What every number of ``SCHEMES`` has in it: where it is missing there is nothing to look for."""
EACH = "|".join(f"(?P<s{place}>{scheme.form})" for place, scheme in enumerate(SCHEMES))
FORMS = re.compile(rf"(?<![\w.-])(?=[0-9A-Z])(?:{EACH})(?![\w-]|\.\d)")


def find_national_ids(text: str) -> Iterator[tuple[str, int, int]]:
    """(name of the scheme, start, end) of every number whose form, checksum and context are right."""
    if not LIKELY.search(text):
        return
    position = 0
    while match := FORMS.search(text, position):
        position = match.start() + 1
        # A number may have the form of several schemes: the first whose check it passes has it.
        for place, scheme in enumerate(SCHEMES):
            own = match if match.lastgroup == f"s{place}" else _form(place).match(text, match.start())
            if own and _is_right(scheme, text, own.start(), own.end()):
                yield scheme.name, own.start(), own.end()
                position = own.end()
                break


@functools.cache
def _form(place: int) -> re.Pattern[str]:
    return re.compile(rf"{SCHEMES[place].form}(?![\w-]|\.\d)")


def _is_right(scheme: Scheme, text: str, start: int, end: int) -> bool:
    if scheme.cues and not _cue(scheme.cues).search(text, max(0, start - CUE_CHARACTERS), start):
        return False
    return not scheme.module or _check(scheme.module)(text[start:end])


@functools.cache
def _cue(words: str) -> re.Pattern[str]:
    """Whole words only: there is a tin in every setting."""
    return re.compile(rf"(?<![^\W_])(?:{words})(?![^\W_])", re.IGNORECASE)


@functools.cache
def _check(module: str) -> Callable[[str], bool]:
    check: Callable[[str], bool] = importlib.import_module(f"stdnum.{module}").is_valid
    return check
