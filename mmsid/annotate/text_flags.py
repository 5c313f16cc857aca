"""Flags of generated and given text: sensitive traits, refusals, prompt echoes, instructions, hidden characters.

The prompts forbid sensitive traits (health, faith, politics, sexuality, ethnicity). The detectors match words, not meanings: a flag
marks a row for review and does not reject it. `echoes_prompt` finds answers that say nothing about the item; they are rejected.
"""

from __future__ import annotations

import re
import unicodedata

from mmsid.catalog.annotations import SENSITIVE
from mmsid.catalog.prompt_injection import has_instruction, visible

PROMPT_ECHO = "prompt_echo"
PROMPT_EXAMPLE = "prompt_example"  # the reason of an answer that `echoes_prompt`
REFUSAL = "refusal"
INSTRUCTION_IN_EVIDENCE = "instruction_in_evidence"
HIDDEN_TEXT = "hidden_text_in_evidence"
INSTRUCTION_IN_OUTPUT = "instruction_in_output"
ECHO_WORDS = 6  # so many consecutive words of the prompt in an answer are an echo


def normalise(text: str) -> str:
    """NFKC, casefold, and runs of whitespace as one space, so that texts that look the same compare equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# Whole words. Adjectives that describe goods ("health food", "black", "white") are left out on purpose.
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


_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PLACEHOLDER = re.compile(r"[<\[{][^<>\[\]{}]*[>\]}]")


def refuses(text: str) -> bool:
    """True if the text begins like a model's refusal ("I'm sorry, ...", "As an AI ...")."""
    return bool(_REFUSAL.match(normalise(text)))


def output_flags(texts: list[str], prompt: str) -> list[str]:
    """Flags of a valid record's texts.

    `sensitive`: words of sensitive traits. `instruction_in_output`: an instruction, for example copied from a picture, that would
    reach the next model. `prompt_echo`: six consecutive words of the prompt.
    """
    normalised = [normalise(part) for part in texts]
    flags = []
    if any(_SENSITIVE.search(part) for part in normalised):
        flags.append(SENSITIVE)
    if any(has_instruction(part) for part in texts):
        flags.append(INSTRUCTION_IN_OUTPUT)
    if any(_echoes(part, normalise(prompt)) for part in normalised):
        flags.append(PROMPT_ECHO)
    return flags


def echoes_prompt(texts: list[str], prompt: str, evidence: str) -> bool:
    """True if a text is nothing but a placeholder, or words that stand in the prompt and not in the evidence.

    Weak models repeat the prompt's examples ("trail running in wet weather"), its placeholders ("<text>") and its rules ("health").

    Args:
        texts: the texts of one record.
        prompt: the prompt without the evidence.
        evidence: the item's text that was put into it.
    """
    prompt, evidence = _words(prompt), _words(evidence)
    for text in texts:
        words = _words(text)
        if not words.strip() or _PLACEHOLDER.fullmatch(text.strip()) or (words in prompt and words not in evidence):
            return True
    return False


def evidence_flags(texts: list[str]) -> list[str]:
    """Flags of an advertiser's texts.

    `instruction_in_evidence`: a text addresses a model with an instruction. `hidden_text_in_evidence`: invisible characters.
    """
    flags = [INSTRUCTION_IN_EVIDENCE] if any(has_instruction(part) for part in texts) else []
    return flags + ([HIDDEN_TEXT] if any(visible(part) != part for part in texts) else [])


def _words(text: str) -> str:
    """The words of a text in the form of `normalise`, between single spaces, without punctuation."""
    return f" {' '.join(_WORD.findall(normalise(text)))} "


def _echoes(text: str, prompt: str) -> bool:
    words, padded = text.split(), f" {prompt} "
    return any(f" {' '.join(words[start : start + ECHO_WORDS])} " in padded for start in range(len(words) - ECHO_WORDS + 1))
