"""What the benchmarks share: settings, interleaved measuring, the machine's limits, tables and JSON."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _environments import CORES, HOME, Missing, Worker, allocator

SETTING_A = {
    "family": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
}
TINY = SETTING_A | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}
SMOKE = TINY | {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 128,
}
QWEN3_0P6B = SETTING_A | {
    "family": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
QWEN3_TINY = QWEN3_0P6B | {k: TINY[k] for k in TINY if k not in ("family", "tie_word_embeddings", "rope_theta")}

BOS = 1  # every prompt starts with it: some samplers insert it otherwise


def parse_arguments(
    description: str, *, rivals: Sequence[str], presets: Sequence[str] = ("smoke", "small", "full", "gpu")
):
    """`--preset`, `--json`, `--repeats`, `--rivals` (default: all of the full preset's, none of small's). `smoke` is
    the smallest form, to see that a script works; its times say nothing, and everything is timed once."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    if rivals:
        parser.add_argument("--rivals", help=f"comma-separated, of {', '.join(rivals)}; 'none' for none")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of everything; medians are reported")
    arguments = parser.parse_args()
    if arguments.preset == "smoke":
        arguments.repeats = 1
    elif arguments.repeats < 3:
        parser.error(f"--repeats={arguments.repeats} must be at least 3: a median needs them")
    if rivals:
        default = {"smoke": (), "small": (), "full": rivals, "gpu": ("hf_here",)}[arguments.preset]
        text = arguments.rivals
        chosen = default if text is None else () if text == "none" else tuple(text.split(","))
        if unknown := sorted(set(chosen) - {*rivals, "hf_here"}):
            parser.error(f"--rivals: {unknown[0]!r} is not one of {', '.join(rivals)}")
        arguments.rivals = chosen
    return arguments


def has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def on_gpu(preset: str) -> bool:
    """Whether a preset is the one for a GPU, and there is one."""
    return preset == "gpu" and has_gpu()


