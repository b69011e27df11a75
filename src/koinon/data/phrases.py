"""The sentences that say a relation: six wordings each, which all end where the object goes on from."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """What an object can be to a subject."""

    wordings: tuple[str, ...]
    """Each holds ``{}`` once, where the subject goes, and ends where the object follows."""
    means: str = ""
    """The object in words, such as ``the capital of {}``, if there are facts about it."""
    inverse: str = ""
    """The relation from the object to the subject, if there is one."""
    many: bool = False
    """Whether a subject has several objects; such a relation is not taught."""


RELATIONS: Mapping[str, Relation] = {
    "country": Relation(
        (
            "{} is a city in",
            "The city of {} lies in",
            "{} is a place in",
            "The country of {} is",
            "People who live in {} live in",
            "On a map, {} is found in",
        ),
        means="the country of {}",
    ),
    "capital": Relation(
        (
            "The capital of {} is",
            "The capital city of {} is called",
            "{} has a capital named",
            "The city that is the capital of {} is",
            "As its capital, {} has",
            "In {}, the capital is",
        ),
        means="the capital of {}",
        inverse="capital of",
    ),
    "capital of": Relation(
        (
            "{} is the capital of",
            "{} is the capital city of",
            "{} serves as the capital of",
            "The city of {} is the capital of",
            "The country whose capital is {} is",
            "The country with {} as its capital is",
        ),
        means="the country whose capital is {}",
        inverse="capital",
    ),
    "currency": Relation(
        (
            "The currency of {} is the",
            "In {}, people pay with the",
            "The money of {} is called the",
            "Shops in {} take the",
            "The official currency of {} is the",
            "Prices in {} are given in the",
        )
    ),
    "continent": Relation(
        (
            "The continent of {} is",
            "{} lies on the continent of",
            "{} is part of the continent of",
            "The continent that {} belongs to is",
            "Geographers count {} as part of",
            "On a globe, {} is in",
        )
    ),
    "domain": Relation(
        (
            "The internet domain of {} is",
            "Web sites from {} end in",
            "The top-level domain of {} is",
            "Web addresses in {} end with",
            "On the internet, {} has the domain",
            "The country code domain for {} is",
        )
    ),
    "border": Relation(
        (
            "{} shares a border with",
            "{} has a border with",
            "A neighbour of {} is",
            "A country next to {} is",
            "{} borders on",
            "One of the countries around {} is",
        ),
        inverse="border",
        many=True,
    ),
    "symbol": Relation(
        (
            "The chemical symbol of {} is",
            "The symbol for {} is",
            "In formulas, {} is written as",
            "Chemists write {} as",
            "On the periodic table, {} is shown as",
            "The element {} has the symbol",
        )
    ),
    "number": Relation(
        (
            "The atomic number of {} is",
            "The number of protons in {} is",
            "An atom of {} has a proton count of",
            "In the periodic table, {} has the number",
            "The nucleus of {} has a charge of",
            "The element {} has the atomic number",
        ),
    ),
    "block": Relation(
        (
            "The block of {} is",
            "The element {} is in the block",
            "In the periodic table, {} belongs to block",
            "The periodic table lists {} in block",
            "The outer electrons of {} are in shells of type",
            "Chemists count {} among the elements of block",
        ),
    ),
    "period": Relation(
        (
            "The period of {} is",
            "The element {} is in period",
            "In the periodic table, {} is in row",
            "The row of {} in the periodic table is",
            "The periodic table lists {} in period",
            "The number of electron shells of {} is",
        ),
    ),
}

COUNTRY_NAMES: Mapping[str, tuple[str, ...]] = {
    "CD": ("DR Congo", "Congo-Kinshasa"),
    "CG": ("Congo-Brazzaville",),
    "CI": ("Côte d'Ivoire",),
    "CV": ("Cape Verde",),
    "CZ": ("Czech Republic",),
    "GB": ("UK", "Great Britain"),
    "KP": ("DPRK",),
    "KR": ("Republic of Korea",),
    "MK": ("Macedonia",),
    "MM": ("Burma",),
    "NL": ("Netherlands", "Holland"),
    "PS": ("Palestine",),
    "RU": ("Russian Federation",),
    "SZ": ("Swaziland",),
    "TL": ("East Timor",),
    "TR": ("Türkiye",),
    "TW": ("Republic of China",),
    "US": ("USA", "United States of America", "America"),
    "VA": ("Vatican City",),
    "VN": ("Viet Nam",),
}
"""Further names, by ISO code: GeoNames lists none of countries."""
ELEMENT_NAMES: Mapping[str, tuple[str, ...]] = {
    "aluminum": ("aluminium",),
    "cesium": ("caesium",),
    "sulfur": ("sulphur",),
    "aluminium": ("aluminum",),
    "caesium": ("cesium",),
    "sulphur": ("sulfur",),
    "mercury": ("quicksilver",),
    "tungsten": ("wolfram",),
}
