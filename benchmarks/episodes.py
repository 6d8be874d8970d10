"""Episodes with slow tools: how busy the decoder is, and what waiting for a whole batch would cost.

    python benchmarks/episodes.py --preset=full --json=episodes.json

All episodes are under way at once; each has four turns of random length and, between them, a tool that takes 50 ms.
`decoder_busy_share` is the share of the wall time in which the decoder works. `vs_turn_synchronous` is the time of
the same turns in batches of as many episodes as there are rows, each decoded until its longest turn is done and then
sent to the tools together, over ours; `vs_barrier` that of a form in between, whose rows take new turns as they fall
free, but whose tools run once the last turn of all is done. All three use one decoder and keep all keys and values.
`prefill_share` is what was computed before decoding over the tokens that prompts and tools brought (1 is no more than
they did), `reused_share` the share of the context of all turns that did not have to be computed again.

`small` is a tiny model, `full` the 57.9M Llama in float32, `gpu` a Qwen3-0.6B shape in bfloat16.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from _common import finish, machine, parse_arguments, setting_of, write_model
from _probe import probe

from rljax.envs import EnvironmentPool, Step
from rljax.models import load_model
from rljax.plans import RolloutPlan
from rljax.rollouts import MultiTurn, MultiTurnActor, RolloutSettings, number_groups
from rljax.sampling import Stops, Turn, TurnDecoder, TurnDecoderSpec, compile_count, sampling_params
from rljax.tasks import Example
from rljax.text import Dialogue

SIZES = {
    "smoke": dict(episodes=4, rows=2, prompt=8, observation=4, mean=4, longest=8, check=2),
    "small": dict(episodes=32, rows=8, prompt=32, observation=12, mean=12, longest=48, check=4),
    "full": dict(episodes=256, rows=32, prompt=64, observation=16, mean=16, longest=64, check=8),
    "gpu": dict(episodes=256, rows=128, prompt=512, observation=128, mean=128, longest=512, check=16),
}
TURNS, TOOL_SECONDS = 4, 0.05


class Words:
    """A tokenizer of numbers: the text of a token is its id. `stop_ids` end a turn of mean length `mean` when tokens
    are drawn from nearly equal probabilities."""

    def __init__(self, vocab_size: int, mean: int):
        self.vocab_size, self.bos_id, self.eos_id, self.pad_id = vocab_size, None, 0, 0
        self.stop_ids = tuple(range(max(1, vocab_size // mean)))
        self.has_chat_template = False

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def apply_chat_template(self, messages, add_generation_prompt=True):
        raise ValueError("numbers have no chat template")

    def save(self, folder):
        raise ValueError("numbers are not saved")


class SlowTool:
    """Four turns; the tool takes its time and answers with so many tokens."""

    def reset(self, row):
        self._turns, self._row = 0, row
        return row["prompt"]

    def step(self, action):
        time.sleep(TOOL_SECONDS)
        self._turns += 1
        return Step(observation(self._row, self._turns), 1.0, self._turns == TURNS)


def observation(row, turn: int) -> str:
    rng = np.random.default_rng([row["number"], turn])
    return " ".join(map(str, rng.integers(row["low"], row["high"], row["length"])))


def examples(size, words: Words) -> list[Example]:
    low, high = len(words.stop_ids), words.vocab_size
    made = []
    for i in range(size["episodes"]):
        prompt = np.random.default_rng([7, i]).integers(low, high, size["prompt"])
        columns = {"number": i, "low": low, "high": high, "length": size["observation"]}
        made.append(Example(" ".join(map(str, prompt)), columns))
    return made


def ours(decoder: TurnDecoder, pool: EnvironmentPool, rows: list[Example], words: Words) -> dict[str, float]:
    settings = RolloutSettings(seed=0, sampling=sampling_params())
    actor = MultiTurnActor([decoder], pool, Dialogue(words), settings, MultiTurn())
    decoder.forget()
    begin = time.perf_counter()
    actor.submit(number_groups(rows, 1), RolloutPlan(group_size=1), 0)
    groups = actor.ready(len(rows))
    seconds = time.perf_counter() - begin
    turns = [len(np.unique(s.turns[s.sampled])) for g in groups for s in g.samples]
    brought = sum(len(g.prompt) - 1 + int((~s.sampled).sum()) for g in groups for s in g.samples)
    tokens = int(sum(s.sampled.sum() for g in groups for s in g.samples))
    stats = actor.stats
    return {
        "seconds": seconds,
        "tokens": tokens,
        "turns": sum(turns),
        "busy": stats["busy_share"],
        "occupancy": stats["row_occupancy"],
        "reused": stats["reused_share"],
        "prefill": stats["prefill_tokens"] / brought,
    }


def synchronous(decoder: TurnDecoder, rows: list[Example], words: Words, batch: int) -> dict[str, float]:
    """The same turns, `batch` at a time: all of them decoded, then all of their tools."""
    decoder.forget()
    decoder.begin(sampling_params(), seed=0, step=0)
    contexts = [words.encode(example.prompt) for example in rows]
    begin = time.perf_counter()
    tokens = count = 0
    with ThreadPoolExecutor(len(rows)) as tools:
        for turn in range(TURNS):
            for start in range(0, len(rows), batch):
                chosen = range(start, min(start + batch, len(rows)))
                for i in chosen:
                    if contexts[i] is not None:
                        decoder.submit(Turn(i, contexts[i], rows[i].id, 0, turn))
                spoken = []
                while decoder.num_open:
                    spoken += decoder.run()
                alive = [said for said in spoken if said.end != "length"]
                list(tools.map(lambda _: time.sleep(TOOL_SECONDS), alive))
                tokens += sum(len(said.tokens) for said in spoken)
                count += len(spoken)
                for said in spoken:
                    i = said.turn.conversation
                    done = said.end == "length"
                    row = {**rows[i].columns}
                    back = [] if done else words.encode(observation(row, turn + 1))
                    contexts[i] = None if done else contexts[i] + said.tokens.tolist() + back
    return {"seconds": time.perf_counter() - begin, "tokens": tokens, "turns": count}


def main() -> None:
    arguments = parse_arguments(__doc__.splitlines()[0], rivals=())
    size, shape, dtype = setting_of(arguments.preset, SIZES)
    quick = arguments.preset == "smoke"
    probes = [probe(dtype, quick)]
    config, params = load_model(write_model(shape), dtype=dtype, param_dtype=dtype)
    words = Words(shape["vocab_size"], size["mean"])
    rows = examples(size, words)
    spec = TurnDecoderSpec(
        conversations=size["episodes"],
        rows=size["rows"],
        context_length=size["prompt"] + TURNS * (size["longest"] + size["observation"]),
        max_new_tokens=size["longest"],
        prefill_chunks=(size["observation"] + 8, size["prompt"]),
        check_every=size["check"],
    )
    decoder = TurnDecoder(config, spec, Stops(words.stop_ids))
    decoder.set_params(params)
    decoder.begin(sampling_params(), seed=0, step=0)
    decoder.warmup()
    compiled = compile_count()
    found: dict[str, list[dict[str, float]]] = {"ours": [], "turn-synchronous": [], "barrier": []}
    with EnvironmentPool(SlowTool, workers=size["episodes"]) as pool:
        for repeat in range(arguments.repeats):
            found["ours"].append(ours(decoder, pool, rows, words))
            found["turn-synchronous"].append(synchronous(decoder, rows, words, size["rows"]))
            found["barrier"].append(synchronous(decoder, rows, words, len(rows)))
            print(f"round {repeat + 1}: " + ", ".join(f"{k} {v[-1]['seconds']:.1f} s" for k, v in found.items()))
    compiled = compile_count() - compiled
    probes.append(probe(dtype, quick))
    results = [
        {
            "name": name,
            "seconds": statistics.median(run["seconds"] for run in runs),
            "all_seconds": [run["seconds"] for run in runs],
            **{key: runs[0][key] for key in runs[0] if key != "seconds"},
        }
        for name, runs in found.items()
    ]

    def over_ours(name: str) -> float:
        return statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found[name], strict=True))

    middle = {key: statistics.median(run[key] for run in found["ours"]) for key in ("busy", "reused", "prefill")}
    ratios: dict[str, float | None] = {
        "decoder_busy_share": middle["busy"],
        "vs_turn_synchronous": over_ours("turn-synchronous"),
        "vs_barrier": over_ours("barrier"),
        "prefill_share": middle["prefill"],
        "reused_share": middle["reused"],
        "compiles_after_warmup": compiled,
    }
    setting = {"model": shape, "dtype": dtype, "turns": TURNS, "tool_seconds": TOOL_SECONDS, **size}
    finish("episodes", arguments, machine(probes), setting, results, ratios)


if __name__ == "__main__":
    main()
