"""A memory for a character model: what was said of ana? The environment is `rljax.envs.library.memory`.

    ana town:               the question: where does she live?
    ?ana town; h3 b0 k4     a call for what fits, best first, and what comes back: ids
    !h3; 2 ana town elvas, ben pet cat
                            a call that opens one: the day, and what was told
    ~ana town; b0           a call for what fits and is not open yet
    &ana town; b0 h3 k4     a call for what fits best and what it is linked with
    =elvas                  the answer, which ends the episode; unknown is one, too

`ana friend town:` asks for the town of her friend, whom another conversation names. Of what is told twice the later
holds. Held-out rows are other histories, of other people.
"""

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rljax.envs import Parsed, ParseProblem, Step, ToolCall, ToolFormat
from rljax.envs.library import MemoryEnvironment, histories
from rljax.envs.library.memory import UNKNOWN, Outcome, evidence_reward
from rljax.envs.library.memory_store import Conversation
from rljax.tasks import Example

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789=?:;!~&, \n"
KINDS = (histories.SINGLE, histories.TWO_HOP, histories.UPDATE, histories.UNANSWERABLE)
WRONG = "no"
"""What comes back from a call that is none, that fails, or that finds nothing."""

_CALLS = {"?": ("search", "query"), "~": ("missing", "what"), "&": ("graph", "query"), "!": ("open", "id")}
_CALLS["="] = ("answer", "candidates")
_TOLD = re.compile(r"([a-z]+) ([a-z]+) ([a-z]+)")


def parse(text: str) -> Parsed:
    """A mark of `_CALLS` and what it is about; anything else is a problem."""
    text = text.removesuffix(";")
    if text[:1] not in _CALLS:
        return Parsed(problem=ParseProblem("malformed", WRONG))
    name, argument = _CALLS[text[0]]
    return Parsed((ToolCall(name, {argument: text[1:]}),))


FORMAT = ToolFormat("diary", parse, stop_strings=(";",), wrap=(" ", "\n"))


def _name(rng: random.Random) -> str:
    # No English word that a search leaves out ends in one of these letters.
    return rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice("bgklmz")


def _ask(asked: histories.Asked) -> str:
    friend = f"{histories.FRIEND} " if asked.kind == histories.TWO_HOP else ""
    return f"{asked.person} {friend}{asked.attribute}:"


SHORT = histories.Wording(
    tell=lambda fact: f"{fact.person} {fact.attribute} {fact.value}".lower(),
    ask=_ask,
    headline=lambda day, people: str(day),
    name=_name,
)


class Diary(MemoryEnvironment):
    """The memory whose observations are as short as they can be; what is read is counted in words."""

    def __init__(self, **args: Any) -> None:
        super().__init__(tool_format=FORMAT, system="", **{"reward": paid, "reading": {"budget": 60}, **args})

    def step(self, action: str) -> Step:
        step = super().step(action)
        # The model has no letters for what the tools say in words, and nothing is read behind an answer.
        said = step.observation if set(step.observation) <= set(ALPHABET) else WRONG
        return Step("" if step.done else said, step.reward, step.done, step.counts)

    def listed(self, conversations: Sequence[Conversation]) -> str:
        return " ".join(conversation.id for conversation in conversations)

    def shown(self, conversation: Conversation) -> str:
        day, *told = conversation.turns
        return f"{day} {', '.join(told)}"


def paid(outcome: Outcome) -> float:
    """Three times as much for evidence as the environment's own reward: `unknown` is right in a quarter of the
    questions, and a policy that finds this early says nothing else."""
    return evidence_reward(outcome, recall_weight=0.3)


def rows(size: int, split: str = "train", seed: int = 0, num_conversations: int = 8) -> list[dict[str, Any]]:
    """`size` questions of the four kinds in turn, each about a history of three people."""
    return histories.rows(
        size, seed=seed, split=split, num_people=3, num_conversations=num_conversations, kinds=KINDS, wording=SHORT
    )


def flawed(examples: Sequence[Example]) -> list[Example]:
    """Demonstrations of every training row, of which two in five read what they need. The others answer from the
    headlines, open one conversation and take what they find there, or open one and say that it was never said."""
    made = []
    environment = Diary()
    for index, example in enumerate(examples):
        rng = random.Random(index)
        play = _Play(environment, example)
        match index // len(KINDS) % 5:
            case 0 | 1:
                play.careful()
            case 2:
                play.hasty(rng)
            case 3:
                play.shallow(rng)
            case _:
                play.gives_up()
        made.append(Example(example.prompt, {"completion": play.turns}))
    return made


class _Play:
    """An episode that is played by a rule; `turns` are those of the demonstration."""

    def __init__(self, environment: Diary, example: Example):
        self._environment = environment
        self._environment.reset({"prompt": example.prompt, **example.columns})
        self._asked: Mapping[str, str] = example.columns["asked"]
        self.turns: list[str] = []

    def careful(self) -> None:
        """Opens the two best of every search, the second of them by looking for what is missing; the later holds."""
        person = self._asked["person"]
        if self._asked["kind"] == histories.TWO_HOP:
            person = self._looked_up(person, histories.FRIEND)
        self._say(f"={self._looked_up(person, self._asked['attribute']) if person != UNKNOWN else UNKNOWN}")

    def hasty(self, rng: random.Random) -> None:
        """Searches, opens nothing, and names a value."""
        self._say(f"?{self._asked['person']} {self._asked['attribute']};")
        self._say(f"={rng.choice(histories.VALUES[self._asked['attribute']]).lower()}")

    def shallow(self, rng: random.Random) -> None:
        """Opens what fits best, and names something that is told there."""
        found = self._say(f"?{self._asked['person']} {self._asked['attribute']};")
        said = self._say(f"!{found.split()[0]};")
        self._say(f"={rng.choice(_TOLD.findall(said))[2]}")

    def gives_up(self) -> None:
        """Opens what fits best, and says that it was never said."""
        found = self._say(f"?{self._asked['person']} {self._asked['attribute']};")
        self._say(f"!{found.split()[0]};")
        self._say(f"={UNKNOWN}")

    def _looked_up(self, person: str, attribute: str) -> str:
        first = self._say(f"?{person} {attribute};").split()[0]
        said = [self._say(f"!{first};")]
        more = self._say(f"~{person} {attribute};").split()[0]
        if more != WRONG:
            said.append(self._say(f"!{more};"))

        # Begins with the day, so the later one comes last.
        said.sort(key=lambda text: int(text.split()[0]))
        told = [
            value for text in said for who, what, value in _TOLD.findall(text) if (who, what) == (person, attribute)
        ]
        return told[-1] if told else UNKNOWN

    def _say(self, action: str) -> str:
        step = self._environment.step(action)
        before, after = FORMAT.wrap
        self.turns += [action] if step.done else [action, f"{before}{step.observation}{after}"]
        return step.observation
