"""Check of a caption's words against the words that OCR reads in the picture.

A caption claims a price ("$49", "49 euros", "priced 49", "20 % off") or words ("... headline SALE", any words in quotation marks). A claim
is supported if the picture holds it: a price by its digits, words if at least half of them were read, up to misread letters. One claim
without support gives the flag `words_disagree`, and so does a caption that denies words ("without text") of a picture that has some. A
picture in which OCR reads nothing supports no claim. Numbers and words that a caption does not claim to be printed are not checked, nor is
a word of the picture that the caption leaves out.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmsid.annotate.ocr import Line, check_installed, read_lines

DISAGREE = "words_disagree"
SIMILAR = 0.75  # of two words, difflib's ratio: one letter of four may be misread
MIN_LETTERS = 12  # of a line that is small print, as in `text_overlays`
MAX_HEIGHT = 0.2  # of the picture

_NUMBER = r"\d[\d.,]*"
_CURRENCY = r"[$€£¥₹]|\b(?:usd|eur|gbp|chf|rs\.?)"
_PRICES = re.compile(
    rf"(?:{_CURRENCY})\s?({_NUMBER})|({_NUMBER})\s?(?:[$€£¥₹%]|(?:usd|eur|gbp|chf|dollars?|euros?|pounds?|percent)\b)"
    rf"|\b(?:priced?|costs?|costing)\s(?:tag\s)?(?:at\s|of\s|is\s|reads\s|:\s?)?({_NUMBER})",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"“„«]([^\"“”„«»]{2,80})[\"”“»]|(?<!\w)['‘]([^'‘’]{2,80})['’](?!\w)")
_PRINTED = re.compile(
    r"\b(?:headline|slogan|caption|logo|label|sign|title|words?|text|letters|reads?|reading|says?|saying|marked|labelled|labeled)"
    r"(?: is| are| that| of)?:? ((?:[A-Z0-9][A-Z0-9&'!-]+(?:\s|\b))+)"
)
_DENIED = re.compile(r"\b(?:no|without(?: any)?|free of) (?:visible |readable |legible |printed )*(?:text|words?|writing|lettering)\b")


@dataclass(frozen=True)
class WordCheck:
    """Reads the words of pictures and compares captions with them. It can be pickled.

    Raises:
        ConfigError: the extra `ocr` is not installed.
    """

    key: str = "caption.check_words"

    def __post_init__(self) -> None:
        check_installed(self.key)

    def read(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Texts of all lines in the pictures."""
        return [line.text for picture in pictures for line in read_lines(picture)]

    def flags(self, texts: Sequence[str], lines: Sequence[str]) -> list[str]:
        """`words_disagree`, or no flag, for the texts of a record and the lines of its pictures."""
        return [DISAGREE] if any(disagrees(text, lines) for text in texts) else []


def disagrees(caption: str, lines: Sequence[str]) -> bool:
    """Whether a caption contradicts the lines that were read in its picture; see the module."""
    read = _words(" ".join(lines))
    if read and _DENIED.search(caption.casefold()):
        return True
    digits = [_digits(number) for number in re.findall(_NUMBER, " ".join(lines))]
    joined = "".join(read)
    return not all(_holds_price(price, digits) for price in claimed_prices(caption)) or not all(
        _holds_words(words, read, joined) for words in claimed_words(caption)
    )


def claimed_prices(caption: str) -> list[str]:
    """Digits of every price and percentage in a caption."""
    return [_digits(next(filter(None, found))) for found in _PRICES.findall(caption)]


def claimed_words(caption: str) -> list[list[str]]:
    """Words, casefolded, of every phrase that a caption claims to be printed in the picture."""
    phrases = [first or second for first, second in _QUOTED.findall(caption)] + _PRINTED.findall(caption)
    return [words for words in map(_words, phrases) if words]


def small_print(picture: Image.Image) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) of lines of at least twelve letters and at most a fifth of the picture's height, read by OCR."""
    height = picture.height
    return [(line.top, min(line.bottom, height), line.left, line.right) for line in read_lines(picture) if _is_small(line, height)]


def _is_small(line: Line, height: int) -> bool:
    return sum(letter.isalpha() for letter in line.text) >= MIN_LETTERS and line.bottom - line.top <= MAX_HEIGHT * height


def _holds_price(price: str, read: Sequence[str]) -> bool:
    """Whether a number that was read has these digits, or these digits and two more for the cents."""
    return any(number == price or (number.startswith(price) and len(number) == len(price) + 2) for number in read)


def _holds_words(words: Sequence[str], read: Sequence[str], joined: str) -> bool:
    """Whether at least half of the words were read: alone, or inside the joined words, because OCR loses spaces."""
    found = sum(word in joined or bool(difflib.get_close_matches(word, read, n=1, cutoff=SIMILAR)) for word in words)
    return 2 * found >= len(words)


def _digits(number: str) -> str:
    return re.sub(r"\D", "", number)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
