"""Token ids in and out, as vLLM has them on the wire (`POST /inference/v1/generate`). Host, no jax.

What vLLM does not know stands in `sampling_params.extra_args["rljax"]` of a request, which it ignores: the names of the
random numbers, and where a fork begins. An answer says entropies, and why a turn ended, under `rljax` in its choice.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.rollouts.http_server import ApiError
from rljax.sampling import PromptScores, Sample
from rljax.sampling.logits import MASKED

OWN = "rljax"
"""The key of what vLLM does not know."""
LARGEST_ID = 2**31 - 1

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # what would change what is sampled or said, and the values that do not
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_tokens": (0,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "structured_outputs": (),
    "trace_decode_token_ids": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "watermarking": (False,),
}
_KNOWN = {
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "max_tokens",
    "logprobs",
    "prompt_logprobs",
}
# Of the text and of streams, of which there are none here.
_WITHOUT_EFFECT = {
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "output_kind",
    "flat_logprobs",
    "extra_args",
    "skip_reading_prefix_cache",
}
_OWN_FIELDS = {"seed": 0, "step": 0, "prompt_id": 0, "sample_id": 0, "begun": 0, "drawn": 0}


class GenerateRequest(NamedTuple):
    """A checked request for completions of one prompt."""

    request_id: str
    tokens: list[int]
    completions: int
    """How many of them."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    logit_bias: tuple[tuple[int, float], ...]
    """Ids and what is added to their logits."""
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    """Ids that end a completion, beside the model's own."""
    ignores_eos: bool
    """Whether the model's own do not."""
    limit: int | None
    """Most new tokens; None is as many as there is room for."""
    top: int
    """Most probable tokens that are told beside each."""
    prompt_top: int | None
    """The same of the prompt's tokens, which are scored; None scores none."""
    seed: int
    """Enters the random numbers, as do the next three."""
    step: int
    prompt_id: int
    sample_id: int
    """Of the first completion; the others count on."""
    begun: int
    """The last so many tokens belong to the completion: a stop string may begin in them."""
    drawn: int
    """Random numbers that were used up by those."""


def read_request(body: Any, *, new_seed: int) -> GenerateRequest:
    """Checks the JSON value of a request. `new_seed` is of one that names none. Raises ApiError for what is malformed,
    and for what is not served: a client must not believe that it was obeyed."""
    if not isinstance(body, dict):
        raise ApiError(f"the body is {_short(body)}; it must be a JSON object with the list 'token_ids'")
    for name in ("stream", "features", "content_parts", "kv_transfer_params", "ec_transfer_params"):
        if body.get(name):
            raise _unserved(name, body[name], ())
    if body.get("output_mode", "tokens") != "tokens":
        raise _unserved("output_mode", body["output_mode"], ("tokens",))

    tokens = _ids("token_ids", body.get("token_ids"))
    if not tokens:
        raise ApiError("token_ids is empty; a model needs at least one token to go on from", param="token_ids")

    given = body.get("sampling_params")
    if not isinstance(given, dict):
        raise ApiError(f"sampling_params is {_short(given)}; it must be an object", param="sampling_params")
    for name, value in given.items():
        if name in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[name]:
                raise _unserved(f"sampling_params.{name}", value, _NEUTRAL[name])
        elif name not in _KNOWN and name not in _WITHOUT_EFFECT:
            raise _unserved(f"sampling_params.{name}", value, ())

    extra = given.get("extra_args") or {}
    if not isinstance(extra, dict):
        raise ApiError(f"extra_args is {_short(extra)}; it must be an object", param="extra_args")
    own = extra.get(OWN)
    if own is None:
        # One seed names one completion: it stands for a prompt, so that requests of many seeds go together.
        seed = given.get("seed")
        own = {"prompt_id": new_seed if seed is None else _seed(seed) % (LARGEST_ID + 1)}
    if not isinstance(own, dict) or (unknown := sorted(set(own) - set(_OWN_FIELDS))):
        what = own if not isinstance(own, dict) else unknown
        raise ApiError(f"extra_args.{OWN} has {_short(what)}; its fields are {', '.join(_OWN_FIELDS)}", param=OWN)
    own = {name: _whole(name, own.get(name, value)) for name, value in _OWN_FIELDS.items()}

    stop = given.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(f"stop is {_short(stop)}; it must be a text or a list of texts", param="stop")

    limit = given.get("max_tokens")
    scored = given.get("prompt_logprobs")
    top_k = _whole("top_k", given.get("top_k") or 0, least=-1)
    return GenerateRequest(
        request_id=str(body.get("request_id") or f"{new_seed:08x}"),
        tokens=tokens,
        completions=_whole("n", given.get("n", 1), least=1, most=4096),
        temperature=_number("temperature", given, 1.0),
        top_k=max(0, top_k),
        top_p=_number("top_p", given, 1.0),
        min_p=_number("min_p", given, 0.0),
        logit_bias=_biases(given.get("logit_bias") or {}),
        stop=tuple(stop),
        stop_tokens=tuple(_ids("stop_token_ids", given.get("stop_token_ids") or [])),
        ignores_eos=bool(given.get("ignore_eos")),
        limit=None if limit is None else _whole("max_tokens", limit, least=1),
        top=_whole("logprobs", given.get("logprobs") or 0, most=100),
        prompt_top=None if scored is None else _whole("prompt_logprobs", scored, most=100),
        **own,
    )


