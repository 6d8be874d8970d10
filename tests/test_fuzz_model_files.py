"""Whatever bytes a model's file holds: it is read, or refused by a ValueError of one line that names the file, soon and
without memory that the file could not fill."""

import dataclasses
import itertools
import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rljax.gguf_header import read_gguf_header
from rljax.models import (
    DecoderConfig,
    Lora,
    described_adapter,
    load_config,
    load_hf,
    load_model,
    load_peft,
    read_lora,
)
from rljax.models.families import config_to_hf, entries
from rljax.models.files import SafetensorsFolder, write_safetensors
from rljax.models.peft import adapter_entries
from rljax.text import load_tokenizer

FUZZ = settings(deadline=5000, max_examples=60, suppress_health_check=list(HealthCheck))
WHOLE = settings(FUZZ, max_examples=25)
"""For what loads a model."""
MOST_BYTES = 32 << 20
"""What reading a file of some kilobytes may take at most, imports apart."""
TINY = DecoderConfig(vocab_size=8, num_layers=1, embed_dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=4)


def refuses_or_reads(read, path):
    """Calls `read(path)`; a refusal is a ValueError of one line, of bounded length, that names the path."""
    tracemalloc.start()
    try:
        read(path)
    except ValueError as error:
        assert type(error) in (ValueError, UnicodeDecodeError)
        assert str(path) in str(error), error
        assert "\n" not in str(error) and len(str(error)) < 2000, error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MOST_BYTES


# numbers that are wrong in ways of their own: signs, wraps, the end of a file
NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def edited(content: bytes, edits, keep: int) -> bytes:
    """`content` with bytes overwritten at places, cut to the share `keep` / 100."""
    changed = bytearray(content)
    for place, piece in edits:
        at = place % max(1, len(changed))
        changed[at : at + len(piece)] = piece
    return bytes(changed[: len(changed) * keep // 100])


# safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound model folder, whose tensors are written anew by every test."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(config_to_hf(TINY)))
    return path


def sound_safetensors(path) -> bytes:
    named = {entry.name: entry for entry in entries(TINY)}
    declared = {name: (np.dtype(np.float32), entry.shape) for name, entry in named.items()}
    write_safetensors(path, declared, lambda name: np.zeros(named[name].shape, np.float32))
    return path.read_bytes()


JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F64", "I8", "F33", ""]) | JSON,
        "shape": st.lists(NUMBERS, max_size=3) | JSON,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | JSON,
    },
)
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "__metadata__", "x\ny"]) | st.text(max_size=5), ROWS | JSON)


@FUZZ
@given(header=HEADERS | JSON, data=st.binary(max_size=32), length=st.none() | NUMBERS)
def test_any_header_of_safetensors(folder, header, data, length):
    text = json.dumps(header).encode()
    length = len(text) if length is None else max(length, 0)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + data)
    refuses_or_reads(SafetensorsFolder, folder)


@FUZZ
@given(content=st.binary(max_size=64))
@example(b"")
@example(b"\x02\0\0\0\0\0\0\0{}")
@example(struct.pack("<Q", 5000) + b"[" * 5000)
@example(struct.pack("<Q", 5000) + b'{"a":' * 1000)
def test_any_bytes_as_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refuses_or_reads(SafetensorsFolder, folder)


@WHOLE
@given(edits=EDITS, keep=st.sampled_from([100, 100, 99, 60, 5]))
def test_a_damaged_model_of_safetensors(folder, edits, keep):
    file = folder / "model.safetensors"
    file.write_bytes(edited(sound_safetensors(file), edits, keep))
    refuses_or_reads(load_hf, folder)


@FUZZ
@given(weight_map=st.dictionaries(st.text(max_size=3), st.text(max_size=6) | JSON, max_size=3) | JSON)
@example({"a": "."})
@example({"a": ".."})
@example({"a": "model.safetensors\0"})
@example({"a": "\n"})
@example({"a": "\ud800"})
@example({"a": "x" * 300})
@example({"a": "你" * 200})
def test_any_index_of_safetensors(folder, weight_map):
    sound_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    try:
        refuses_or_reads(SafetensorsFolder, folder)
    finally:
        index.unlink()


KEYS = sorted(
    [*config_to_hf(TINY), "rope_scaling", "layer_types", "use_sliding_window", "torch_dtype", "sliding_window"]
)


