"""What a word is: the same for lengths, duplicates, n-grams, leaks and the marks of a search.

Letters and digits with the marks that belong to them (the vowel signs of Hindi, accents that stand alone), and in
scripts that put no spaces between words, such as Chinese, Japanese and Thai, each character.
"""

import re
import unicodedata
from collections.abc import Iterator

UNSPACED = (
    "\u0e00-\u0edf"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3021-\u3029\u3031-\u303c\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"  # Kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
)
MARKS, RARE_MARKS = (
    "".join(chr(code) for code in range(first, end) if unicodedata.category(chr(code)) in ("Mn", "Mc"))
    for first, end in ((0x300, 0xFE00), (0xFE10, 0x1F000))  # without those that only choose a glyph
)
MARK = rf"(?:[{MARKS}]|(?=[\U00010000-\U0001efff])[{RARE_MARKS}])"
"""Those beyond 16 bits apart: a class with many of them is searched one by one."""
SPACED = re.compile(r"\w+")
BEYOND_LATIN = re.compile(r"[^\x00-\u02ff\u1e00-\u20cf]")
OTHERS = re.compile(r"[\u0300-\u036f\u0483-\u1dff\u20d0-\u20ff\u2ce0-\U0010ffff]")
"""Where the scripts are in which ``SPACED`` is not enough: not Latin, Greek or Cyrillic."""
EVERY = re.compile(rf"(?=[{UNSPACED}])\w{MARK}*|[^\W{UNSPACED}]+(?:{MARK}+[^\W{UNSPACED}]*)*")


def _pattern(text: str) -> re.Pattern[str]:
    """Whole runs of letters are as good as ``EVERY`` and much faster where there is nothing else."""
    simple = text.isascii() or not BEYOND_LATIN.search(text) or not OTHERS.search(text)
    return SPACED if simple else EVERY


def words_of(text: str) -> list[str]:
    """The words of ``text`` in order and in lower case, without what stands between them."""
    lower = text.lower()
    return _pattern(lower).findall(lower)


def word_places(text: str) -> Iterator[re.Match[str]]:
    """The words of ``text`` where they stand, as they are written."""
    return _pattern(text).finditer(text)
