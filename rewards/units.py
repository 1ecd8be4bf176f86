r"""Units: what a text after a number counts or measures, and what it must not be.

What touches a number is a product of variables (`2xyz`, `6m`) unless it is a known unit of two letters or
more (`5cm`, `60km/h`). After a space it may also be any word of three letters or more (`18 apples`); inside
`\text{…}` any word, and a single letter that is a known unit. Words that change the number or take it back
(numerals, multipliers, negations, hedges, comparisons, verdicts) are never a unit.
"""

import re

CURRENCY = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MAX_UNIT_CHARS = 80
MAX_WORDS = 5

# Known units: the name that stands for all spellings, and the spellings.
_NAMES = {
    "m": "m meter meters metre metres", "cm": "cm centimeter centimeters centimetre centimetres",
    "km": "km kilometer kilometers kilometre kilometres",
    "mm": "mm millimeter millimeters millimetre millimetres", "nm": "nm",
    "g": "g gram grams", "kg": "kg kilogram kilograms", "mg": "mg milligram milligrams",
    "s": "s sec secs second seconds", "ms": "ms", "min": "min mins minute minutes",
    "h": "h hr hrs hour hours", "day": "day days", "week": "week weeks", "month": "month months",
    "year": "year years yr yrs",
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yds yard yards", "mi": "mi mile miles",
    "pound": "lb lbs pound pounds GBP", "oz": "oz ounce ounces", "l": "l L liter liters litre litres",
    "ml": "ml mL milliliter milliliters", "mi/h": "mph", "km/h": "kph kmh", "am": "am AM", "pm": "pm PM",
    "cent": "cent cents", "dollar": "dollar dollars USD buck bucks", "euro": "euro euros EUR",
    "rupee": "rupee rupees Rs", "yen": "yen", "%": "percent", "degree": "degree degrees deg degs",
    "C": "C celsius", "F": "F fahrenheit", "A": "A", "V": "V", "W": "W", "N": "N", "J": "J", "K": "K",
    "kW": "kW", "kJ": "kJ", "Hz": "Hz", "GB": "GB", "MB": "MB", "kB": "kB", "sq": "sq",
}  # fmt: skip
_KNOWN = {spelling: name for name, spellings in _NAMES.items() for spelling in spellings.split()}
_SHORT_RATES = frozenset(["m/s", "g/cm", "g/mL", "g/ml"])
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "squared": "2", "cubed": "3", "²": "2", "³": "3"}

_NUMERAL_WORDS = """
    zero one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty
    seventy eighty ninety hundred thousand million billion trillion first third fourth fifth sixth seventh
    eighth ninth tenth eleventh twelfth hundredth thousandth half halve quarter dozen lakh lac crore
"""
_OTHER_WORDS = {
    "multipliers": """score gross double triple twice thrice squared cubed square cubic sq factorial inverse
        reciprocal root opposite mod modulo choose base over power nil""",
    "scales": """scores grand grands mil mils mill bn bns mn tn hundredweight hundredweights cwt binary
        ternary octal hex hexadecimal sigma gamma delta quadruple quintuple sextuple""",
    "negations": """not no nor non never none nothing neither without except but instead rather unless if else
        otherwise isn nope cannot reject rejected refuted impossible contradiction""",
    "doubts": """maybe perhaps might may could should possibly probably likely unlikely possible probable
        unsure uncertain unclear doubtful either or also whatever wait hmm oops actually sorry alternative
        alternatively correction""",
    "hedges": """would can guess think believe suppose approx approximate around about circa near almost est
        estimate estimated rough unknown and any both something ish""",
    "comparisons": """negative minus plus than more less fewer greater bigger
        smaller larger lower higher below above under beyond within between until to then versus vs up most
        least max maximum minimum""",
    "verdicts": """wrong incorrect false mistake mistaken invalid error erroneous inaccurate inexact untrue
        bogus nonsense fake disproven""",
    "verbs": """is are was were be equal equals""",
    "maths": """i e pi sqrt sin cos tan cot csc log ln exp gcd lcm theta alpha beta infinity infty inf""",
}
_NUMERALS = frozenset(_NUMERAL_WORDS.split())
_DOUBTS = frozenset(_OTHER_WORDS["doubts"].split())
_DENIALS = _DOUBTS.union(*(_OTHER_WORDS[kind].split() for kind in ("negations", "verdicts"))) - {"but"}
_NOT_UNITS = frozenset(word for words in _OTHER_WORDS.values() for word in words.split())
_SCALES = _OTHER_WORDS["scales"].split()
_MAY_LEAD = frozenset([*_OTHER_WORDS["verbs"].split(), *_SCALES])  # "the grand total is"
_CHANGING = frozenset(["or", "negative", *_OTHER_WORDS["multipliers"].split(), *_SCALES])
_CHANGES = re.compile(r".*(?:teen|teenth|ly|illion|illionth|ieth|fold)")
# halved, questionable: not what is counted; but feed, seed
_NO_NOUN = re.compile(r".*(?:[^e]ed|able|ible|ous)")
_ACRONYMS = re.compile(r"[A-Z]{2,4}s")  # TVs, CDs
_LINKS = frozenset(["of", "per", "a", "an", "the", "in", "on", "each", "at"])
_WORD = re.compile(r"[a-z]+")
_VOWEL = re.compile(r"[aeiou]")

