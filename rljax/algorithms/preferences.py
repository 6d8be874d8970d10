"""Methods that learn from preferences, without sampling: recipes of `config.preferences.method`."""

import dataclasses
import functools
from typing import NamedTuple

from rljax.losses import (
    Loss,
    centered,
    log_ratio,
    logistic,
    margin_of,
    mean_log_ratio,
    mean_logprob,
    pairwise_loss,
    prospect_loss,
    squared,
    total,
)


class PreferenceMethod(NamedTuple):
    """What a method minimises, and what it wants beside rows."""

    loss: Loss
    needs_ref: bool = False
    """Log-probs of the model that training starts from."""
    has_other_rows: bool = False
    """Rows of side 0, a prompt with another prompt's completion, beside those that are labelled; pairs are not
    needed."""
    per_token: bool = False
    """Scores are means over a completion's tokens, not sums."""
    scores_values: bool = False
    """What is trained is a reward model: the loss sees its number for a whole completion where others see log-probs."""


@dataclasses.dataclass
class DPO:
    """Direct preference optimisation, arXiv 2305.18290, equation 7.

        m = log pi(w)/pi_ref(w) - log pi(l)/pi_ref(l),  of the completions w (preferred) and l of one prompt
        loss = mean over pairs of -(1 - label_smoothing) log sigmoid(beta m) - label_smoothing log sigmoid(-beta m)

    The reference is the model that training starts from. `label_smoothing` (0 in the paper) is the conservative loss of
    the authors' note on noisy labels.

    Deviations: none.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def build(self) -> PreferenceMethod:
        """Raises ValueError for hyperparameters that cannot work."""
        _check_above_zero(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"DPO: label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")
        of_margin = functools.partial(logistic, beta=self.beta, label_smoothing=self.label_smoothing)
        return PreferenceMethod(pairwise_loss(margin_of(of_margin), score=log_ratio, scale=self.beta), needs_ref=True)


@dataclasses.dataclass
class IPO:
    """Identity preference optimisation, arXiv 2310.12036, equation 17.

        loss = mean over pairs of (m - 1 / (2 beta))^2,  m the difference of the log-ratios per token

    `beta` is the paper's tau.

    Deviations: log-ratios are means over a completion's tokens, which the equation does not say; TRL reports that the
    authors' results are of that form. `per_token` False takes sums.
    """

    beta: float = 0.1
    per_token: bool = True

    def build(self) -> PreferenceMethod:
        """Raises ValueError for hyperparameters that cannot work."""
        _check_above_zero(self, "beta")
        of_margin = functools.partial(squared, beta=self.beta)
        score = mean_log_ratio if self.per_token else log_ratio
        loss = pairwise_loss(margin_of(of_margin), score=score, scale=self.beta)
        return PreferenceMethod(loss, needs_ref=True, per_token=self.per_token)


@dataclasses.dataclass
class SimPO:
    """SimPO, arXiv 2405.14734, equation 6: no reference.

        loss = mean over pairs of -log sigmoid(beta (mean log pi(w) - mean log pi(l)) - gamma)

    Means are over the tokens of a completion. The paper tunes `gamma` as a share of `beta`, between 0.1 and 0.8.

    Deviations: none.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def build(self) -> PreferenceMethod:
        """Raises ValueError for hyperparameters that cannot work."""
        _check_above_zero(self, "beta")
        if not self.gamma >= 0:
            raise ValueError(f"SimPO: gamma={self.gamma} must be at least 0")
        pair_loss = margin_of(functools.partial(logistic, beta=self.beta), less=self.gamma / self.beta)
        return PreferenceMethod(pairwise_loss(pair_loss, score=mean_logprob, scale=self.beta), per_token=True)


@dataclasses.dataclass
class KTO:
    """Kahneman-Tversky optimisation, arXiv 2402.01306, equation 8: labelled completions, which need not be pairs.

        r = log pi(y | x) / pi_ref(y | x),  z = max(0, mean over the minibatch of r of other prompts' completions)
        loss = mean over rows of desirable (1 - sigmoid(beta (r - z))) for a good completion,
                                 undesirable (1 - sigmoid(beta (z - r))) for a bad one

    The paper wants `desirable` times the good rows within 1 to 1.33 of `undesirable` times the bad ones.

    Deviations: z is over the minibatch of an update, whatever it is split into, and costs one more forward pass.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def build(self) -> PreferenceMethod:
        """Raises ValueError for hyperparameters that cannot work."""
        _check_above_zero(self, "beta", "desirable", "undesirable")
        return PreferenceMethod(prospect_loss(**dataclasses.asdict(self)), needs_ref=True, has_other_rows=True)


@dataclasses.dataclass
class BradleyTerry:
    """A reward model, arXiv 2203.02155, equation 1.

        loss = mean over pairs of -log sigmoid(r(w) - r(l)) + center (r(w) + r(l))^2

    r is the value head's number behind the last token of a completion. The loss of the difference leaves the level of
    rewards open; `center` (2312.09244) draws it to 0, which a policy trained without a baseline needs.

    Deviations: a pair is a comparison of its own, where the paper takes all comparisons of a prompt as one element.
    """

    center: float = 0.0

    def build(self) -> PreferenceMethod:
        """Raises ValueError for hyperparameters that cannot work."""
        if not self.center >= 0:
            raise ValueError(f"BradleyTerry: center={self.center} must be at least 0")
        pair_loss = centered(margin_of(functools.partial(logistic, beta=1.0)), self.center)
        return PreferenceMethod(pairwise_loss(pair_loss, score=total), scores_values=True)


def _check_above_zero(recipe: object, *names: str) -> None:
    for name in names:
        if not getattr(recipe, name) > 0:
            raise ValueError(f"{type(recipe).__name__}: {name}={getattr(recipe, name)} must be above 0")
