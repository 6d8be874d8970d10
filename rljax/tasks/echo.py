"""A toy task that a tiny model learns in seconds. It stands here, where nothing imports jax, so that the processes of
its reward start at once."""

import dataclasses

from rljax.tasks.examples import Example


@dataclasses.dataclass
class EchoData:
    """Prompts `ab=` of two letters; the reward is the share of the completion that repeats the first letter."""

    letters: str = "abcdefgh"
    chat: bool | None = None

    def load(self) -> "EchoData":
        examples = [Example(f"{x}{y}=", {"answer": x}) for x in self.letters for y in self.letters]
        self.test = examples[::5]
        self.train = [e for i, e in enumerate(examples) if i % 5]
        self.verifier = None
        return self


def echo_reward(completion: str, answer: str) -> float:
    """Share of four characters that are `answer`."""
    return completion[:4].count(answer) / 4