def setting_of(preset: str, sizes: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """(entry of `sizes`, shape of the model, dtype) of a preset. Without a GPU `gpu` is a small form of itself."""
    real = on_gpu(preset)
    shapes = {"smoke": SMOKE, "small": TINY, "full": SETTING_A, "gpu": QWEN3_0P6B if real else QWEN3_TINY}
    size = sizes["small" if preset == "gpu" and not real else preset]
    return size, shapes[preset], "bfloat16" if preset == "gpu" else "float32"


def character_model(alphabet: str, size: Mapping[str, Any], **changes: Any) -> Any:
    """The config of an untrained model over `alphabet` with the `layers` and the `width` of a size."""
    from rljax.experiment import FreshModel

    return FreshModel(
        alphabet=alphabet,
        num_layers=size["layers"],
        embed_dim=size["width"],
        num_heads=4,
        num_kv_heads=2,
        head_dim=size["width"] // 4,
        mlp_dim=2 * size["width"],
        **changes,
    )


def short_updates(**changes: Any) -> Any:
    """The config of updates by completions of a few dozen tokens, one bucket wherever one will do."""
    from rljax.experiment import UpdateConfig

    shapes = {"length_buckets": (128,), "score_buckets": (128,), "row_buckets": (64,), "compile_ahead": 1}
    return UpdateConfig(pack_length=128, head_chunk=256, **shapes, **changes)


def write_model(shape: Mapping[str, Any]) -> str:
    """A Hugging Face folder of random weights (seed 0, scale 0.02), kept under the benchmarks' home."""
    from safetensors.numpy import save_file

    name = "-".join(str(shape[k]) for k in ("family", "num_hidden_layers", "hidden_size", "vocab_size"))
    folder = HOME / "models" / name
    config = hf_config(shape)
    done = folder / "config.json"
    if done.exists() and json.loads(done.read_text()) == config:
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    sizes = tensor_shapes(shape)
    tensors = {
        k: np.ones(s, np.float32) if len(s) == 1 else rng.standard_normal(s, dtype=np.float32) * np.float32(0.02)
        for k, s in sizes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done.write_text(json.dumps(config, indent=1))
    return str(folder)


def tensor_shapes(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors as Hugging Face stores them."""
    d, f, hd = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    q, kv = shape["num_attention_heads"] * hd, shape["num_key_value_heads"] * hd
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    if not shape["tie_word_embeddings"]:
        out["lm_head.weight"] = (shape["vocab_size"], d)
    for i in range(shape["num_hidden_layers"]):
        at = f"model.layers.{i}."
        out |= {
            f"{at}input_layernorm.weight": (d,),
            f"{at}post_attention_layernorm.weight": (d,),
            f"{at}self_attn.q_proj.weight": (q, d),
            f"{at}self_attn.k_proj.weight": (kv, d),
            f"{at}self_attn.v_proj.weight": (kv, d),
            f"{at}self_attn.o_proj.weight": (d, q),
            f"{at}mlp.gate_proj.weight": (f, d),
            f"{at}mlp.up_proj.weight": (f, d),
            f"{at}mlp.down_proj.weight": (d, f),
        }
        if shape["family"] == "qwen3":
            out |= {f"{at}self_attn.q_norm.weight": (hd,), f"{at}self_attn.k_norm.weight": (hd,)}
    return out


def hf_config(shape: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a shape."""
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    rest = {k: v for k, v in shape.items() if k != "family"}
    return rest | {
        "architectures": [names[shape["family"]]],
        "model_type": shape["family"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def random_prompts(shape: Mapping[str, Any], count: int, length: int, seed: int) -> list[list[int]]:
    rows = np.random.default_rng(seed).integers(3, shape["vocab_size"], (count, length))
    rows[:, 0] = BOS
    return rows.tolist()


class Measurements:
    """Seconds per (worker, task), and what kept a rival away."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}
        self.answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.first: dict[tuple[str, str], float] = {}
        self.versions: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    def median(self, worker: str, task: str) -> float | None:
        values = self.seconds.get((worker, task))
        return statistics.median(values) if values else None

    def ratio(self, rival: str, ours: float | None, *tasks: str) -> float | None:
        """The rival's time, of its fastest form in `tasks`, over ours."""
        times = [t for task in tasks if (t := self.median(rival, task)) is not None]
        return min(times) / ours if times and ours else None


def measure(
    jobs: Mapping[str, Mapping[str, Any]], tasks: Mapping[str, Sequence[str]], repeats: int
) -> tuple[Measurements, dict[str, Any]]:
    """Runs every worker of `jobs` on its `tasks`: once untimed, then `repeats` rounds, all workers in every round.

    Also probes the machine before and after, in our own worker. One round alone is not there for its times: then the
    probe is quick, and nothing waits. Returns (measurements, machine).
    """
    found = Measurements()
    quick = repeats == 1
    with tempfile.TemporaryDirectory() as folder:
        workers: dict[str, Worker] = {}
        try:
            for name, job in jobs.items():
                try:
                    print(f"[{name}] starting", flush=True)
                    worker = workers[name] = Worker(name, {**job, "quick": quick}, Path(folder), job.get("variables"))
                    found.versions[name] = {k: v for k, v in worker.about.items() if k != "ready"}
                    for task in tasks[name]:
                        answer = worker.run(task)
                        print(f"  {task}, {name}: first call {answer['seconds']:.3g} s", flush=True)
                        found.first[name, task] = answer["seconds"]
                        found.answers[name, task] = [answer]
                except Missing as reason:
                    _drop(found, workers, name, reason)
            if "rljax" not in workers:
                sys.exit("our own worker failed: " + found.missing["rljax"])
            probes = [workers["rljax"].run("probe")]
            for i in range(repeats):
                print(f"round {i + 1} of {repeats}", flush=True)
                _round(found, workers, tasks, rest=0.0 if quick else 0.3)
            probes.append(workers["rljax"].run("probe"))
        finally:
            for worker in workers.values():
                worker.close()
    return found, machine(probes)


def _round(found: Measurements, workers: dict[str, Worker], tasks: Mapping[str, Sequence[str]], rest: float) -> None:
    """Every task once, its workers one after another, `rest` seconds before each."""
    for task in dict.fromkeys(t for name in workers for t in tasks[name]):
        for name in [name for name in workers if task in tasks[name]]:
            time.sleep(rest)  # thread pools of the last one stop spinning
            try:
                answer = workers[name].run(task)
            except Missing as reason:
                _drop(found, workers, name, reason)
                continue
            print(f"  {task}, {name}: {answer['seconds']:.3g} s", flush=True)
            found.seconds.setdefault((name, task), []).append(answer["seconds"])
            found.answers[name, task].append(answer)


def _drop(found: Measurements, workers: dict[str, Worker], name: str, reason: Missing) -> None:
    """The rival takes no further part; the log's last lines go along, since the folder does not stay."""
    worker = workers.pop(name, None)
    text = str(reason)
    log = Path(text.rsplit("see ", 1)[-1]) if "see " in text else None
    if log is not None and log.exists():
        text += "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    if worker is not None:
        worker.close()
    found.missing[name] = text
    print(f"[{name}] missing: {text}", flush=True)


def machine(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the numbers were taken on; rates are the best of the probes."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    preloaded = allocator()
    return {
        "cpu": cpu,
        "cores": CORES,
        "device": probes[0]["device"],
        "python": platform.python_version(),
        "allocator": Path(preloaded).name if preloaded else "system",
        "load_average_at_end": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "matmul_gflops": max(p["matmul_gflops"] for p in probes),
        "read_gbs": max(p["read_gbs"] for p in probes),
        "matmul_dtype": probes[0]["matmul_dtype"],
    }


class Cost:
    """Floating-point operations and bytes that the mathematics asks for, whatever the implementation."""

    def __init__(self, shape: Mapping[str, Any], bytes_per_value: int):
        sizes = tensor_shapes(shape)
        self.layers = sum(int(np.prod(s)) for k, s in sizes.items() if ".layers." in k and len(s) == 2)
        self.head = shape["vocab_size"] * shape["hidden_size"]
        self.params = sum(int(np.prod(s)) for s in sizes.values())
        self.attention = 4 * shape["num_attention_heads"] * shape["head_dim"] * shape["num_hidden_layers"]
        self.kv_bytes = (
            2 * shape["num_key_value_heads"] * shape["head_dim"] * shape["num_hidden_layers"] * bytes_per_value
        )
        self.width = bytes_per_value

    def forward_flops(self, tokens: int, visible: float, scored: int) -> float:
        """`visible` counts the (query, key) pairs, `scored` the tokens that the vocabulary head runs on."""
        return 2 * self.layers * tokens + self.attention * visible + 2 * self.head * scored

    def step_seconds(self, rows: int, prompts: int, prompt: int, context: float, host: Mapping[str, Any]) -> float:
        """One decoding step: `rows` tokens, each seeing `prompt` shared and `context` own positions."""
        flops = self.forward_flops(rows, rows * (prompt + context), rows)
        read = self.width * (self.layers + self.head) + self.kv_bytes * (prompts * prompt + rows * context)
        return max(flops / host["matmul_gflops"], read / host["read_gbs"]) / 1e9

    def update_seconds(self, tokens: int, visible: float, scored: int, host: Mapping[str, Any]) -> float:
        """Forward, backward and Adam, which reads four values a weight and writes three (float32)."""
        compute = 3 * self.forward_flops(tokens, visible, scored) / host["matmul_gflops"]
        return (compute + 7 * 4 * self.params / host["read_gbs"]) / 1e9


def result(found: Measurements, worker: str, task: str, **extra: Any) -> dict[str, Any] | None:
    """One line of `results`, None where the worker did not run. `tokens` and `limit_seconds` add rates and shares."""
    seconds = found.median(worker, task)
    if seconds is None:
        return None
    line = {
        "name": task,
        "who": worker,
        "seconds": seconds,
        "all_seconds": found.seconds[worker, task],
        "cpu_seconds": statistics.median(a["cpu_seconds"] for a in found.answers[worker, task][1:]),
        "first_call_seconds": found.first[worker, task],
        **extra,
    }
    if "tokens" in extra:
        line["tokens_per_second"] = extra["tokens"] / seconds
    if "limit_seconds" in extra:
        line["share_of_limit"] = extra["limit_seconds"] / seconds
    return line


COLUMNS = {
    "name": "task",
    "who": "who",
    "seconds": "median s",
    "tokens_per_second": "tokens/s",
    "limit_seconds": "limit s",
    "share_of_limit": "share",
    "first_call_seconds": "first call s",
}


def print_table(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS) -> None:
    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
        return "" if value is None else str(value)

    cells = [list(columns.values()), *([show(line.get(k)) for k in columns] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())


def finish(
    benchmark: str,
    arguments: argparse.Namespace,
    host: Mapping[str, Any],
    setting: Mapping[str, Any],
    results: Sequence[Mapping[str, Any] | None],
    ratios: Mapping[str, float | None],
    missing: Mapping[str, str] | None = None,
) -> None:
    """Prints the table, the ratios and what is missing; writes the JSON."""
    lines = [line for line in results if line is not None]
    known = {name: value for name, value in ratios.items() if value is not None}
    print()
    print_table(lines, COLUMNS if any("who" in line for line in lines) else {"name": "what", "value": "value"})
    print(
        f"\nlimit: {host['matmul_gflops']:.0f} GFLOP/s of {host['matmul_dtype']} matrix products and "
        f"{host['read_gbs']:.1f} GB/s read, measured on {host['device']}; {host['cores']} cores, {host['cpu']}, "
        f"allocator {host['allocator']}"
    )
    for name, value in known.items():
        print(f"{name}: {value:.3g}")
    for name in ratios.keys() - known.keys():
        print(f"{name}: not measured")
    for name, reason in (missing or {}).items():
        print(f"{name} is missing: {reason.splitlines()[0]}")
    if arguments.json:
        report = {
            "benchmark": benchmark,
            "machine": dict(host),
            "setting": {"preset": arguments.preset, "repeats": arguments.repeats, **setting},
            "results": lines,
            "ratios": known,
        }
        if missing:
            report["missing"] = dict(missing)
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
