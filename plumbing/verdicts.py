"""Rules of plumbing.spoilers on verdicts: yes or no, one of two, "both are equal".

A clause that leaves the verdict open ("decide whether", "if") is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from plumbing.answers import YES_OR_NO
from plumbing.spoiler_case import END_OF_CLAUSE, SAYS_EQUAL, Case, has_word, plain_words, sentences

_COMMON = """
    a an the of in on at to for from by with and or is are was were be it its this that these those
    has have had not no than as more most less least does do did will can may which who whose what
    when where how all some any every only both each other into their they there between same one
    he she him his her hers they them their we us our you your my me i
"""
COMMON_WORDS = set(_COMMON.split())
# ---------------------------------------------------------------------------------- yes or no

_CLAIM = (
    r"\b(?:claim|statement|condition|assertion|sentence|description|equation|criterion|rule"
    r"|requirement|test|hypothesis|proposition|inequality|answer|reply|converse)s?\b"
)
_JUDGED = re.compile(
    rf"""
    {_CLAIM} [\w ]{{0,30}}?
      \b(?: (?:does|do|did) [ ] (?:not[ ])? (?:hold|fit|match|apply|agree)
        | holds | fails?
        | (?:is|are|was|turns[ ]out|proves|(?:must|can|has[ ]to|is[ ]to)[ ]be|in) [ ]
          (?:not[ ])? (?: indeed[ ] | therefore[ ] | thus[ ] | to[ ]be[ ] | in[ ]the[ ] )?
          (?: satisfied | met | fulfilled | violated | true | false | right | wrong | correct
            | incorrect | supported | confirmed | refuted | negative | positive | affirmative
            | valid | invalid | justified | broken
            | denied | rejected | affirmed | accepted | dismissed
          )
      )\b
    | \b(?:negative|positive|affirmative) [ ] (?:reply|answer|response|verdict) [ ] (?:is|seems) [ ]
      (?:called|needed|required|due|right|justified|correct)\b
    | \b(?:calls?|asks?) [ ] for [ ] an? [ ] (?:negative|positive|affirmative)\b
    | \banswered [ ] in [ ] the [ ] (?:negative|affirmative)\b
    | \b(?:so|therefore|thus|hence) [ ] (?:deny|reject|affirm) [ ] (?:the|this) [ ] {_CLAIM}
    | \bno [ ] [a-z]+ [ ] (?: works | fits | exists | is [ ] possible | can [ ] be [ ] found )\b
    | \b(?:contradict|confirm|support|refute|disprove|prove|back|violate)s? [ ]
      (?:the|this|that) [ ] {_CLAIM}
    """,
    re.VERBOSE | re.I,
)
UNDECIDED = re.compile(
    r"\b(?:if|whether|only|decide|check|could|would|might|either|or|when|unless"
    r"|(?<!this )(?<!which )makes? the"
    r"|must(?! be (?:\w+ed|negative|positive)\b)|compare|judge|ask"
    r"|(?<!you )(?<!will )(?<!can )see)\b",
    re.I,
)


# "if it is, the claim is right, otherwise it is not"
_BOTH_WAYS = re.compile(r"\bif\b.*\b(?:if|otherwise|or else)\b", re.I)


_IF_NOT = re.compile(
    r"\bif\b[^.;!?]*[;,.] (?:and )?(?:if not|otherwise|or else|if it)\b[^.;!?]*", re.I
)


_CONDITION = re.compile(r"^\W*(?:(?:and|but|so|then) )?(?:if|when|whenever|unless|should)\b", re.I)


def decided_clauses(text: str) -> list[str]:
    """The clauses that leave no verdict open: neither "decide whether" nor what follows an "if"."""
    decided = []
    for sentence in sentences(text):
        for clause in END_OF_CLAUSE.split(sentence):
            if _CONDITION.search(clause):
                break
            if not UNDECIDED.search(clause):
                decided.append(clause)
    return decided


def says_yes_or_no(case: Case) -> Iterator[str]:
    """Yes or no is said, the claim is judged, or the question comes back as a statement.

    Examples: "so yes", "the claim does not hold", "so it is not a right triangle".
    """
    word = plain_words(case.answer).strip()
    if word not in YES_OR_NO:
        return
    asked = [word for word in case.stem_words.split() if word not in COMMON_WORDS]
    text = _IF_NOT.sub(" ", case.text)
    text = ". ".join(piece for piece in sentences(text) if not _BOTH_WAYS.search(piece))
    for clause in decided_clauses(text):
        if _said(word).search(clause.casefold().strip()):
            yield f"says the answer: {case.answer}"
        if _JUDGED.search(clause) or _states(clause.casefold(), asked):
            yield f"judges the claim: {case.answer}"


@cache
def _said(word: str) -> re.Pattern:
    """A pattern: a clause ends on the word, or gives a reason for it: "so yes", "true, as"."""
    return re.compile(
        rf"""
        (?: ^ | \b(?: is | are | say | says | it's | answer | mark | therefore | so
                    | statement | claim )[ ] )
        {word}
        (?: $ | [ ](?:because|since|as)\b )
        """,
        re.VERBOSE,
    )


_CONCLUDES = re.compile(
    r"^ *(?:so|thus|hence|therefore|which means|that means|and so"
    r"|(?:which|this|that) (?:makes|shows|proves))\b"
)
_COPULA = (
    r"\b(?:is|are|was|were|has|have|(?:turn|come)s? out|proves?|remains?|stays?|seems?|appears?)"
    r"(?: to be)?\b"
)
_COMPARES = re.compile(rf"{_COPULA}.* than\b")
_PREDICATE = re.compile(rf"{_COPULA} (?:not |really |also )?(?:an? |the )?([a-z]+)")
_DRAWN = ("shown", "drawn", "given", "marked", "labelled", "labeled", "called")
# "so it does not stop there"; "the other train does not stop" may be put aside
_DOES_NOT = re.compile(
    r"^ *(?:(?:so|thus|hence|therefore|and|but) )*(?:it|he|she|they) (?:does|do|did)(?: not|n't)"
    r" ([a-z]+)"
)
_INDEED = re.compile(r"\bindeed\b")
_OF_WHAT = re.compile(r"\b(?:what|who|which|that) (?:is|are|does|do) indeed\b")
_OF_ANY = re.compile(r"^ *(?:an?|any|every|each) |\bthat (?:is|are)\b")


def _states(clause: str, asked: list[str]) -> bool:
    """The clause states what the question asks. asked: the question's words, common ones left out.

    It draws a conclusion about them, compares them, or says one of them of something.
    """
    denied = _DOES_NOT.search(clause)
    if denied and denied[1] in asked:
        return True
    if _INDEED.search(clause) and not _OF_WHAT.search(clause):
        return True
    words = set(plain_words(clause).split())
    shared = len(words.intersection(asked))
    if shared == 0:
        return False
    if _CONCLUDES.search(clause):
        return True
    if shared < 2 or _OF_ANY.search(clause):
        return False
    if _COMPARES.search(clause):
        return True
    return any(word in asked and word not in _DRAWN for word in _PREDICATE.findall(clause))


# ------------------------------------------------------------------------------------ one of two

_COMPARATIVE = re.compile(
    r"\b(?:more|less|fewer|most|least|ahead|above|below|behind|first|last|beyond"
    r"|(?!number|other|after|over|under|letter|corner|answer|whether|paper|water|layer|border"
    r"|together"
    r"|either|consider|remember"
    r"|per|her|order|center|upper|meter|liter|power|never|ever|later than)"
    r"[a-z]+(?:er|est))\b"
)
_FOLLOWS_COPULA = re.compile(
    r"\b(?:is|are|was|were|has|have|looks?|lies|lie|sits?|reach(?:es)?|ends?|rises?|goes|stays?"
    r"|stands?"
    r"|comes?|needs?|takes?|covers?|weighs?|shows?|turns? out|extends?|runs?|falls?|wins?|leads?)\b"
)
_TWO_OF_STEM = re.compile(r"[,:] (?:the )?([\w' -]{1,25}?) or (?:the )?([\w' -]{1,25}?)(?:,.*)?\?")


def _two_names(case: Case) -> list[str]:
    """The two things between which a question lets one choose: "Which is taller, A or B?"."""
    if case.labels:
        names = [label for label in case.labels if label]
    elif case.options:
        options = [option for option in case.options if not SAYS_EQUAL.search(option)]
        names = [plain_words(option).strip() for option in options]
    else:
        match = _TWO_OF_STEM.search(case.stem)
        names = [plain_words(name).strip() for name in match.groups()] if match else []
    names = [re.sub(r"^(?:the|an?) ", "", name) for name in names]
    names = [name for name in names if name not in YES_OR_NO and name != "a"]
    return names if len(names) == 2 else []


def decides_between_two(case: Case) -> Iterator[str]:
    """A clause compares one of two things: "the pear's pan is the lower one"."""
    if case.labels and ("<" in case.full or ">" in case.full):
        label = "|".join(re.escape(label) for label in case.labels if label)
        compared = re.compile(rf"(?<![\w|])(?:{label}) ?[<>] ?(?:{label})(?!\w| ?\?)")
        for sentence in sentences(case.full):
            if compared.search(sentence) and not UNDECIDED.search(sentence):
                yield "compares the options"
    for name in _two_names(case):
        text = case.text if len(name) == 1 else case.text.casefold()
        for clause in END_OF_CLAUSE.split(text):
            if not has_word(name, clause) or UNDECIDED.search(clause):
                continue
            if clause.startswith((" a ", " an ")):
                continue
            rest = re.split(rf"(?<!\w){re.escape(name)}(?!\w)", clause, maxsplit=1)[1]
            verb = _FOLLOWS_COPULA.search(rest)
            if verb and _COMPARATIVE.search(rest, verb.end()):
                yield f"decides between two: {name}"


# -------------------------------------------------------------------------------- both are equal

_EQUAL_SAID = re.compile(
    r"\b(?:both|they|the 2|each)\b[\w' -]{0,40}"
    r"\b(?:have|has|cover|show|reach|are|is|hold|weigh|cost|make|give|contain)\b[\w' -]{0,20}"
    r"\b(?:same|equal|equally|identical)\b|\bneither (?:is|of|one)\b[\w ]*"
    r"|\bno difference between\b",
    re.I,
)


def says_equal(case: Case) -> Iterator[str]:
    """The answer is that things are equal, and the hint says so: "both cover the same area"."""
    answer = case.answer or (
        case.options[case.place]
        if case.place is not None and case.place < len(case.options)
        else ""
    )
    if not SAYS_EQUAL.search(answer) or len(case.options) < 2:
        return
    for clause in END_OF_CLAUSE.split(case.text):
        if not UNDECIDED.search(clause) and _EQUAL_SAID.search(clause):
            yield "says that things are equal"
