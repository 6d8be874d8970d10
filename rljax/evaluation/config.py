"""How a policy is evaluated."""

import dataclasses


@dataclasses.dataclass
class EvaluationConfig:
    """Held-out examples, answered once greedily and several times by chance."""

    every: int = 0
    """Training steps between two evaluations; 0 is before and after training only."""
    problems: int = 64
    """Held-out examples that are answered, the first ones; 0 is all. `launch/sft.py` evaluates none for -1."""
    samples: int = 8
    """Samples of each problem, for avg@k, pass@k and maj@k with k up to this."""
    solved_by: str = ""
    """Name of the reward, or of a count of the environment, that decides: a sample is solved where it is 1 or more,
    unweighted. Empty is the first of `config.actor.rewards` (or the data's verifier), and in an environment the reward
    of the episode. Set it where the first reward is not the one for the right answer."""
    temperature: float = 1.0
    """Of these samples."""
    top_p: float = 1.0
    """Of these samples: the smallest set of tokens with this much probability is sampled from."""
    batch_prompts: int = 16
    """Problems that are sampled together. It changes memory and speed, and no result."""

    def check(self) -> None:
        """Raises ValueError for values that cannot work."""
        for name in ("samples", "batch_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.evaluation.{name}={getattr(self, name)} must be at least 1")
