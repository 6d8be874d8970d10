"""How a policy is evaluated."""

import dataclasses

from rljax.sampling import SamplingParams, sampling_params
from rljax.settings import field


@dataclasses.dataclass
class EvaluationConfig:
    """Held-out examples, answered once greedily and several times by chance."""

    every: int = field(default=0, least=0)
    """Training steps between two evaluations; 0 is before and after training only. `rljax sft` evaluates at its end."""
    problems: int = field(default=64, least=-1)
    """Held-out examples that are answered, the first ones; 0 is all. `rljax sft` evaluates none for -1."""
    samples: int = field(default=8, least=1)
    """Samples of each problem, for avg@k, pass@k and maj@k with k up to this."""
    solved_by: str = ""
    """Name of the reward, or of a count of the environment, that decides: a sample is solved where it is 1 or more,
    unweighted. Empty is the first of `config.actor.rewards` (or the data's verifier), and in an environment the reward
    of the episode. Where that reward does not apply to a row, the weighted sum decides. Set it where the first reward
    is not the one for the right answer."""
    temperature: float = field(default=1.0, least=0, most=1e6)
    """Of these samples."""
    top_p: float = field(default=1.0, above=0, most=1)
    """Of these samples: the smallest set of tokens with this much probability is sampled from."""
    batch_prompts: int = field(default=16, least=1)
    """Problems that are sampled together. It changes memory and speed, and no result."""

    def sampled(self) -> SamplingParams:
        """The distribution of the samples. ValueError for a value out of range."""
        return sampling_params(temperature=self.temperature, top_p=self.top_p)

    def check(self) -> None:
        """ValueError of one line for values that cannot work."""
        self.sampled()
