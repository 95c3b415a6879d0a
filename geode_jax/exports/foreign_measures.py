"""Detects questions that may ask for a unit or quantity that `units` does not know.

A question that names no unit is answered in the usual unit of its kind. That is wrong if the
question asks for another unit in words that `units` cannot read. No list of such words can be
complete, so anything that may be one counts: a word of measure that is not in `units.UNITS`, a
share or a multiple, an abbreviation with full stops, a unit joined to another word, script that is
not Latin, a question that is not English. A false alarm loses one question's value; a miss would
train on a value in the wrong unit. Python 3.9, the standard library alone.
"""

from __future__ import annotations

import re
import unicodedata

_PREFIX = (
    r"(?:mill?i|[cz]enti|de[cz]i|de[ck]a|he[ck]to|[ck]h?ilo|quilo|mega|giga|mi[ck]ro|nano|pi[ck]o)"
)
_START, _STOP = r"(?<![a-z0-9])", r"(?![a-z0-9])"
_SHARES = re.compile(
    rf"{_START}(?:ratios?|fractions?|proportions?|percent(?:ages?|iles?)?|per cent"
    rf"|times|multiples? of|pixels?|voxels?|normali[sz]ed|logarithms?|on a scale){_STOP}|%"
)
"""Words for numbers that have no unit of length, area or count."""
_WORDS = re.compile(
    rf"{_START}(?:(?!(?:milli|centi|kilo)[ -]?met(?:er|re)s?{_STOP})"
    rf"{_PREFIX}[ -]?met(?:er|re|ro|ri)[sn]?|met(?:ros?|ri|ern)|d[km]|dam|hm|um|nm"
    r"|mi[ck]r(?:on|a)s?|mikrons?|angstroms?|mils?|thous?|miles?|furlongs?|fathoms?|cubits?|paces?"
    r"|leagues?|parsecs?|light-?years?|arm-?lengths?|handspans?|hand-?widths?|foot-?steps"
    r"|hectares?|acres?|tsubo|tatamis?|pyeong|bighas?"
    r"|(?:milli|centi|deci)?lit(?:er|re)s?|ml|gallons?|pints?|quarts?"
    r"|kilograms?|kgs?|grams?|pounds?|lbs?|ounces?|seconds|minutes|hours"
    rf"|dozens?|pouces?|pieds?|pulgadas?|pollici|zoll|fuss){_STOP}"
)
_GLUED = re.compile(
    r"(?<=[a-z)\]])[/_-](?:sq ?)?(?:(?:[mck]m|m|ft|yd|fts|yds)[23]?"
    rf"|met(?:er|re)s?|foot|feet|inch(?:es)?|yards?|degrees?){_STOP}|(?<=[a-z)\]])[/_]in{_STOP}"
)
"""A unit that is joined to the word before it: "height/mm"."""
_DOTTED = re.compile(
    rf"(?<![a-z0-9.])(?!(?:e\.g|i\.e|a\.k\.a|w\.r\.t|t\.v|a\.m|p\.m){_STOP})"
    rf"(?!sq\.)[a-z](?:\.[a-z])+{_STOP}|{_START}[cmkd]\. m{_STOP}"
)
"""An abbreviation of single letters: "c.m."."""
_MARKS = re.compile(r"(?:\bin |\bunits?:? |[(\[/] ?)['\"]+(?! ?\w)")
"""Quotation marks that may mean feet or inches, without a number before them."""
_NUMBERS = (
    r"(?!(?:an?|the|this|that|these|those|it|its|your|only|just|one|single|exactly|no|any|each|both"
    r"|all|integers?|numbers?|digits?|numerals?|numeric(?:al)?|decimals?|values?|words?|english"
    r"|plain|text|floats?|arabic|whole|nothing|answers?|results?|estimates?|options?|letters?"
    r"|images?|videos?|frames?|pictures?|views?|coordinates|vision|geometry|depth|detail|met(?:er|re)s?"
    rf"|feet|inch(?:es)?|yards?|square|sq|items?|centimet\w+|millimet\w+|kilomet\w+){_STOP})"
)
_ASKED = re.compile(
    r"\b(?:reply|answer(?:ed)?|respond|express(?:ed)?|report(?:ed)?|measured?|give|state)"
    r"(?: (?:it|this|that|your|the|an?|answers?|results?|values?|distances?|lengths?|sizes?))*"
    rf" (?:with|in|as|using|by) {_NUMBERS}[a-z]+{_STOP}"
    r"|\b(?:reply|answer|respond|express)\b[^.?!]*"
    rf" (?:with|in|as|using|by) {_NUMBERS}[a-z]+ ?(?:[.?!,;)]|$)"
    rf"|\b(?:give|use|using|provide) {_NUMBERS}[a-z]+ ?(?:[.?!,;)]|$)"
    rf"|\bround(?:ed|ing)?(?: \w+){{0,4}} to the nearest {_NUMBERS}[a-z]+|__+ ?\(?[a-z]"
)
"""An instruction how to answer, such as "answer in ...", with a word that may be a unit."""
_OTHER_QUANTITY = {
    "length": r"\bvolumes?\b|\b(?:surface|floor) (?:area|space)|\bwhat is the (?:total )?area\b"
    r"|\bsquare footage\b",
    "area": r"\bvolumes?\b|\bperimeter\b|\bcircumference\b|\bdiagonal\b|\bhow (?:tall|high|long|far"
    r"|deep|wide)\b|\bwhat is the (?:height|length|width|depth)\b",
    "count": r"\bpairs?\b|\bhundreds\b|\bthousands\b|\b(?:in|how many|number of) (?:sets|groups"
    r"|rows|kinds|types|scores)\b",
}
_ENGLISH = re.compile(
    r"\b(?:how|what|which|where|the|are|there|this|between|from|please|estimate|measure|give|tell"
    r"|find|determine|calculate|compute|provide|report|state|count|output|answer|in|an?|to)\b"
)
_FOREIGN_GRAMMAR = re.compile(
    r"\b(?:le|la|les|une?|des?|du|el|los|las|il|lo|gli|del|della|der|die|das|den|wie|ist|het|een"
    r"|quel(?:le)?s?|cual|que|est|es|entre|zwischen|wat|hoeveel|combien|cuantos?|cuantas?|quanti"
    r"|quante|wieviele?|viele)\b"
)
_LETTERS = re.compile(r"[a-z]{2,}")


