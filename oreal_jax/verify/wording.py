"""Words with which a statement gives, denies, doubts or changes a value.

Formulas are private characters in these texts, as `statement` writes them.
"""

import re

QUANTITY = re.compile(r"[\d\ue000-\uf8ff]")
NUMERALS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty"
    "|fifty|hundred|thousand|million|billion|trillion|dozen|score|gross|half|halves"
    "|third|thirds|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|tenths?"
)
# Words that deny a value wherever they come, and words that doubt or change the value
# of their clause.
DENIALS = (
    "not(?! hesitate)|never|neither|nor|cannot|nobody|none|wrong|wrongly|incorrect"
    "|incorrectly|false|mistaken?|error|but|however|wait|actually|instead|oops|except"
    "|impossible|contradiction|contradicts|extraneous|invalid|reject|rejected|excluded"
    "|absurd|maybe|perhaps|possibly|probably|unlikely|unsure|guess|doubt"
)
CONDITIONS = "if|unless|suppose|assume|assumes|assuming"
DOUBTS = "would|could|might|may|should|presumably|hardly|almost|nearly"
CHANGES = (
    "less|more|fewer|greater|larger|bigger|smaller|higher|lower|least|most|than|or|times"
    "|plus|minus|divided|multiplied|mod|modulo|base|squared|cubed|square root|factorial"
    "|approximately|approx|about|around|roughly|twice|double|triple|when|where|provided"
    "|given that|out of|percent|versus|root|radians"
)
DENIED = re.compile(rf"\b(?:{DENIALS})\b|n['’]t\b(?! hesitate)", re.IGNORECASE)
DOUBTED = re.compile(rf"\b(?:{CONDITIONS}|{DOUBTS})\b", re.IGNORECASE)
# Before a verb, doubts are about the value only if they are next to it.
LEAD_DOUBTED = re.compile(
    rf"\b(?:{CONDITIONS})\b|\b(?:{DOUBTS})(?: \w+)?\s*$", re.IGNORECASE
)
NUMERAL = re.compile(
    rf"(?<!\bthe )(?<!\bthese )(?<!\bthose )(?<!\ball )\b(?:{NUMERALS})\b",
    re.IGNORECASE,
)
CHANGED = re.compile(rf"\b(?:{CHANGES})\b|{NUMERAL.pattern}", re.IGNORECASE)
PART_OF = re.compile(rf"\b(?:{CHANGES}|of|{NUMERALS})\s+(?:\w+\s+)?$", re.IGNORECASE)
STATES = (
    "is|are|was|were|be|equals?|equal to|becomes?|gives?|gave|yields?|gets?|got"
    "|obtains?|obtained|finds?|implies|means|that"
    "|(?:comes?|amounts?|simplifies|evaluates|reduces|sums?|adds? up) to"
)
ACTIONS = (
    "have|has|had|makes?|made|takes?|took|needs?|needed|costs?|earns?|earned|pays?|paid"
    "|spends?|spent|sells|sold|buys|bought|leaves|remains?|totals?|contains?|holds?"
    "|weighs?|eats?|ate|saves?|saved|runs?|ran|collects?|collected"
)
SEPARATOR = re.compile(
    rf"(?<![\\-])(?<!\bto )\b(?:(?P<action>{ACTIONS})|{STATES})\b|⇒|⟹|=>"
    r"|(?<=[A-Za-z)\ue000-\uf8ff])(?P<label>\s*:)(?=\s|$)|(?<=[A-Za-z]{2})\s*=(?=\s)",
    re.IGNORECASE,
)
STATED = re.compile(rf"\b(?:{STATES})\s+[-−($]*[\d\ue000-\uf8ff]", re.IGNORECASE)
# A subject that is an unknown changed: "2x is 8", "half the number is 8".
UNKNOWN_CHANGED = re.compile(
    r"\d ?[a-z]\b|\b[a-z] ?[-+*/^²³]|[-+*/] ?[a-z]\b"
    r"|^\D*\b(?:twice|half|double|triple|squared?|cubed?|root|reciprocal|negative"
    r"|opposite|inverse|absolute|plus|minus|times|less|more)\b\D*$",
    re.IGNORECASE,
)
STATED_OR = re.compile(rf"\b(?:{STATES}|or)\b", re.IGNORECASE)
HYPOTHESIS = re.compile(
    r"(?:let|suppose|assume|consider|define|denote|try|if|say|imagine)\b"
    r"(?! me| us|['’]s)",
    re.IGNORECASE,
)
# A number after one of these is part of what they begin.
BEFORE = re.compile(
    r"(?:^|\W)(?:of|by|in|from|with|on|at|for|than|under|over|below|above|between|per"
    r"|within|until|after|before|to|and|or|via|as|step|page|case|equation|eq|theorem"
    r"|lemma|part|problem|question|exercise|example|figure|section|line|day|week|year"
    r"|base|level|row|column|rule|formula|using|modulo|mod|all|any|each|every|given|let"
    r"|where|when)\W*$",
    re.IGNORECASE,
)
SUBJECT = re.compile(  # the number before it is what the sentence is about
    rf"(?:{STATES}|{ACTIONS}|does|do|did|will|can|divides?|appears?|occurs?|works?"
    r"|fails?|leads?|violates?|exceeds?|satisf(?:y|ies)|of|to|in|into|by|at|from"
    r"|through|as an?)\b",
    re.IGNORECASE,
)


def is_denied(before: str) -> bool:
    """Return whether the words before a verb deny or doubt a value."""
    return bool(DENIED.search(before) or LEAD_DOUBTED.search(before))


def is_doubted(text: str) -> bool:
    """Return whether words deny or doubt a value."""
    return bool(DENIED.search(text) or DOUBTED.search(text))


def is_remark(text: str) -> bool:
    """Return whether a sentence has no number and denies nothing."""
    return not (QUANTITY.search(text) or DENIED.search(text))
