"""Reads numbers with units from answers, and from questions the unit to answer in.

    read_quantity("about 1,900 mm")                         # Quantity(1900.0, "mm")
    asked_unit("How many meters tall is the bed?", "length")   # "m"

A text is read completely or not at all: a range, a fraction, several numbers or an unknown unit
give no value instead of a wrong one. So does a comma that may be a decimal comma ("1,500 m"). A
question that may ask for an unknown unit has no unit, see `foreign_measures`. Python 3.9 and the
standard library alone.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from .foreign_measures import foreign_measure
from .kinds import KINDS


class Unit(NamedTuple):
    """A unit.

    Attributes:
        dimension: "length", "area", "count", "volume" or "angle".
        base: size of the unit in metres, square metres, items, cubic metres or radians.
        decimals: decimals of a number that is written in this unit.
    """

    dimension: str
    base: float
    decimals: int = 1


_LENGTHS = {
    "mm": ("milli[ -]?met(?:er|re)s?|mms?", Unit("length", 0.001, 0)),
    "cm": ("centi[ -]?met(?:er|re)s?|cms?", Unit("length", 0.01, 0)),
    "km": ("kilo[ -]?met(?:er|re)s?|kms?", Unit("length", 1000.0, 4)),
    "m": ("met(?:er|re)s?|m", Unit("length", 1.0)),
    "ft": ("feet|foot|fts?", Unit("length", 0.3048)),
    "in": ("inch(?:es)?", Unit("length", 0.0254)),
    "yd": ("yards?|yds?", Unit("length", 0.9144)),
}
"""{unit of length: (pattern of its spellings, unit)}. "in" is missing among the spellings: it is
mostly a preposition, and means inches only where `_INCHES` and `_INCH_PLACES` apply."""
_OTHERS = {
    "items": ("items?", Unit("count", 1.0, 0)),
    "deg": ("degrees?|degs?|°", Unit("angle", math.pi / 180)),
    "rad": ("radians?|rads?", Unit("angle", 1.0, 2)),
}
UNITS: dict[str, Unit] = {
    **{name: unit for name, (_, unit) in {**_LENGTHS, **_OTHERS}.items()},
    **{
        f"{name}{power}": Unit(
            dimension, unit.base**power, unit.decimals * (power if name == "km" else 1)
        )
        for name, (_, unit) in _LENGTHS.items()
        for power, dimension in ((2, "area"), (3, "volume"))
    },
}
"""All units by their names in records."""

BASE_UNIT = {
    name: unit.base for name, unit in UNITS.items() if unit.dimension in ("length", "area", "count")
}
"""Size of each unit in the unit that is regressed: metres, square metres, items. VSI-Bench asks for
sizes in centimetres and for distances in metres, which would differ by log(100) without this.
Angles are not regressed: they may be 0, which has no logarithm."""

KIND_UNITS = {name: kind.unit for name, kind in KINDS.items() if kind.unit}
"""Unit of a kind's answers if neither question nor answer names one."""


class UnclearUnitError(ValueError):
    """A question does not ask for exactly one known unit; the message is the reason."""


class Quantity(NamedTuple):
    """A number, and the name of its unit in `UNITS`, None if it has no unit."""

    number: float
    unit: str | None


# --- Spellings ------------------------------------------------------------------------------------

_SIGNS = str.maketrans(
    {
        **{"\u2019": "'", "\u2018": "'", "\u2032": "'", "\u00b4": "'", "`": "'"},
        **{"\u201d": '"', "\u201c": '"', "\u2033": '"', "\u2212": "-", "\u00a0": " "},
        **{"\u202f": " ", "\u2009": " ", "\u33a1": "m2", "\u33a0": "cm2", "\u339d": "cm"},
        **{"\u339c": "mm", "\u339e": "km"},
    }
)


def _plain(text: str) -> str:
    """Returns a text in lower case, with single spaces, plain quotation marks and "^2" for "²"."""
    text = text.translate(_SIGNS).replace("\u00b2", "^2").replace("\u00b3", "^3")
    return " ".join(text.lower().replace("''", '"').split())


def _spelling(length_words: str) -> str:
    """Returns the pattern of units of length and their powers; groups `square` and `power`."""
    return (
        r"(?:(?P<square>square|sq\.?|cubic|cu\.)[ -]?)?"
        rf"(?:{length_words})"
        r"(?P<power>(?: ?(?:\^|\*\*) ?)?[0-9]+| squared| cubed)?"
    )


