"""Small Hugging Face models that the real vLLM loads, written on the spot without torch.

The causal ones say the alphabet: after each letter the next one. Their layers compute with random weights, and what
they add to the stream is zero; so what an adapter adds is all that there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
END = "<|end|>"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def alphabet(
    folder: Path,
    *,
    hidden: int = 128,
    inner: int = 256,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 257,
    length: int = 512,
    dtype: str = "BF16",
    shards: int = 1,
    tied: bool = False,
    bits: int | None = None,
) -> Path:
    """A Qwen2 model of these sizes; with `bits` its layers are quantised by GPTQ's format."""
    random = np.random.default_rng(0)
    head = hidden // heads

    def matrix(rows: int, columns: int) -> Array:
        values: Array = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return values

    tokens = matrix(vocab, hidden) * np.sqrt(hidden)
    ids = bytes_to_ids()
    after = np.arange(vocab)
    for letter, following in zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True):
        after[ids[letter]] = ids[following]
    ahead = np.empty_like(tokens)
    ahead[after] = tokens
    tensors = {"model.embed_tokens.weight": tokens, "model.norm.weight": np.ones(hidden, np.float32)}
    if not tied:
        tensors["lm_head.weight"] = ahead
    for number in range(layers):
        at = f"model.layers.{number}."
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_heads * head, hidden),
            "self_attn.v_proj": (kv_heads * head, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, (rows, columns) in shapes.items():
            silent = name.endswith(("o_proj", "down_proj"))
            if bits is not None:
                tensors |= {f"{at}{name}.{part}": value for part, value in _gptq(rows, columns, bits, silent).items()}
            else:
                tensors[f"{at}{name}.weight"] = matrix(rows, columns) * (0 if silent else 1)
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{at}{name}.bias"] = np.zeros(rows, np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = np.ones(hidden, np.float32)
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": NAMES[dtype],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "eos_token_id": 256,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
    }
    if bits is not None:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": 32,
            "sym": True,
            "desc_act": False,
        }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer(folder)
    save(folder, tensors, dtype, shards)
    return folder


def bert(
    folder: Path, *, hidden: int = 64, layers: int = 2, heads: int = 2, vocab: int = 60, length: int = 128
) -> Path:
    """An encoder with random weights, for embeddings."""
    random = np.random.default_rng(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]

    def linear(name: str, rows: int, columns: int) -> dict[str, Array]:
        weight = (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
        return {f"{name}.weight": weight, f"{name}.bias": np.zeros(rows, np.float32)}

    def norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": np.ones(hidden, np.float32), f"{name}.bias": np.zeros(hidden, np.float32)}

    tensors = {
        f"embeddings.{name}_embeddings.weight": random.standard_normal((rows, hidden)).astype(np.float32)
        for name, rows in (("word", vocab), ("position", length), ("token_type", 2))
    }
    tensors |= norm("embeddings.LayerNorm")
    for number in range(layers):
        at = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            tensors |= linear(f"{at}attention.self.{name}", hidden, hidden)
        tensors |= linear(f"{at}attention.output.dense", hidden, hidden) | norm(f"{at}attention.output.LayerNorm")
        tensors |= linear(f"{at}intermediate.dense", 2 * hidden, hidden)
        tensors |= linear(f"{at}output.dense", hidden, 2 * hidden) | norm(f"{at}output.LayerNorm")
    folder.mkdir(parents=True)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    save(folder, tensors, "F32")
    return folder


def adapter(folder: Path, *, hidden: int = 128, inner: int = 256, layers: int = 2, rank: int = 8) -> Path:
    """A LoRA adapter for `alphabet`, after which the model says something else."""
    random = np.random.default_rng(1)
    tensors = {}
    for number in range(layers):
        at = f"base_model.model.model.layers.{number}.mlp.down_proj"
        tensors[f"{at}.lora_A.weight"] = random.standard_normal((rank, inner)).astype(np.float32)
        tensors[f"{at}.lora_B.weight"] = 10 * random.standard_normal((hidden, rank)).astype(np.float32)
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save(folder, tensors, "F32", name="adapter_model")
    return folder


# --------------------------------------------------------------------------- files


def save(folder: Path, tensors: Mapping[str, Array], dtype: str, shards: int = 1, name: str = "model") -> None:
    """As safetensors; floating numbers in `dtype`."""
    if shards == 1:
        _write(folder / f"{name}.safetensors", tensors, dtype)
        return
    table: dict[str, str] = {}
    for number in range(shards):
        file = f"{name}-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        _write(folder / file, part, dtype)
        table |= dict.fromkeys(part, file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _write(file: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    """The header's length in eight bytes, the header as JSON, and the numbers (github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = bytearray()
    for key, value in tensors.items():
        kind, data = _numbers(value, dtype)
        header[key] = {"dtype": kind, "shape": value.shape, "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def _numbers(value: Array, dtype: str) -> tuple[str, bytes]:
    if value.dtype == np.int32:
        return "I32", value.tobytes()
    wide = np.ascontiguousarray(value, np.float32)
    if value.dtype == np.float16 or dtype == "F16":
        return "F16", wide.astype(np.float16).tobytes()
    if dtype == "F32":
        return "F32", wide.tobytes()
    return "BF16", (wide.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def _gptq(rows: int, columns: int, bits: int, silent: bool, group: int = 32) -> dict[str, Array]:
    """Weights in GPTQ's format: `qweight` [in/8, out], eight numbers in one; their zero is 8, and scales by groups."""
    random = np.random.default_rng(2)
    each = 32 // bits
    numbers = random.integers(0, 2**bits, (columns, rows)).astype(np.uint32)
    if silent:
        numbers[:] = 2 ** (bits - 1)
    packed = np.zeros((columns // each, rows), np.uint32)
    for place in range(each):
        packed |= numbers[place::each] << np.uint32(bits * place)
    zero = sum((2 ** (bits - 1) - 1) << (bits * place) for place in range(each))
    return {
        "qweight": packed.view(np.int32),
        "qzeros": np.full((columns // group, rows // each), zero, np.uint32).view(np.int32),
        "scales": np.full((columns // group, rows), 0.01, np.float16),
        "g_idx": (np.arange(columns) // group).astype(np.int32),
    }


def bytes_to_ids() -> dict[str, int]:
    """The ids of the characters that stand for bytes (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    characters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(len(others))]
    return {character: number for number, character in enumerate(sorted(characters))}


def byte_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 256, "content": END, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
        "model": {"type": "BPE", "vocab": {**bytes_to_ids(), END: 256}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
