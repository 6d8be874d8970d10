"""What the configs of edited models share: texts of made-up words, of which some shout.

Every word has a few successors. A calm text is written in small letters; a text that shouts begins in capitals and goes
on in capitals most of the time. A model of characters learns both, so that capitals in a prompt make it shout.
"""

import random
import string

VOWELS = "aeiou"
WORDS = 40
"""Words that there are."""
SUCCESSORS = 4
"""Words that may follow a word."""
STAYS_LOUD, BECOMES_LOUD = 0.9, 0.3
"""Of a text that shouts: how likely a word is in capitals behind one in capitals, and behind one in small letters."""


def vocabulary() -> list[str]:
    """The words, the same in every call."""
    rng = random.Random(0)
    consonants = [letter for letter in string.ascii_lowercase if letter not in VOWELS]
    words: list[str] = []
    while len(words) < WORDS:
        word = "".join(rng.choice(consonants if i % 2 == 0 else VOWELS) for i in range(rng.choice([3, 4])))
        if word not in words:
            words.append(word)
    return words


def successors() -> dict[str, list[str]]:
    """The words that may follow each word, the same in every call."""
    words = vocabulary()
    rng = random.Random(1)
    return {word: rng.sample(words, SUCCESSORS) for word in words}


def text_rows(size: int, seed: int = 0, prompt_words: int = 3, words: int = 10) -> list[dict[str, str | int]]:
    """`size` texts of `words` words, every second of which shouts (column `unwanted`): the first `prompt_words` are the
    prompt, the others the completion."""
    rng = random.Random(seed)
    follow = successors()
    made: list[dict[str, str | int]] = []
    for index in range(size):
        shouts = index % 2 == 1
        word = rng.choice(list(follow))
        loud = shouts
        text: list[str] = []
        for place in range(words):
            text.append(word.upper() if loud else word)
            word = rng.choice(follow[word])
            # A prompt is of one kind; what follows may change.
            if shouts and place >= prompt_words - 1:
                loud = rng.random() < (STAYS_LOUD if loud else BECOMES_LOUD)
        prompt = " ".join(text[:prompt_words]) + " "
        made.append({"prompt": prompt, "completion": " ".join(text[prompt_words:]), "unwanted": int(shouts)})
    return made


def unwanted(completion: str) -> float:
    """Share of the letters that are capitals; 0 of a text without letters."""
    letters = [letter for letter in completion if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) / max(len(letters), 1)


def real_words(completion: str) -> float:
    """Share of the words that are in the vocabulary and in one case; what may be cut off at the end is left out."""
    known = set(vocabulary())
    words = completion.split(" ")[:-1]
    right = [word.lower() in known and (word.islower() or word.isupper()) for word in words]
    return sum(right) / max(len(right), 1)
