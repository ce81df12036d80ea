"""Does a sentence of a hint speak of all things of a kind, or of this picture?

"A hexagon has angles of 120 degrees" gives nothing away; "the angle is 120 degrees" may be read off
the picture. `is_general` goes by the form of the sentence, so it needs no list of facts.
"""

from __future__ import annotations

import re

# Parts of a picture: "each symbol stands for 5 cars" is read off, although it says "each".
_PARTS = """
    symbol icon grid square box interval division step tick mark row stack column bar line sector
    slice segment cell tile block gridline card bag gap of part half side leg angle arc piece point
    term layer person people picture circle dot group bundle pile pack child pupil student ticket
    figure hour week day month year time second more further other little bit quick look
    serving portion packet
"""
_PARTS = "|".join(f"{name}s?" for name in _PARTS.split())

# "a hexagon", "each vertex"; "each symbol" is one of the picture's own
_INDEFINITE = re.compile(
    rf"""
    (?: ^\W* | ,[ ] | \b(?:that|since|as|because|and|while|but|in|for|of|with|on|at|so|by)[ ] )
    (?!A[ ](?:is|has|lies|stands|meets|ends|starts|begins|reaches|stops|shows|reads|and|to|at)\b)
    (?:an?|any|no|one|1|each|every|(?<!of[ ])all(?![ ]but)|most|many|some)[ ]
    (?!(?:[\w-]+[ ])?(?:{_PARTS})\b) [\w-]{{2,}}
    | \ban?[ ]{{2,}}  # a described candidate that was taken out
    """,
    re.VERBOSE | re.I,
)
# "remember that", "by convention", "if it has one", as a rule said of all cases
_RECALLED = re.compile(
    r"""
    \b(?:rule|theorem|principle|law|fact)[ ](?:that|says)\b
    | \b(?: in[ ](?:most|many)[ ] | for[ ](?:orientation|comparison|reference)
      | remember | recall | in[ ]mind | definition | defined | convention\w* | in[ ]general
      | generally | usual(?:ly)? | typical(?:ly)? | normal(?:ly)? | standard | common(?:ly)?
      | for[ ](?:example|instance) | e\.g\. | such[ ]as | would | suppose | imagine | regarded
      | counts?[ ]as | always | never | any
    )\b
    | \b(?:if|when|whenever|unless)[ ](?:an?|any|one|1|it|they|each|every|all|some|both|2)[ ]
    """,
    re.VERBOSE | re.I,
)
# "hexagons have", "boxes of a grid hold"; "the boxes hold" is said of the picture
_PLURAL = re.compile(
    r"""
    (?: ^\W* | ,[ ](?:and[ ])? ) (?!(?:the|these|those|its|their|both|your)\b) (?:[\w-]+[ ])?
    (?!this|is\b|its) [a-z-]+(?:s|i|ae) [ ]
    (?:(?:in|on|of|with|from)[ ](?:an?[ ])?[\w -]{1,30}?)?
    (?: have | contain | hold | need | use | add | carry | range | run | span | lie | last
      | are[ ](?:usually|worth|at[ ]most)
    )\b
    """,
    re.VERBOSE | re.I,
)
# A slip to avoid: "borrow 60, not 100"
_WARNED_OF = re.compile(
    r"(?:\b(?:not|never|rather than|instead of)(?: with| by| to| for| the| an?)? "
    r"|\bconfuse\b[^.;]*)$",
    re.I,
)
# An example, and what may be so, are nothing of this picture
_EXAMPLE = re.compile(
    r"\b(?:such as|for example|for instance|e\.g\.|may|might)\b(?! (?:see|find|read|notice))", re.I
)
# What turns a sentence to the picture: "here", "shows", "you get", "so x is"
_SPECIFIC = re.compile(
    r"""
    \b(?: here | this | these | shown | pictured | drawn | reads? | readings? | shows? | showing
      | you[ ](?:get|find|obtain|see|have|read|count) | we[ ](?:get|find|have) | gives | giving
      | yields? | leaves? | leaving | so[ ]the | so[ ]that | thus | hence | therefore
      | which[ ](?:makes|means|is) | makes? | making | comes?[ ] (?:to|out) | turns[ ]out | legend
      | key | caption | labell?ed | marked | there[ ]are | of[ ](?:them|these) | next | reach\w*
      | scale | axis | chart | graph | table | map | photo | picture | image | diagram
      | stands?[ ]for | represents? | by[ ]one | in[ ]total | in[ ]all | sits?
    )\b
    """,
    re.VERBOSE | re.I,
)


# "below 15 low, 15-29 fair, 30-59 good": the classes of a scale
_CLASSES = re.compile(r"\d ?(?:-|to) ?\d.*\d ?(?:-|to) ?\d")
# Before the number the sentence speaks of any thing of a kind
_OF_ANY = (_INDEFINITE, _RECALLED, _PLURAL)


def is_general(before: str, sentence: str) -> bool:
    """The sentence is general. before: what stands in it before the number in question."""
    if _WARNED_OF.search(before) or _EXAMPLE.search(before) or _CLASSES.search(sentence):
        return True
    if _SPECIFIC.search(before):
        return False
    if any(form.search(before) for form in _OF_ANY):
        return True
    return _RECALLED.search(sentence) is not None and not _SPECIFIC.search(sentence)