_MACRO = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname|rm)\s*+\{([^{}]*+)\}")
_SPACE = re.compile(r"\\[ ,;:!]|~")
_UNIT = re.compile(r"(/?[A-Za-z][A-Za-z'/ ]*?)\s*(?:\^\s*\{?\s*([23])\s*\}?|([²³]))?")
_DEGREES = re.compile(r"(?:[°º]|\^?\s*\\(?:circ|degree)|\^\s*\{\s*\\circ\s*\})\s*([CF]?)")
_TRAILING = re.compile(
    r"(?:(?:\\[ ,;!]|[\s~])*+\\(?:text|textrm|mathrm|mbox)\s*+\{[^{}]*+\}"
    r"|(?:\\ |\\,|[\s~])++[A-Za-z]{2,}[A-Za-z./ ]*+)"
    r"(?:\s*+\^\s*+\{?[23]\}?)?$"
)
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")


def read_unit(text: str, is_money: bool = False) -> str | None:
    """The normalised unit that a text after a number names; "" for none, None where it is something else.

    Args:
        text: as it stands after the number, the space before it included.
        is_money: the number has a currency sign in front of it; a rate may follow ("/hour").
    """
    plain = text.strip()
    if not plain:
        return ""
    if plain in ("%", "\\%"):
        return "%"
    if plain.lstrip("\\") in CURRENCY:
        return CURRENCY[plain.lstrip("\\")]
    if len(text) > MAX_UNIT_CHARS or "'t" in text:
        return None
    is_touching = text[0].isalpha()
    is_marked = "\\" in text and not _VARIABLE.search(_MACRO.sub("", text))
    if "\\" in text or "~" in text:
        plain = _SPACE.sub(" ", _MACRO.sub(r" \1", text)).strip()
    degrees = _DEGREES.fullmatch(plain)
    if degrees:
        return degrees.group(1) or "degree"
    match = _UNIT.fullmatch(plain.replace(".", ""))
    if not match:
        return None
    name = _read_words(match.group(1), is_marked, is_touching, is_money)
    power = match.group(2) or _POWERS.get(match.group(3), "")
    return name if name is None else name + power


