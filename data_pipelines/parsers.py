"""The text of a PDF or a web page, by pypdf and selectolax; what cannot be read raises Unreadable with the reason."""

import codecs
import io
import logging
import re
from typing import Any

BLOCKS = (
    "address, article, blockquote, br, caption, dd, div, dl, dt, figcaption, h1, h2, h3, h4, h5, h6, hr, li, main, ol, "
    "p, pre, section, table, td, th, tr, ul"
)
NOT_TEXT = ("script", "style", "noscript", "template", "svg", "iframe", "button", "select", "nav", "footer", "aside")
CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


class Unreadable(ValueError):
    """A file that holds no text for us; the message is the reason that is written down."""


def html_text(content: bytes) -> tuple[str, str]:
    """(title, text) of a web page: a line a block, without scripts, styles, navigation and footers.

    Where the page says which part is its main one, only that is read. Raises Unreadable for a broken encoding.
    """
    from selectolax.lexbor import LexborHTMLParser

    page = LexborHTMLParser(_decode(content))
    title = page.css_first("title")
    name = " ".join(title.text().split()) if title else ""
    body = page.css_first("main") or page.css_first("article") or page.body
    if body is None:
        return name, ""
    for tag in NOT_TEXT:
        for node in body.css(tag):
            node.decompose()
    for node in body.css(BLOCKS):
        node.insert_before("\n")
        node.insert_after("\n")
    lines = (" ".join(line.split()) for line in body.text(deep=True).split("\n"))
    return name, "\n".join(filter(None, lines))


def _decode(content: bytes) -> str:
    """The text, in the encoding of its byte order mark or else the declared one (HTML Standard, 13.2.3)."""
    declared = CHARSET.search(content[:2048])
    encoding = declared[1].decode("ascii", "replace") if declared else "utf-8"
    if encoding.lower().startswith(("utf-16", "utf-32")):
        encoding = "utf-8"  # a declaration that can be read as ASCII is not in these
    if content.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return content.decode(encoding)
    except LookupError:
        raise Unreadable("unknown encoding") from None
    except UnicodeError:  # some codecs raise it itself
        raise Unreadable("undecodable file") from None


def pdf_text(content: bytes) -> tuple[str, str]:
    """(title, text) of a PDF, its pages separated by an empty line. Raises Unreadable for a broken, an encrypted or a
    scanned one."""
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        reader = PdfReader(io.BytesIO(content))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("encrypted file")
        title = _title(reader)
        pages = [page.extract_text().strip() for page in reader.pages]
    except Unreadable:
        raise
    except Exception as error:  # a parser of broken files raises whatever the breakage leads to
        raise Unreadable(f"unreadable file ({type(error).__name__})") from None
    text = "\n\n".join(filter(None, pages))
    if not text:
        raise Unreadable("no text in it, perhaps a scan")
    return title, text


def _title(reader: Any) -> str:
    given = (reader.metadata or {}).get("/Title")
    return str(given).strip() if given else ""
