"""The settings of a run's sampling."""

import dataclasses
from collections.abc import Callable, Sequence

from rljax.sampling.logits import Penalties, SamplingParams, sampling_params
from rljax.settings import check_fields, field

GRAMMARS = ("json_schema", "regex", "lark", "schema_column")
"""Fields of which one may bind completions to a grammar."""

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


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
    stop_column: str = ""
    """Column of the data with such texts of each row's own, one or a list; a row without any has none."""
    logit_bias: tuple[tuple[int | str, float], ...] = ()
    """Tokens and what is added to their logits before these are divided by the temperature, such as `(("wait", 2.0),)`:
    ids, or texts of one token. In evaluation too."""
    banned: tuple[int | str, ...] = ()
    """Tokens that are never sampled: ids, or texts of one token, control tokens too. In evaluation too."""

    repetition_penalty: float = field(default=1.0, least=0.01, most=100)
    """Divides the positive logits of tokens that stand in prompt or completion, and multiplies the others; 1 is off.
    The trainer's log-probs are of the same. Costs an array of the vocabulary's size for each decode row. Over turns all
    tokens of the row count that stand before, observations too."""
    presence_penalty: float = field(default=0.0, least=-100, most=100)
    """Is taken from the logits of tokens that the completion has sampled; 0 is off. Over turns those count that the
    policy has sampled in any turn of the row, and observations do not."""
    frequency_penalty: float = field(default=0.0, least=-100, most=100)
    """Is taken from the logit of a token each time that the completion has sampled it; 0 is off; over turns
    likewise."""
    top_logprobs: int = field(default=0, least=0, most=100)
    """Most probable tokens that the records of rollouts tell beside each token, with their log-probs."""
    json_schema: str = ""
    """A JSON schema, as JSON text, that completions follow: of tokens that lead out of it none is sampled, and the
    log-probs are of those that are left. Over turns it begins anew at each. Decoding waits for the host at every token.
    Needs the extra `grammar`."""
    regex: str = ""
    """A regular expression that whole completions match, likewise."""
    lark: str = ""
    """A grammar in llguidance's dialect of Lark that completions follow, likewise."""
    schema_column: str = ""
    """Column of the data that holds a JSON schema of each row's own, as text or as an object; a row without one is not
    bound."""

    @property
    def grammar(self) -> str:
        """Name of the grammar (`rljax.text.Grammars`) of all rows; empty for none."""
        named = [f"{kind} {text}" for kind in ("json_schema", "regex", "lark") if (text := getattr(self, kind))]
        return named[0] if named else ""

    @property
    def follows_grammar(self) -> bool:
        """Whether completions are bound at all."""
        return bool(self.grammar or self.schema_column)

    def params(self, token_id: Callable[[str], int] | None = None) -> SamplingParams:
        """The distribution that is sampled from. `token_id` gives the token of a text; without it those that are named
        by texts are left out. ValueError for a value out of range, and what `token_id` raises."""

        def ids(name: str, tokens: Sequence[int | str]) -> list[int]:
            known = [token for token in tokens if token_id is not None or not isinstance(token, str)]
            try:
                found = [token_id(token) if isinstance(token, str) and token_id else int(token) for token in known]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if repeated := [token for token in found if found.count(token) > 1]:
                raise ValueError(f"{name} names the token {repeated[0]} twice; name it once")
            return found

        biased = [(token, value) for token, value in self.logit_bias if token_id or not isinstance(token, str)]
        values = [value for _, value in biased]
        return sampling_params(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            logit_bias=dict(zip(ids("logit_bias", [token for token, _ in biased]), values, strict=True)),
            banned=ids("banned", self.banned),
            penalties=Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty),
        )

    def check(self) -> None:
        """Raises a ValueError of one line for a value that cannot be."""
        check_fields(self, "config.sampling")
        given = [name for name in GRAMMARS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"config.sampling.{given[0]} and config.sampling.{given[1]}: set one of them")
        try:
            self.params()
        except ValueError as error:
            raise ValueError(f"config.sampling.{error}") from None