@FUZZ
@given(
    family=st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    rope=st.dictionaries(
        st.sampled_from(["rope_type", "factor", "rope_theta", "low_freq_factor", "original_max_position_embeddings"]),
        NUMBERS | JSON | st.sampled_from(["yarn", "linear", "llama3", "dynamic"]),
    ),
)
@example("llama", {"rope_theta": None}, {})
@example("llama", {"rms_norm_eps": 10**400}, {})
@example("qwen2", {"use_sliding_window": True, "num_hidden_layers": 2**40, "sliding_window": 4}, {})
def test_any_config_json(folder, family, changes, rope):
    config = config_to_hf(TINY) | {"model_type": family, "architectures": None, "rope_parameters": rope} | changes
    (folder / "config.json").write_text(json.dumps(config))
    try:
        refuses_or_reads(load_config, folder)
    finally:
        (folder / "config.json").write_text(json.dumps(config_to_hf(TINY)))


# adapters of PEFT

ADAPTED = dataclasses.replace(TINY, lora=Lora(rank=2, alpha=3.0, targets=("q", "down")))
ADAPTER = described_adapter(ADAPTED)
STORED = {entry.name: entry.shape for entry in adapter_entries(ADAPTED)}
# What is here taken for granted of each key, by what PEFT 0.21 does with it; of any other, nothing may come.
HARMLESS = {
    "bias": ["none"],
    "fan_in_fan_out": [False],
    "use_dora": [False, True],
    "use_qalora": [False, None],
    "lora_bias": [False],
    "modules_to_save": [None, []],
    "layers_to_transform": [None, []],
    "rank_pattern": [None, {}],
    "alpha_pattern": [None, {}],
    "layer_replication": [None, []],
    "target_parameters": [None, []],
    "trainable_token_indices": [None, [], {}],
    "alora_invocation_tokens": [None, [], {}],
    "init_lora_weights": [True, False, None, "gaussian", "eva", "orthogonal", "mica"],
    "peft_type": ["LORA"],
}
SAID = {name: JSON | st.sampled_from(values) for name, values in HARMLESS.items()} | {
    "r": NUMBERS | JSON | st.sampled_from([2, 2.0, True, 10**400]),
    "lora_alpha": NUMBERS | JSON | st.floats() | st.sampled_from([10**400, 1e39, True, "3", 0.5]),
    "use_rslora": st.booleans() | JSON,
    "target_modules": st.lists(
        st.sampled_from(["q_proj", "mlp.down_proj", "up_proj", "lm_head", "x" * 9000, "\n"]), max_size=3
    )
    | st.sampled_from([".*proj", "all-linear"])
    | JSON,
    "exclude_modules": st.sampled_from([None, ["up_proj"]]) | JSON,
    "base_model_name_or_path": JSON | st.just("x" * 9000),
}


def write_adapter(folder, said, shapes) -> dict[str, np.ndarray]:
    """Writes a folder of PEFT; what it holds, by name. Shapes may be what no array can have."""
    (folder / "adapter_config.json").write_text(json.dumps(said))
    values = {name: np.arange(1, 1 + math.prod(shape), dtype=np.float32) for name, shape in shapes.items()}
    ends = list(itertools.accumulate(value.nbytes for value in values.values()))
    header = {
        name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [end - values[name].nbytes, end]}
        for name, end in zip(values, ends, strict=True)
    }
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for value in values.values())
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return values


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    # It is sound, and imports are done before memory is counted.
    write_adapter(folder, ADAPTER, STORED)
    assert read_lora(folder, TINY) == ADAPTED.lora
    load_peft(folder, ADAPTED)
    return folder