def _read_words(text: str, is_marked: bool, is_touching: bool, is_money: bool) -> str | None:
    """The name of a unit in words; None where one of them is no part of a unit."""
    top, slash, bottom = text.partition("/")
    words = top.split()
    if slash:
        is_short = text in _SHORT_RATES or (is_marked and bottom in _KNOWN)
        if not (is_short or ((_is_long(top) or (is_money and not top)) and bottom in _KNOWN)):
            return None
        return f"{_KNOWN.get(top, top)}/{_KNOWN[bottom]}"
    if len(words) > MAX_WORDS or (is_touching and not _is_long(words[0])):
        return None
    first = words[0].lower()
    if first == "per" and len(words) > 1:
        name = _read_words(" ".join(words[1:]), is_marked, False, False)
        return None if name is None else "/" + name
    power = ""
    if len(words) > 1 and first in ("square", "sq", "cubic"):
        power, words = _POWERS[first], words[1:]
    elif len(words) == 2 and first in _KNOWN and words[1] in ("squared", "cubed"):
        power, words = _POWERS[words[1]], words[:1]
    if words[-1].lower() in _LINKS and words[-1] not in _KNOWN:
        return None
    if words[-1] not in _KNOWN and _NO_NOUN.fullmatch(words[-1].lower()):
        return None
    if not all(_may_stand(word, is_marked, at > 0) for at, word in enumerate(words)):
        return None
    return " ".join(map(_name, words)).replace(" per ", "/") + power


def _is_long(word: str) -> bool:
    return len(word) > 1 and word in _KNOWN


def _may_stand(word: str, is_marked: bool, is_later: bool) -> bool:
    lowered = word.lower()
    singular = lowered.removesuffix("s")
    if lowered in _NOT_UNITS or singular in _NUMERALS or _CHANGES.fullmatch(singular):
        return False
    if is_later and lowered in _LINKS:
        return True
    if word in _KNOWN or (len(word) > 1 and lowered in _KNOWN):
        return is_marked or len(word) > 1
    if _ACRONYMS.fullmatch(word):
        return True
    return (is_marked and len(word) > 1) or (len(word) > 2 and bool(_VOWEL.search(lowered)))


def _name(word: str) -> str:
    known = _KNOWN.get(word) or _KNOWN.get(word.lower())
    return known or word.lower().removesuffix("s")


def takes_back(text: str) -> bool:
    """Does a sentence have a word that negates, hedges or changes what it says?"""
    words = set(_WORD.findall(text.lower())) - _MAY_LEAD
    return "n't" in text or not words.isdisjoint(_NUMERALS | _NOT_UNITS)


def denies(text: str) -> bool:
    """Does what stands before an answer say that it is none, or only perhaps one?"""
    return "n't" in text or not _DENIALS.isdisjoint(_WORD.findall(text.lower()))


def changes(word: str) -> bool:
    """Does a word after a number make another number of it, or offer another one?"""
    lowered = word.lower()
    singular = lowered.removesuffix("s")
    return singular in _NUMERALS or lowered in _CHANGING or bool(_CHANGES.fullmatch(singular))


def doubts(text: str) -> bool:
    """Has a reason given for an answer a word that offers another one?"""
    return not _DOUBTS.isdisjoint(_WORD.findall(text.lower()))


def same_unit(left: str, right: str) -> bool:
    """May two units stand for the same? One that is left out is no difference, nor is the rate of money."""
    if not left or not right or left == right:
        return True
    short, long = sorted((left, right), key=len)
    return short in CURRENCY.values() and long.startswith(short + "/")


def split_unit(text: str) -> tuple[str, str]:
    r"""`25\pi\text{ cm}^2` as maths and unit; the whole text and "" where no unit ends it.

    After variables, bare words are a unit only where they are too long to be a product of variables.
    """
    match = _TRAILING.search(text)
    if not match or not match.start():
        return text, ""
    words = match.group()
    head = text[: match.start()]
    if "{" not in words.partition("^")[0]:
        has_variables = _VARIABLE.search(head.rpartition("=")[2])
        if has_variables and any(len(word) < 4 for word in words.split()):
            return text, ""
    unit = read_unit(words)
    return (head, unit) if unit else (text, "")