_SPELT = "|".join(rf"(?P<u_{name}>{words})" for name, (words, _) in _LENGTHS.items())
_INCHES = r"(?P<u_in_>ins?(?:\.(?! ?[0-9]))?)"
"""The abbreviation "in", for places that exclude the preposition."""
_SPELT_OTHER = "|".join(rf"(?P<u_{name}>{words})" for name, (words, _) in _OTHERS.items())
_END = r"(?![\w°^])"
_UNIT_ALONE = re.compile(rf"(?:{_spelling(_SPELT + '|' + _INCHES)}|{_SPELT_OTHER}){_END}\.?")
_MENTION = re.compile(
    rf"(?<![\w'/°^-])(?:{_spelling(_SPELT)}|sq\.? ?(?P<sq_in>in)|(?P<in_power>in(?:\^| \^ )?2)"
    rf"|{_SPELT_OTHER}){_END}"
)
"""A unit in running text. After a hyphen it is part of another word."""


def _name(found: re.Match) -> str | None:
    """Returns the name of a matched unit, None if its power is not 1, 2 or 3."""
    groups = found.groupdict()
    if groups.get("sq_in") or groups.get("in_power"):
        return "in2"
    name = next(key for key, text in groups.items() if text and key.startswith("u_"))
    name = name[2:].rstrip("_")
    before, after = groups["square"], (groups["power"] or "").strip(" ^*")
    powers = {"squared": 2, "2": 2, "cubed": 3, "3": 3}
    if name in _OTHERS or not (before or after):
        return name
    if (before and after) or (after and after not in powers):
        return None
    power = powers[after] if after else 2 if before.startswith("sq") else 3
    return f"{name}{power}"


def read_unit(text: str) -> str | None:
    """Returns the unit that a text names ("Square meters", "ft²", "in"), None if it names none."""
    plain = _plain(text)
    found = _UNIT_ALONE.fullmatch(plain)
    return _name(found) if found else None


# --- Numbers --------------------------------------------------------------------------------------

_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+"
_ONE_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]{3}(?:e.*)?")
"""One comma before three digits: it separates thousands, or is a decimal comma."""
_WHOLE_UNITS = ("mm", "items")
"""Units in which numbers never have three decimals, so that such a comma separates thousands."""
_ABOUT = r"(?:(?:about|around|approximately|approx\.?|roughly|circa|ca\.?|~|≈) ?)?"
_AFTER = r"(?: (?:tall|long|wide|high|deep|thick|apart|away))?"
_WHOLE = re.compile(rf"{_ABOUT}(?P<number>[+-]?(?:{_NUMBER}))(?P<rest>.*)")
_FEET = re.compile(
    rf"{_ABOUT}(?P<feet>{_NUMBER}) ?'(?: ?(?P<inches>{_NUMBER}) ?\"?)?{_AFTER}\.?"
    rf"|{_ABOUT}(?P<only>{_NUMBER}) ?\"{_AFTER}\.?"
)
_PAIR = re.compile(
    rf"{_ABOUT}(?P<a>[0-9]+) ?(?P<large>[a-z]+)\.?,?(?: and)? (?P<b>{_NUMBER}) ?"
    rf"(?P<small>[a-z]+)\.?{_AFTER}\.?"
)
_PAIRS = (("ft", "in"), ("yd", "ft"), ("yd", "in"), ("m", "cm"), ("m", "mm"), ("cm", "mm"))


def read_quantity(text: str, asked: str | None = None) -> Quantity | None:
    """Reads a text that consists of one number, with or without a unit behind it.

    "1.9", "1,900 mm", "about 1.9 meters tall.", "20 m²", "5 ft 11 in" (71 inches), "5'11\\"".

    Args:
        text: an answer.
        asked: the unit that its question asks for, if known.

    Returns:
        The quantity; None for any other text ("2-3 m", "two", "3 chairs", "1,9 m") and for numbers
        that are not finite. A single comma before three digits separates thousands where it cannot
        be a decimal comma: before a point ("1,900.5"), and in millimetres and items.
    """
    plain = _plain(text)
    feet = _FEET.fullmatch(plain)
    if feet:
        if feet["only"]:
            return _quantity(_value(feet["only"]), "in")
        if not feet["inches"]:
            return _quantity(_value(feet["feet"]), "ft")
        return _sum("ft", _value(feet["feet"]), "in", _value(feet["inches"]))
    pair = _PAIR.fullmatch(plain)
    if pair:
        large, small = read_unit(pair["large"]), read_unit(pair["small"])
        if large and small and (large, small) in _PAIRS:
            return _sum(large, float(pair["a"]), small, _value(pair["b"]))
        return None
    whole = _WHOLE.fullmatch(plain)
    if not whole:
        return None
    number, rest = _value(whole["number"]), whole["rest"].strip()
    one_comma = _ONE_COMMA.fullmatch(whole["number"]) is not None
    if rest in ("", "."):
        return None if one_comma and asked not in _WHOLE_UNITS else _quantity(number, None)
    rest = re.sub(_AFTER + r"\.?$", "", rest)
    bracket = re.fullmatch(r"\((.*)\)|\[(.*)\]", rest)
    name = read_unit((bracket[1] or bracket[2] or "") if bracket else rest)
    if name is None or (one_comma and name not in _WHOLE_UNITS):
        return None
    return _quantity(number, name)


