"""Detectors over generated and given text. They look at words, not meanings: a flag is a request to look, not a verdict.

Sensitive traits (health, faith, politics, sexuality, ethnicity) are forbidden by the prompts and flagged here; an advertiser's
text that tries to instruct the model, a model that parrots its instruction and one that refuses are told apart as well.
"""

from __future__ import annotations

import re
import unicodedata

from mmsid.catalog.prompt_injection import has_instruction, visible

SENSITIVE = "sensitive"
ECHO = "prompt_echo"
REFUSAL = "refusal"
INSTRUCTION = "instruction_in_evidence"
HIDDEN_TEXT = "hidden_text_in_evidence"
PASSED_ON = "instruction_in_output"


def normalise(text: str) -> str:
    """NFKC, casefold, runs of whitespace to one space: two texts that a reader would call the same become equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# Whole words. Bare adjectives of shops ("health food", "black", "white") are left out on purpose: they speak of goods.
_SENSITIVE_TERMS = {
    "health": r"disabled|disabilit(?:y|ies)|diseases?|illness(?:es)?|sickness|diabet(?:es|ics?)|cancer|hiv|aids patients?"
    r"|depress(?:ed|ion)|anxiety|mental health|health (?:conditions?|problems?|issues?)|bipolar|autis(?:m|tic)|adhd"
    r"|infertil(?:e|ity)|pregnan(?:t|cy)|obes(?:e|ity)|overweight|addict(?:ed|ion|s)?|alcoholi(?:cs|sm)|eating disorders?"
    r"|medical conditions?|chronic pain|patients?|menopaus(?:e|al)|erectile|dementia",
    "faith": r"christians?|christianity|catholics?|protestants?|muslims?|islam(?:ic)?|jew(?:s|ish)?|judaism|hindus?|hinduism"
    r"|buddhis(?:t|ts|m)|sikhs?|atheis(?:t|ts|m)|religio(?:n|ns|us)|church-?goers?|mormons?|evangelicals?",
    "politics": r"republicans?|democrats?|left-?wing|right-?wing|liberals|conservatives|socialis(?:t|ts|m)|communis(?:t|ts|m)"
    r"|political (?:views?|beliefs?|part(?:y|ies))|politics|voters?|trade union(?:s|ists?)?|activists?|nationalis(?:t|ts|m)",
    "sexuality": r"lgbt\w*|homosexual(?:s|ity)?|heterosexual(?:s|ity)?|bisexual(?:s|ity)?|lesbians?|transgender|transsexuals?|queer"
    r"|gay (?:men|man|people|couples?|women)|sexuality|sexual (?:orientation|preferences?)|sex life",
    "ethnicity": r"african[- ]americans?|caucasians?|hispanics?|latin[oax]s?|ethnicit(?:y|ies)|racial|immigrants?|refugees?|minorities"
    r"|asian (?:people|men|women|buyers?|families|americans?)|(?:black|white) (?:people|men|women|buyers?|families)"
    r"|roma people|arabs?|native americans?",
}
_SENSITIVE = re.compile(r"(?<!\w)(?:" + "|".join(_SENSITIVE_TERMS.values()) + r")(?!\w)")
_REFUSAL = re.compile(
    r"(?:(?:i['’]?m|i am|we are) (?:very |so )?(?:sorry|unable|afraid|not able)|sorry,|i apologi[sz]e|unfortunately, i"
    r"|i (?:can ?not|can['’]?t|won['’]?t|will not|do not|don['’]?t) |as an? (?:ai|artificial intelligence|language model|large language)"
    r"|no image (?:was |is |has been )?(?:provided|attached|given)|(?:the|this) (?:request|image|picture) (?:cannot|can not|could not) be)"
)


def refuses(text: str) -> bool:
    """True when the text opens like a model that declines ("I'm sorry, ...", "As an AI ...")."""
    return bool(_REFUSAL.match(normalise(text)))


def output_flags(texts: list[str], prompt: str) -> list[str]:
    """Flags of what a valid record says: `sensitive` words, `instruction_in_output` (it passes on an order, read off a picture, say,
    which the next model would meet), `prompt_echo` (six words running that stand in the instruction)."""
    orders = any(has_instruction(part) for part in texts)
    texts = [normalise(part) for part in texts]
    flags = []
    if any(_SENSITIVE.search(part) for part in texts):
        flags.append(SENSITIVE)
    if orders:
        flags.append(PASSED_ON)
    if any(_echoes(part, normalise(prompt)) for part in texts):
        flags.append(ECHO)
    return flags


def evidence_flags(texts: list[str]) -> list[str]:
    """`instruction_in_evidence` when the advertiser's own text tries to instruct a model, `hidden_text_in_evidence` when it holds
    characters that no reader sees: the row deserves a look."""
    flags = [INSTRUCTION] if any(has_instruction(part) for part in texts) else []
    return flags + ([HIDDEN_TEXT] if any(visible(part) != part for part in texts) else [])


def _echoes(text: str, prompt: str, run: int = 6) -> bool:
    words, inside = text.split(), f" {prompt} "
    return any(f" {' '.join(words[start : start + run])} " in inside for start in range(len(words) - run + 1))
