"""What the audit looks for in an instruction set, an exchange at a time.

The screens for refusals, injections, sensitive content and bias go by phrases. They give leads to read, never verdicts:
a text on suicide prevention is found as well as one that is no help.
"""

import re
from collections.abc import Sequence

from data_pipelines.duplicates import normal_hash
from data_pipelines.words import words_of

LABEL_CHARACTERS = 40
"""An answer up to this long may be a label, and is counted as one."""
ECHO_WORDS = 4
"""A shorter question that begins its answer is no echo: "Yes or no?" - "Yes"."""

REFUSAL = re.compile(
    r"\bas an ai\b|\bi(?:'m| am) (?:just |only )?an ai\b|\blanguage model\b.{0,40}\b(?:cannot|can't|unable)"
    r"|\bi(?:'m| am) (?:very |so )?sorry,? (?:but )?i (?:can(?:no|')t|am (?:not able|unable))"
    r"|\bi(?:'m| am) (?:not able|unable) to (?:help|assist|provide|answer|comply|fulfill)"
    r"|\bi (?:can(?:no|')t|cannot|won't|will not) (?:help|assist|provide|answer|comply|fulfill|do that|engage)",
    re.IGNORECASE,
)
INJECTION = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass)\b.{0,30}\b(?:previous|prior|above|earlier|preceding|all|your|system)"
    r"\b.{0,20}\b(?:instructions?|prompts?|rules|messages?|guidelines)\b"
    r"|\b(?:reveal|print|show|repeat|output)\b.{0,20}\b(?:your|the) (?:system|hidden|initial) (?:prompt|instructions?)"
    r"|\byou are now (?:dan\b|in developer mode|unrestricted|jailbroken)|\bdo anything now\b|<\|im_start\|>|\[/?INST\]",
    re.IGNORECASE,
)
SENSITIVE = {
    "self-harm": r"suicid\w*|self[- ]harm\w*|kill (?:myself|yourself)|overdos\w+",
    "violence": r"how to (?:kill|poison|murder)|behead\w*|massacr\w+|tortur\w+|pipe bomb|build a bomb",
    "sexual": r"porn\w*|sexual abuse|incest\w*|erotic\w*|rape[ds]?|nudes?",
    "drugs": r"cook meth\w*|synthesi[sz]e (?:meth|lsd|mdma|fentanyl)\w*|cocaine|heroin",
    "weapons": r"nerve agents?|sarin|ricin|anthrax|ghost guns?",
}
SENSITIVE_TERMS = re.compile("|".join(rf"\b(?:{terms})\b" for terms in SENSITIVE.values()), re.IGNORECASE)
GROUPS = (
    r"women|men|girls|boys|females|males|blacks|whites|asians|arabs|jews|muslims|christians|hindus|immigrants|refugees"
    r"|foreigners|gays|lesbians|transgender people|disabled people|the poor|the elderly|old people|black people"
    r"|white people"
)
BIAS = re.compile(
    rf"\b(?:all|most|every|typical|those|these) (?:{GROUPS})\b.{{0,20}}\b(?:are|is|can(?:no|')t|should|always|never)\b"
    rf"|\b(?:{GROUPS}) (?:are (?:all|always|naturally|inherently|just|too|more|less)|can(?:no|')t|should not)\b"
    r"|\b(?:women|girls|men|boys) (?:belong|should stay|are bad at|are better at|are worse at)\b",
    re.IGNORECASE,
)

FLAGS = ("empty-output", "echo", "refusal", "injection", "sensitive", "bias")


def flags_of(messages: Sequence[Sequence[str]]) -> list[str]:
    """Those of ``FLAGS`` that an exchange, given as (role, content), deserves."""
    answers = [content for role, content in messages if role == "assistant"]
    asked = "\n".join(content for role, content in messages if role != "assistant")
    said = "\n".join(answers)
    found = []
    if any(not answer.strip() for answer in answers):
        found.append("empty-output")
    if _echoes(messages):
        found.append("echo")
    if REFUSAL.search(said):
        found.append("refusal")
    if INJECTION.search(asked):
        found.append("injection")
    if SENSITIVE_TERMS.search(asked) or SENSITIVE_TERMS.search(said):
        found.append("sensitive")
    if BIAS.search(asked) or BIAS.search(said):
        found.append("bias")
    return found


def _echoes(messages: Sequence[Sequence[str]]) -> bool:
    """Whether an answer is the question again, or begins with the whole of it."""
    question: list[str] = []
    for role, content in messages:
        if role == "user":
            question = words_of(content)
        elif role == "assistant" and question:
            answer = words_of(content)
            if answer == question or (len(question) > ECHO_WORDS and answer[: len(question)] == question):
                return True
    return False


def keys_of(messages: Sequence[Sequence[str]]) -> tuple[bytes, bytes, str]:
    """(hash of all before the last answer, hash of that answer, the answer itself where it is short enough for a
    label): two exchanges conflict that agree in the first and not in the second."""
    last = max(place for place, (role, _) in enumerate(messages) if role == "assistant")
    before = [f"{role} {content}" for role, content in messages[:last]]
    answer = messages[last][1].strip()
    label = answer if 0 < len(answer) <= LABEL_CHARACTERS and "\n" not in answer else ""
    return normal_hash(words_of("\n".join(before))), normal_hash(words_of(answer) or [answer]), label


def lengths_of(messages: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    """(turns of the user, characters asked, characters answered)."""
    asked = sum(len(content) for role, content in messages if role != "assistant")
    answered = sum(len(content) for role, content in messages if role == "assistant")
    return sum(role == "user" for role, _ in messages), asked, answered