def write_request(
    tokens: Sequence[int],
    *,
    limit: int,
    sampling: Mapping[str, Any],
    stop_tokens: Sequence[int],
    own: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """The body of a request for one completion. `seed` is for engines that do not know `own`."""
    return {
        "token_ids": [int(token) for token in tokens],
        "sampling_params": {
            **sampling,
            "n": 1,
            "max_tokens": limit,
            # What ends a completion is the trainer's own list, whatever the engine takes for the model's.
            "stop_token_ids": [int(token) for token in stop_tokens],
            "ignore_eos": True,
            "logprobs": 0,
            "seed": seed,
            "detokenize": False,
            "extra_args": {OWN: dict(own)},
        },
    }


def write_choice(
    index: int, sample: Sample, *, stop_reason: int | str | None, version: str, top: int = 0
) -> dict[str, Any]:
    """A completion as vLLM has it, with the `top` most probable tokens beside each, and what it does not say."""
    best: list[list[dict[str, Any]]] = [[] for _ in sample.tokens]
    if top and sample.top_tokens is not None and sample.top_logprobs is not None:
        pairs = zip(sample.top_tokens[:, :top].tolist(), sample.top_logprobs[:, :top].tolist(), strict=True)
        best = [
            [
                {"token_id": token, "logprob": logprob, "rank": rank}
                for rank, (token, logprob) in enumerate(zip(*one, strict=True), 1)
                if logprob > MASKED / 2
            ]
            for one in pairs
        ]
    content = [
        {"token_id": token, "logprob": logprob, "rank": None, "top_logprobs": tops}
        for token, logprob, tops in zip(sample.tokens.tolist(), map(float, sample.logprobs), best, strict=True)
    ]
    return {
        "index": index,
        "finish_reason": "length" if sample.finish_reason == "length" else "stop",
        "stop_reason": stop_reason,
        "token_ids": sample.tokens.tolist(),
        "logprobs": {"content": content},
        "weight_versions": [{"version": version, "start": 0, "end": len(content)}],
        OWN: {"entropies": list(map(float, sample.entropies))},
    }


def write_scores(tokens: Sequence[int], scores: PromptScores, top: int) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has them: for each token of a prompt its log-prob and rank, and those of the `top` most
    probable ones of its place, by id. Nothing precedes the first, which has None."""
    said: list[dict[str, Any] | None] = [None]
    of_tokens = zip(tokens[1:], *(np.asarray(x).tolist() for x in scores), strict=True)
    for token, logprob, rank, ids, best in of_tokens:
        entry = {
            str(other): {"logprob": value, "rank": place, "decoded_token": None}
            for place, (other, value) in enumerate(zip(ids[:top], best[:top], strict=True), 1)
            if value > MASKED / 2
        }
        # The token itself, also among the best: of equal ones it keeps its own rank.
        entry.setdefault(str(int(token)), {"logprob": logprob, "rank": rank, "decoded_token": None})
        said.append(entry)
    return said


class Said(NamedTuple):
    """A completion that an engine answered."""

    tokens: np.ndarray
    """int32 [T]."""
    logprobs: np.ndarray
    """float32 [T], nats."""
    entropies: np.ndarray
    """float32 [T], nats; NaN of an engine that does not say."""
    finish_reason: str
    """`stop`, `length` or `abort`."""
    version: str | None
    """Of the weights; None where the engine does not say, and for several empty."""

    def until(self, length: int) -> "Said":
        """The first `length` tokens."""
        cut = {name: getattr(self, name)[:length] for name in ("tokens", "logprobs", "entropies")}
        return self._replace(**cut)


def read_answer(body: Any) -> Said:
    """ValueError for what is no answer of one completion with log-probs."""
    try:
        (choice,) = body["choices"]
        tokens = np.array(choice["token_ids"], np.int32).reshape(-1)
        content = (choice.get("logprobs") or {}).get("content") or []
        logprobs = np.array([entry["logprob"] for entry in content], np.float32)
        entropies = (choice.get(OWN) or {}).get("entropies")
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"{_short(body)} is no answer with ids and log-probs ({error!r})") from None
    said = [entry.get("token_id") for entry in content]
    if said != tokens.tolist():
        raise ValueError(f"its log-probs are of {_short(said)}, and its tokens {_short(tokens.tolist())}")

    return Said(
        tokens=tokens,
        logprobs=logprobs,
        entropies=np.full(len(tokens), np.nan, np.float32) if entropies is None else np.array(entropies, np.float32),
        finish_reason=str(choice.get("finish_reason")),
        version=None if not versions else versions.pop() if len(versions) == 1 else "",
    )


def _unserved(name: str, value: Any, allowed: Sequence[Any]) -> ApiError:
    others = f", or send {' or '.join(map(_short, allowed))}" if allowed else ""
    return ApiError(f"{name}={_short(value)} is not served; leave it out{others}", code="unsupported_value", param=name)


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(x) is int and 0 <= x <= LARGEST_ID for x in value):
        raise ApiError(f"{name} is {_short(value)}; it must be a list of token ids", param=name)
    return value


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """By id. JSON has texts for keys."""
    if not isinstance(value, dict) or not all(re.fullmatch("[0-9]{1,10}", str(name)) for name in value):
        what = f"logit_bias is {_short(value)}; it must be an object of numbers by token id"
        raise ApiError(what, param="logit_bias")
    return tuple((int(name), _bias(f"logit_bias[{name}]", number)) for name, number in sorted(value.items()))


def _bias(name: str, value: Any) -> float:
    # Ours bans so; what vLLM makes of it, -100, is no ban to the last bit.
    is_ban = type(value) in (int, float) and value == MASKED
    return MASKED if is_ban else _number(name, {name: value}, 0.0)


def _seed(value: Any) -> int:
    """Clients send whatever whole number they have, below 0 and beyond 64 bits too."""
    if type(value) is not int:
        raise ApiError(f"seed is {_short(value)}; it must be a whole number", param="seed")
    return value


def _whole(name: str, value: Any, *, least: int = 0, most: int = LARGEST_ID) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ApiError(f"{name} is {_short(value)}; it must be a whole number from {least} to {most}", param=name)
    return value


def _number(name: str, given: Mapping[str, Any], default: float) -> float:
    value = given.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not abs(value) < 1e9 or not math.isfinite(value):
        raise ApiError(f"{name} is {_short(value)}; it must be a number", param=name)
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
