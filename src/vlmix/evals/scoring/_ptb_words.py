"""The words that Stanford's English tokenizer knows by heart, as patterns; case counts only where marked."""

from __future__ import annotations

_MONTHS = "jan feb mar apr jun jul aug sept? oct nov dec"
_DAYS = "mon tues? wed thu(?:rs)? fri"
_STATES = (
    "ala ariz calif colo conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt "
    "wisc? wyo (?-i:A)z (?-i:A)rk (?-i:D)el (?-i:I)ll (?-i:L)a (?-i:M)ass (?-i:M)iss (?-i:O)re (?-i:P)a "
    "(?-i:T)ex (?-i:W)ash"
)
_COMPANIES = "inc cos? corp pp?t[ye]s? ltd plc bancorp bhd assn univ intl sys"
_OTHERS = r"tel est ext sq jr bros (?:ed|ph)\.d esq blvd rd rt sr etc al seq bldg"
_TITLES = (
    "mrs? ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt ste? ave "
    "pres lieut hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle mme msgr sfc"
)
_NAMES = r"vs alex wm jos cie a\.k\.a cf treas ph invt elec natl m[ft]g dept"


def _any(*words: str) -> str:
    return "(?i:" + "|".join(" ".join(words).split()) + ")"


CLOSED_ABBREVIATIONS = _any(_MONTHS, _DAYS, _STATES, _COMPANIES, _OTHERS)
"""Those that keep their dot, and after which a sentence may end."""

OPEN_ABBREVIATIONS = _any(_TITLES, _NAMES)
"""Those that keep their dot and stand before something."""

NUMBER_ABBREVIATIONS = _any("ca figs? prop nos? art pp op")
"""Those that keep their dot before a digit."""

TWO_IN_ONE = {"cannot": 3, "'twas": 3, "gonna": 2, "gotta": 2, "lemme": 2, "gimme": 2, "wanna": 2, "'tis": 2}
"""Two words in one, and how many letters the second has."""

_STARTS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More "
    r"Mr\. Ms\. Now Once One Other Our She Since So Some Such That The Their Then There These They This We "
    "When While What Yet You"
)
SENTENCE_STARTS = "|".join(f"{word[0]}(?i:{word[1:]})" for word in _STARTS.split())
"""One of these behind an acronym starts a sentence; their first letter must be a capital."""

APOSTROPHE_WORDS = [
    "'n'?",
    "[lLdDjJ]'",
    "(?i:dunkin)'",
    "(?i:somethin)'",
    "(?i:ol)'",
    "'(?i:em)",
    "[A-HJ-XZn]~@{2,}",
    "'[2-9]0(?i:s)",
    "'(?i:till?)",
    "@+[aeiouyAEIOUY]~[aeiouA-Z]@*",
    "'(?i:cause)",
    r"(?i:cont)'(?i:d)\.?",
    "(?i:nor)'(?i:easter)",
    "(?i:c'mon)",
    "(?i:e'er)",
    "(?i:s'mores)",
    "(?i:ev'ry)",
    "(?i:li'l)",
    "(?i:nat'l)",
    "(?i:cap)'(?i:n)",
    "(?i:c)'(?i:est)",
    "(?i:o)~(?i:o)",
]
"""Words with an apostrophe that stay whole; ``'`` is any apostrophe, ``~`` a looser one, ``@`` a letter."""

FILE_ENDINGS = _any(
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt "
    "ps py sql tar txt wav x xml zip"
)
