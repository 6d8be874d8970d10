"""Text completions as OpenAI has them on the wire (`POST /v1/completions`), for evaluation harnesses. Host, no jax.

A request becomes one request for token ids for each of its prompts, so that what is checked, sampled and refused is
the same. `echo` with `logprobs` says the log-probs of the prompt's own tokens, which harnesses read for a text's
likelihood.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rljax.rollouts.engines.api import GenerateRequest, read_request
from rljax.rollouts.http_server import ApiError
from rljax.text import Tokenizer, decode_behind, render_prompt

_FIELDS = {"model", "prompt", "user", "echo", "stream", "stream_options", "suffix", "best_of", "add_special_tokens"}
"""Those that are no settings of sampling; all others are taken for such, and refused where they are not known."""
_DEFAULT_NEW = 16


class CompletionRequest(NamedTuple):
    """A checked request for text."""

    prompts: list[GenerateRequest]
    echoes: bool
    """Whether the prompt is a part of the text."""
    tells_logprobs: bool
    is_silent: bool
    """Whether nothing is said, and the prompt alone is scored."""


class Told(NamedTuple):
    """Tokens of one choice and what is told of each; entries of a prompt's first token are None."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[Mapping[int, float] | None]
    """The most probable tokens by id."""


def read_completion_request(body: Any, tokenizer: Tokenizer, *, new_seed: int) -> CompletionRequest:
    """Checks the JSON value of a request. Raises ApiError."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object with a 'prompt'")
    if body.get("stream"):
        raise ApiError("stream=true is not served; leave it out", code="unsupported_value", param="stream")
    if body.get("suffix"):
        raise ApiError("suffix is not served; leave it out", code="unsupported_value", param="suffix")
    if body.get("best_of") not in (None, 1, body.get("n", 1)):
        raise ApiError("best_of is not served; ask for n and choose", code="unsupported_value", param="best_of")

    settings = {name: value for name, value in body.items() if name not in _FIELDS}
    settings.setdefault("max_tokens", _DEFAULT_NEW)
    # 0 asks for the log-probs of the prompt alone, and what says tokens says one at least.
    is_silent = settings["max_tokens"] == 0
    if is_silent:
        settings["max_tokens"] = 1
    echoes = bool(body.get("echo"))
    tells = settings.get("logprobs") is not None
    if echoes and tells and settings.get("prompt_logprobs") is None:
        settings["prompt_logprobs"] = settings["logprobs"]
    if is_silent and not echoes and settings.get("prompt_logprobs") is None:
        raise ApiError("max_tokens=0 says nothing; ask for echo or prompt_logprobs with it", param="max_tokens")

    prompts = []
    for number, prompt in enumerate(_prompts(body.get("prompt"))):
        tokens = prompt if isinstance(prompt, list) else _encoded(tokenizer, prompt)
        seed = settings.get("seed")
        # Prompts of one request have random numbers of their own.
        own = {} if type(seed) is not int else {"seed": seed + number}
        ids = {"token_ids": tokens, "sampling_params": {**settings, **own}}
        prompts.append(read_request(ids, new_seed=new_seed + number))
    return CompletionRequest(prompts, echoes, tells, is_silent)


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return render_prompt(tokenizer, text, chat=False)
    except ValueError as error:
        raise ApiError(str(error), param="prompt") from error


def _prompts(given: Any) -> Sequence[str | list[int]]:
    """A text, ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(type(x) is int for x in given):
            return [given]
        if all(isinstance(x, str) for x in given) or all(isinstance(x, list) for x in given):
            return given
    raise ApiError("prompt must be a text, a list of token ids, or a list of several of one kind", param="prompt")


def told_of_prompt(entries: Sequence[Mapping[str, Any] | None], tokens: Sequence[int]) -> Told:
    """Of the `prompt_logprobs` of `write_scores`."""
    return Told(
        tokens=list(tokens),
        logprobs=[None if e is None else e[str(token)]["logprob"] for e, token in zip(entries, tokens, strict=True)],
        top=[None if e is None else {int(name): x["logprob"] for name, x in e.items()} for e in entries],
    )


def told_of_choice(choice: Mapping[str, Any]) -> Told:
    """Of a choice of `write_choice`. A token stands among the most probable ones, whether it is one of them or not."""
    content = choice["logprobs"]["content"]
    return Told(
        tokens=[x["token_id"] for x in content],
        logprobs=[x["logprob"] for x in content],
        top=[
            {**{best["token_id"]: best["logprob"] for best in x["top_logprobs"]}, x["token_id"]: x["logprob"]}
            for x in content
        ],
    )


def write_text_choice(
    tokenizer: Tokenizer,
    index: int,
    prompt: Sequence[int],
    before: Told | None,
    choice: Mapping[str, Any] | None,
    *,
    tells: bool,
) -> dict[str, Any]:
    """A choice of `/v1/completions`. `before` is told of the prompt where that is echoed, `choice` of `write_choice` is
    what was said behind it; None says nothing. `tells`: whether log-probs are told."""
    text = "" if before is None else tokenizer.decode(prompt)
    parts = [] if before is None else [before]
    if choice is not None:
        parts.append(told_of_choice(choice))
        said = decode_behind(tokenizer, choice["token_ids"], prompt)
        # What ends a text is no part of it.
        reason = choice["stop_reason"]
        text += said.partition(reason)[0] if isinstance(reason, str) else said

    logprobs = None
    if tells:
        tokens = [token for part in parts for token in part.tokens]
        texts = [tokenizer.decode([token]) for token in tokens]
        tops = [top for part in parts for top in part.top]
        logprobs = {
            "tokens": texts,
            "token_logprobs": [logprob for part in parts for logprob in part.logprobs],
            "top_logprobs": [top and _by_text(tokenizer, top) for top in tops],
            "text_offset": [0, *itertools.accumulate(map(len, texts))][: len(texts)],
        }
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": "length" if choice is None else choice["finish_reason"],
        "stop_reason": None if choice is None else choice["stop_reason"],
    }


def _by_text(tokenizer: Tokenizer, top: Mapping[int, float]) -> dict[str, float]:
    """Log-probs by text. Of several ids that decode alike, such as parts of one letter, the most probable is kept."""
    said: dict[str, float] = {}
    for token, logprob in top.items():
        text = tokenizer.decode([token])
        said[text] = max(logprob, said.get(text, logprob))
    return said