def foreign_measure(question: str, dimension: str | None, unit: str | None) -> str:
    """Returns why a question may ask for another unit or quantity than `units` found, or "".

    Args:
        question: the text in lower case, white space collapsed, quotation marks plain.
        dimension: dimension of the answer, "length", "area" or "count"; None if unknown.
        unit: unit that the question asks for; None if it names none.
    """
    folded = unicodedata.normalize("NFKD", question)
    folded = "".join(char for char in folded if not unicodedata.combining(char))
    if _SHARES.search(folded):
        return "its question asks for a share, a multiple or similar"
    if _WORDS.search(folded) or _DOTTED.search(folded) or _MARKS.search(question):
        return "its question names an unknown unit"
    if unit is not None:
        return ""
    if _GLUED.search(folded) or _ASKED.search(folded):
        return "its question asks in an unknown unit"
    other = _OTHER_QUANTITY.get(dimension or "")
    if other and re.search(other, folded):
        return "its question asks for another quantity"
    if any(map(_is_foreign_sign, question)) or not _is_english(folded):
        return "its question is not in English, and its unit is not known"
    return ""


def _is_foreign_sign(char: str) -> bool:
    """Returns whether a character is of a script other than Latin, or may be a sign for a unit."""
    if char.isascii() or char == "\u00b0":
        return False
    kind = unicodedata.category(char)
    if kind.startswith("L"):
        return not unicodedata.name(char, "").startswith("LATIN ")
    return kind in ("So", "No", "Nl", "Nd")


def _is_english(question: str) -> bool:
    """Returns whether the words may be English; True for fewer than three words."""
    words = len(_LETTERS.findall(question))
    foreign = len(_FOREIGN_GRAMMAR.findall(question))
    return words < 3 or (len(_ENGLISH.findall(question)) > 0 and foreign < 2)