@settings(WHOLE, deadline=None)  # the first adapter of a shape may compile
@given(
    changes=st.lists(
        st.sampled_from(sorted(SAID)).flatmap(lambda name: st.tuples(st.just(name), SAID[name])), max_size=2
    ).map(dict),
    shapes=st.dictionaries(
        st.sampled_from([*STORED, "base_model.model.lm_head.lora_A.weight", "a\nb"]),
        st.none() | st.lists(st.integers(0, 5), max_size=3),
        max_size=1,
    ),
)
@example({}, {})
@example({"r": 2**62}, {})
@example({"r": 2**62}, {name: [2**62, 0] for name in STORED})
@example({"lora_alpha": float("nan")}, {})
@example({"lora_alpha": 1e300}, {})
@example({"lora_alpha": True}, {})
@example({"use_rslora": "false"}, {})
@example({"init_lora_weights": "pissa"}, {})
@example({"target_modules": ["q_proj", "down_proj", "up_proj"]}, {})
@example({"target_modules": "q_proj" * 9000}, {})
@example({"target_modules": {"q_proj": 1}}, {})
@example({"modules_to_save": ["x" * 9000]}, {})
@example({"alora_invocation_tokens": [1]}, {})
def test_any_adapter_of_peft(adapter, changes, shapes):
    said = ADAPTER | changes
    stored = {name: shape for name, shape in (STORED | shapes).items() if shape is not None}
    values = write_adapter(adapter, said, stored)
    found = []

    def read(folder):
        config = dataclasses.replace(TINY, lora=read_lora(folder, TINY))
        found.append((config.lora, load_peft(folder, config)))

    refuses_or_reads(read, adapter)
    if not found:
        assert changes or shapes
        return
    # All of it was read, and nothing stands there that would have made another product of it.
    ((lora, params),) = found
    assert (lora.rank, lora.targets) == (2, ("q", "down"))
    assert {name: tuple(shape) for name, shape in stored.items()} == STORED
    assert lora.alpha == said["lora_alpha"] > 0 and lora.rank_stabilized is said["use_rslora"]
    assert all(said[name] in values for name, values in HARMLESS.items() if name in said)
    for name, end in (("lora_A", "a"), ("lora_B", "b")):
        (full,) = (key for key in STORED if "q_proj" in key and name in key)
        np.testing.assert_array_equal(params["layers"][f"q_lora_{end}"][0], values[full].reshape(STORED[full]).T)


# GGUF

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}


def text(value: str, length: int | None = None) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def scalar(kind: int, value: float) -> bytes:
    return struct.pack("<I" + SCALARS[kind], kind, value)


def strings(values: list[str]) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def numbers(kind: int, values: list) -> bytes:
    return struct.pack(f"<IIQ{len(values)}{SCALARS[kind]}", 9, kind, len(values), *values)


KEYS_OF_MODEL = {
    "general.architecture": struct.pack("<I", 8) + text("llama"),
    "llama.block_count": scalar(4, 1),
    "llama.context_length": scalar(4, 2048),
    "llama.embedding_length": scalar(4, 4),
    "llama.feed_forward_length": scalar(4, 4),
    "llama.attention.head_count": scalar(4, 2),
    "llama.attention.head_count_kv": scalar(4, 1),
    "llama.attention.layer_norm_rms_epsilon": scalar(6, 1e-5),
    "llama.rope.freq_base": scalar(6, 1e4),
}
KEYS_OF_TOKENIZER = {
    "tokenizer.ggml.model": struct.pack("<I", 8) + text("gpt2"),
    "tokenizer.ggml.pre": struct.pack("<I", 8) + text("smollm"),
    "tokenizer.ggml.tokens": strings(["a", "b", "ab", "<s>", "</s>"]),
    "tokenizer.ggml.merges": strings(["a b"]),
    "tokenizer.ggml.scores": numbers(6, [0.0, 0.0, 0.0, 0.0, 0.0]),
    "tokenizer.ggml.token_type": numbers(5, [1, 1, 1, 3, 3]),
    "tokenizer.ggml.bos_token_id": scalar(4, 3),
    "tokenizer.ggml.eos_token_id": scalar(4, 4),
}
COUNTS = NUMBERS.filter(lambda n: 0 <= n < 2**64)
VALUES = st.one_of(
    st.builds(lambda kind, n: scalar(kind, n % 100), st.sampled_from(sorted(SCALARS)), NUMBERS),
    st.sampled_from([struct.pack("<If", 6, x) for x in (float("nan"), float("inf"), -1.0, 0.0)]),
    st.builds(
        lambda value, length: struct.pack("<I", 8) + text(value, length),
        st.text(max_size=5),
        st.none() | NUMBERS.filter(lambda n: 0 <= n < 2**64),
    ),
    st.builds(strings, st.lists(st.text(max_size=3), max_size=6)),
    st.builds(lambda values: numbers(5, values), st.lists(st.integers(-3, 9), max_size=6)),
    st.builds(
        lambda kind, n: struct.pack("<IIQ", 9, kind, n), st.integers(0, 14), NUMBERS.filter(lambda n: 0 <= n < 2**64)
    ),
    st.binary(max_size=12),
)