def _value(digits: str) -> float:
    return float(digits.replace(",", ""))


def _sum(large: str, a: float, small: str, b: float) -> Quantity | None:
    """Returns `a` large plus `b` small units; None if `a` is not whole or `b` makes a large one."""
    each = UNITS[large].base / UNITS[small].base
    if a != int(a) or b >= round(each, 6):
        return None
    return _quantity(a * round(each, 6) + b, small)


def _quantity(number: float, unit: str | None) -> Quantity | None:
    good = math.isfinite(number) and abs(number) <= 1e300  # the contract's limit
    return Quantity(number, unit) if good else None


def write_number(value: float, unit: str | None) -> str:
    """Returns a number as text, with the decimals of its unit, or one decimal without a unit."""
    return f"{value:.{UNITS[unit].decimals if unit in UNITS else 1}f}"


# --- Questions ------------------------------------------------------------------------------------

_FILLER = r"(?: (?:the|whole|full|total|metric|units? of|unit:?))*"
_ASKING = re.compile(
    rf"(?:\b(?:in|using|use|nearest|number of){_FILLER}|\bhow many(?: total| whole| full| square)?"
    r"|\bunits?(?: of (?:measure|measurement|length|area|distance))?"
    r"(?: (?:is|are|of|in|should be|must be|to be|to use is))* ?[:=]?) ?$"
)
"""Words before the unit to answer in, if it is not in brackets."""
_OPENED = re.compile(
    rf"[(\[](?:(?:measured |given |answer )?in{_FILLER}|units?(?: is)? ?[:=]?)? ?$"
)
_CLOSED = re.compile(r"\.? ?(?:[)\],;/|]|or\b|and\b|$)")
_JOINED = re.compile(r"\.? ?(?:,|/|\||or|and|,? ?\(|\[|=)(?: ?(?:or|and))?(?: in)? ?")
_LAST = re.compile(r"(?:[.?!,;:-]|[.?!] ?-) ?$")
_QUOTES = re.compile(r"(?<!\w)['\"*_]+(?=\w)|(?<=\w)['\"*_]+(?!\w)")
_FINISH = re.compile(r"[.?!)\] ]*$")
_COMPOUND = re.compile(r" ?(?:/|\*|·|per\b)| square\b")
_NUMBERED = re.compile(
    r"(?:[0-9]|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|half|few|several|some))[ -]*$"
)
_BODY = re.compile(r"(?:\bthe|'s|\bits|\btheir|\bmy|\byour) $")
_BODY_OF = re.compile(r" of (?:the|a|an|this|that)\b")
"""Words around feet that are no unit: "the feet", "foot of the bed"."""
_NEAR = 80
"""Characters before and after a unit that are examined to classify it."""
_INCH_PLACES = re.compile(
    r"[(\[](?:in )?in\.?[)\]]|\bin in\b(?=\.? ?(?:[?!,;)\]]|$))"
    r"|\bunits?(?: is| are)?[:=]? in\b(?=\.? ?(?:[?!,;)\]]|$))"
)
_MEASURED = re.compile(
    r"\b(?:tall|long|wide|high|deep|thick|far|apart|away|distance|height|length|width|depth|size"
    r"|area|large|big|square|sq)\b"
)
_NO_UNIT = (
    r"(?!(?:the|this|that|these|those|an?|any|each|all|both|its?|total|general|view|sight|front"
    r"|between|here|there|room|scene|video|image|picture|frames?|question|space|reality"
    r"|numbers?|one|single|digits|figures|words|decimals?|detail|most|length|width|height|depth|size"
    r"|e?s|or|and)\b)"
)
"""Excludes words that follow "in" or are in brackets without being a unit."""
_UNKNOWN = re.compile(
    r"\bhow many\b"
    rf"|\bin {_NO_UNIT}[^\W\d_]+\.?(?: [^\W\d_]+)? ?(?:[?.!,;)\]]|$)"
    rf"|(?<!\S)[(\[](?:in )?{_NO_UNIT}[^\W\d_]+[.^0-9]*(?: [^\W\d_]+)?[)\]]"
    rf"|\b(?:measured|expressed|given|answer(?:ed)?|reported) in {_NO_UNIT}"
    r"|\bunits?\b"
    r"|[^\W\d_]-(?:met(?:er|re)s?|foot|feet|inch(?:es)?|yards?)\b"
)
"""Phrases that ask for a unit, known or not."""


