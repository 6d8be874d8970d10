"""The settings of a run's sampling."""

import dataclasses

from rljax.sampling.logits import SamplingParams, sampling_params
from rljax.settings import check_fields, field


@dataclasses.dataclass
class SamplingConfig:
    """The distribution that training samples from, and what ends a completion."""

    temperature: float = field(default=1.0, least=0, most=1e6)
    """Divisor of the logits, for training; evaluation has its own. Above 0 where groups are larger than 1."""
    top_k: int = field(default=0, least=0, below=2**31)
    """Sample from this many most probable tokens; 0 is off."""
    top_p: float = field(default=1.0, above=0, most=1)
    """Sample from the fewest most probable tokens whose share reaches this; 1 is off."""
    min_p: float = field(default=0.0, least=0, most=1)
    """Sample from tokens at least this many times as probable as the best; 0 is off."""
    max_new_tokens: int = field(default=64, least=1)
    """Most tokens of a completion, or of one turn. Raise it when `rollout/truncated_share` is not small."""
    truncated_is_wrong: bool = True
    """A completion that runs into `max_new_tokens` earns no reward, in training and evaluation."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, beside the tokenizer's own stop tokens; a control token such as `<|eot_id|>` too."""

    def params(self) -> SamplingParams:
        """The distribution that is sampled from. ValueError for a value out of range."""
        return sampling_params(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        check_fields(self, "config.sampling")
        try:
            self.params()
        except ValueError as error:
            raise ValueError(f"config.sampling.{error}") from None