def gguf_file(keys: dict[str, bytes], table: list[tuple], data: bytes, counts=(None, None)) -> bytes:
    count = [len(table) if counts[0] is None else counts[0], len(keys) if counts[1] is None else counts[1]]
    out = b"GGUF" + struct.pack("<IQQ", 3, *count) + b"".join(text(key) + value for key, value in keys.items())
    for name, shape, kind, offset in table:
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def sound_gguf(keys=()) -> bytes:
    table = []
    offset = 0
    for entry in entries(TINY, "gguf"):
        table.append((entry.name, entry.shape, 0, offset))
        offset += -(-int(np.prod(entry.shape)) * 4 // 32) * 32
    return gguf_file(KEYS_OF_MODEL | KEYS_OF_TOKENIZER | dict(keys), table, bytes(offset))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("gguf", reason="weights of a GGUF file need the gguf package; pip install 'rljax-lm[gguf]'")
    file = tmp_path_factory.mktemp("gguf") / "m.gguf"
    # It is sound, and imports are done before memory is counted.
    file.write_bytes(sound_gguf())
    assert load_model(file)[0] == TINY
    assert load_tokenizer(file).encode("ab") == [2]
    return file


@FUZZ
@given(content=st.binary(max_size=64).map(lambda rest: b"GGUF" + rest) | st.binary(max_size=8))
@example(b"")
@example(b"GGUF\3\0\0\0")
def test_any_bytes_as_gguf(path, content):
    path.write_bytes(content)
    for read in (read_gguf_header, load_config, load_tokenizer):
        refuses_or_reads(read, path)


NEW_KEYS = st.text(max_size=6)
TENSORS = st.tuples(st.text(max_size=4), st.lists(COUNTS, max_size=6), st.integers(0, 45), COUNTS)


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(KEYS_OF_MODEL | KEYS_OF_TOKENIZER)) | NEW_KEYS | NEW_KEYS.map("llama.".__add__),
        VALUES,
        max_size=3,
    ),
    table=st.lists(TENSORS, max_size=3),
    counts=st.tuples(st.none() | COUNTS, st.none() | COUNTS),
)
@example({"llama.a\nb": scalar(4, 1)}, [("token_embd.weight", [4, 4], 0, 0)], (None, None))
@example({"general.alignment": scalar(4, 0)}, [], (None, None))
@example({"general.alignment": struct.pack("<I", 8) + text("x")}, [], (None, None))
@example({"a": struct.pack("<IIQ", 9, 9, 1) * 2000}, [], (None, None))
@example({"a": struct.pack("<IIQ", 9, 0, 2**63)}, [], (None, None))
@example({}, [("a", [2**40, 2**40], 0, 0)], (None, None))
@example({}, [("a", [1] * 6, 0, 0)], (None, None))
@example({}, [("rope_freqs.weight", [1], 0, 0), ("token_embd.weight", [1], 0, 0)], (None, None))
def test_any_header_of_gguf(path, changes, table, counts):
    keys = KEYS_OF_MODEL | KEYS_OF_TOKENIZER | changes
    path.write_bytes(gguf_file(keys, table, bytes(64), counts))
    for read in (read_gguf_header, load_config, load_tokenizer):
        refuses_or_reads(read, path)


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from([key for key in KEYS_OF_MODEL if key.startswith("llama.")])
        | st.sampled_from(
            ["llama.attention.key_length", "llama.rope.scaling.factor", "llama.attention.sliding_window"]
        ),
        VALUES,
        min_size=1,
        max_size=2,
    )
)
def test_any_value_in_a_sound_gguf(path, changes):
    path.write_bytes(sound_gguf(changes))
    refuses_or_reads(load_config, path)


@WHOLE
@given(edits=EDITS, keep=st.sampled_from([100, 100, 99, 60, 5]))
def test_a_damaged_model_of_gguf(path, edits, keep):
    path.write_bytes(edited(sound_gguf(), edits, keep))
    refuses_or_reads(load_model, path)
    refuses_or_reads(load_tokenizer, path)