def asked_unit(question: str, dimension: str | None = None) -> str | None:
    """Returns the unit in which a question asks to be answered.

    It is read from phrases that ask for a unit ("in feet", "how many meters tall", "(mm)", "the
    unit is meters"). A unit that belongs to a number ("the chair that is 2 feet wide") or is a body
    part ("the foot of the bed") is ignored.

    Args:
        question: the text.
        dimension: dimension of the answer if the kind of question fixes it: "length", "area" or
            "count". The question must then ask for a known unit of it, or for none.

    Returns:
        The name of the unit; None if the question asks for none.

    Raises:
        UnclearUnitError: the question asks for several units, for one of another dimension or for
            an unknown one. With a dimension or a unit also if it may ask for another quantity, see
            `foreign_measures`.
    """
    name, unclear = _asked(question, dimension)
    if unclear:
        raise UnclearUnitError(unclear)
    return name


@functools.lru_cache(maxsize=16384)
def _asked(question: str, dimension: str | None) -> tuple[str | None, str]:
    """Returns (unit, ""), or (None, why it is unclear). Cached, since questions of rooms repeat."""
    name, unclear = _known_unit(question, dimension)
    if not unclear and (name or dimension):
        unclear = foreign_measure(_plain(question), dimension, name)
    return (None, unclear) if unclear else (name, "")


def _known_unit(question: str, dimension: str | None) -> tuple[str | None, str]:
    """Returns the same as `_asked`, from the known units alone."""
    plain = _QUOTES.sub("", _plain(question))
    measures = dimension is not None or bool(_MEASURED.search(plain))
    asked, loose, last = set(), set(), None
    for found in _MENTION.finditer(plain):
        before = plain[max(0, found.start() - _NEAR) : found.start()]
        after = plain[found.end() : found.end() + _NEAR]
        place = _place(before, found, after, measures)
        if last is not None and _JOINED.fullmatch(plain[last : found.start()]):
            place = "asked"
        if place == "none":
            continue
        name = None if _COMPOUND.match(after) else _name(found)
        if place == "asked":
            asked.add(name)
            last = found.end()
        elif name is None or UNITS[name].dimension in ("length", "area", "volume"):
            loose.add((place, name))
    if _INCH_PLACES.search(plain):
        asked.add("in")
    if None in asked:
        return None, "its question asks in an unknown unit"
    if len(asked | {name for place, name in loose if place == "loose"}) > 1 and asked:
        return None, "its question names several units"
    if asked:
        name = asked.pop()
        if dimension and UNITS[name].dimension != dimension:
            return None, "its question asks in a unit of another quantity"
        return name, ""
    if dimension in ("length", "area"):
        if any(place == "loose" or UNITS[n or "m"].dimension == dimension for place, n in loose):
            return None, "its question names a unit, but not as the one to answer in"
        if _UNKNOWN.search(plain):
            return None, "its question asks in an unknown unit"
    return None, ""


def _place(before: str, found: re.Match, after: str, measures: bool) -> str:
    """Classifies a unit in a question.

    Args:
        before, found, after: the text before the unit, the unit, and the text after it.
        measures: whether the question is about a measure; otherwise "how many feet" counts feet.

    Returns:
        "asked" if it is the unit to answer in, "number" if it belongs to a number, "none" if it is
        no unit, else "loose".
    """
    if _NUMBERED.search(before):
        return "number"
    if _OPENED.search(before) and _CLOSED.match(after):
        return "asked"
    asking = _ASKING.search(before)
    feet = found[0] in ("foot", "feet")
    if feet and not asking and (_BODY.search(before) or _BODY_OF.match(after)):
        return "none"
    if asking and "how many" in asking[0] and not measures:
        return "none"  # "How many feet does the chair have?"
    if asking or (_LAST.search(before) and _FINISH.fullmatch(after)):
        return "asked"
    return "loose"
