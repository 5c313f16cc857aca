"""Text of HTML fragments in titles and descriptions."""

from __future__ import annotations

import html
import html.entities
import re

LONGEST_HTML = 100_000  # characters of a text that are parsed; the rest is left out
MAYBE_HTML = r"</?[a-zA-Z!]|&#|&[a-zA-Z][a-zA-Z0-9]*;"  # RE2: what every text contains that `without_html` changes

_PASSES = 3  # feeds escape HTML up to twice
_BLOCKS = (
    "address article aside blockquote body br center dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr "
    "html li main nav ol option p pre section table tbody td tfoot th thead title tr ul"
)
_INLINE = (
    "a abbr audio b bdi bdo big button canvas cite code del em embed font i iframe img input ins kbd label link map mark meta noscript "
    "object picture q s samp script select small source span strike strong style sub sup svg textarea time tt u var video wbr"
)
_ATTRIBUTE = r"""\s+[\w:@.-]{1,100}+\s*+=\s*+(?:"[^"]{0,2000}+"|'[^']{0,2000}+'|[^\s<>"']{1,2000}+)"""
_TAG = re.compile(rf"</?(?:{'|'.join((_BLOCKS + ' ' + _INLINE).split())})(?:{_ATTRIBUTE}){{0,50}}+\s*+/?>|<!doctype\s[^<>]{{0,200}}>", re.I)
_BLOCK = re.compile(rf"</?(?:{'|'.join(_BLOCKS.split())})[\s/>]", re.I)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});", re.I)
_WITHOUT_TEXT = ["script", "style", "template", "noscript", "iframe", "object", "svg"]


def without_html(text: str) -> str:
    """`text` without HTML tags and comments, and with entities as characters. Blocks (paragraphs, list items, cells) are lines.

    Only known tags and complete entities count: "size < 5 & > 3", "I <3 you" and "?a=1&copy=2" are unchanged.
    """
    for _ in range(_PASSES):
        plain = _without_tags(text) if "<!--" in text or _TAG.search(text, 0, LONGEST_HTML) else _with_characters(text).strip()
        if plain == text:
            return text
        text = plain
    return text


def _with_characters(text: str) -> str:
    """`text` with complete entities as characters."""
    if "&" not in text:
        return text
    return _ENTITY.sub(_character, text)


def _character(entity: re.Match[str]) -> str:
    name = entity[0][1:]
    if not name.startswith("#") and name not in html.entities.html5:  # html.unescape would read the first letters of a longer name
        return entity[0]
    return html.unescape(entity[0]).replace("\xa0", " ").replace("\0", " ")


def _without_tags(text: str) -> str:
    from selectolax.lexbor import LexborHTMLParser

    text = _without_comments(text[:LONGEST_HTML])
    pieces, end = [], 0
    for tag in _TAG.finditer(text):  # what is not a known tag is text, although a parser may take it for a tag
        pieces += [_escaped(text[end : tag.start()]), "\n" if _BLOCK.match(tag[0]) else "", tag[0]]
        end = tag.end()
    tree = LexborHTMLParser("".join([*pieces, _escaped(text[end:])]))
    tree.strip_tags(_WITHOUT_TEXT)
    plain = "" if tree.root is None else tree.root.text(deep=True, separator="")
    lines = (" ".join(line.split()) for line in plain.replace("\0", " ").splitlines())
    return "\n".join(line for line in lines if line)


def _without_comments(text: str) -> str:
    pieces, start = [], 0
    while (begin := text.find("<!--", start)) >= 0 and (end := text.find("-->", begin + 4)) >= 0:
        pieces.append(text[start:begin])
        start = end + 3
    return "".join([*pieces, text[start:]])


def _escaped(text: str) -> str:
    return _with_characters(text).replace("&", "&amp;").replace("<", "&lt;")
