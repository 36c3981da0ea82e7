"""Small GGUF models that the real llama.cpp loads: true architectures with random weights, written on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"

FLOATS = {"F32": np.float32, "F16": np.float16}


class Model:
    """A model on its way into a file: keys first, then tensors, all of them random where no values are given."""

    def __init__(self, path: Path, arch: str, *, split_bytes: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.arch = arch
        self.writer = GGUFWriter(path, arch, split_max_size=split_bytes)
        self.random = np.random.default_rng(0)

    def numbers(self, **values: int | float | bool | Sequence[int]) -> None:
        """Keys of the architecture: `block_count=2`, `attention__head_count=4`."""
        for name, value in values.items():
            key = f"{self.arch}.{name.replace('__', '.')}"
            if isinstance(value, bool):
                self.writer.add_bool(key, value)
            elif isinstance(value, int):
                self.writer.add_uint32(key, value)
            elif isinstance(value, float):
                self.writer.add_float32(key, value)
            else:
                self.writer.add_array(key, list(value))

    def bytes_vocabulary(self, extra: int = 0) -> int:
        """A SentencePiece vocabulary of the 256 bytes, and of further words; returns its size."""
        tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256)), "\u2581".encode()]
        tokens += [bytes([letter]) for letter in range(ord("a"), ord("z") + 1)]
        tokens += [f"word{number}".encode() for number in range(2 + extra)]  # 288: a multiple of the blocks of Q8_0
        kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
        kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list(tokens)
        self.writer.add_token_scores([0.0] * len(tokens))
        self.writer.add_token_types(kinds)
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)
        return len(tokens)

    def tensor(self, name: str, *shape: int, kind: str = "F32") -> None:
        """With rows of `shape[-1]` numbers."""
        values = (self.random.standard_normal(shape) * 0.05).astype(np.float32)
        if kind in FLOATS:
            self.writer.add_tensor(name, values.astype(FLOATS[kind]))
            return
        quantised = GGMLQuantizationType[kind]
        self.writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)

    def values(self, name: str, values: np.ndarray[Any, Any]) -> None:
        self.writer.add_tensor(name, values.astype(np.float32))

    def ones(self, name: str, size: int) -> None:
        self.values(name, np.ones(size))

    def write(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def llama(
    path: Path,
    *,
    arch: str = "llama",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 128,
    context: int = 512,
    kind: str = "F32",
    words: int = 0,
    chat: bool = True,
    split_bytes: int = 0,
    alphabet: bool = False,
    **keys: Any,
) -> Path:
    """A decoder of Llama's kind, which Qwen2 and Gemma 3 resemble but for their own tensors.

    With `alphabet` each letter is followed by the next one: its layers add nothing, and what a token is read as is what
    the one behind it is written as.
    """
    model = Model(path, arch, split_bytes=split_bytes)
    head = width // heads
    model.numbers(
        context_length=context,
        embedding_length=width,
        block_count=layers,
        feed_forward_length=feed_forward,
        attention__head_count=heads,
        attention__layer_norm_rms_epsilon=1e-5,
        rope__dimension_count=head,
        **{"attention__head_count_kv": kv_heads, **keys},
    )
    model.writer.add_name("Tiny")
    if kind in gguf.LlamaFileType.__members__ or f"MOSTLY_{kind}" in gguf.LlamaFileType.__members__:
        model.writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    elif kind == "F32":
        model.writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = model.bytes_vocabulary(words)
    if chat:
        model.writer.add_chat_template(CHAT)
    model.ones("output_norm.weight", width)
    if alphabet:
        read_as = model.random.standard_normal((tokens, width))
        model.values("token_embd.weight", read_as)
        model.values("output.weight", np.roll(read_as, 1, axis=0))
    else:
        model.tensor("token_embd.weight", tokens, width, kind=kind)
        model.tensor("output.weight", tokens, width, kind=kind)
    for layer in range(layers):
        at = f"blk.{layer}."
        model.ones(at + "attn_norm.weight", width)
        for name, rows, columns in (
            ("attn_q", heads * head, width),
            ("attn_k", kv_heads * head, width),
            ("attn_v", kv_heads * head, width),
            ("attn_output", width, heads * head),
            ("ffn_gate", feed_forward, width),
            ("ffn_up", feed_forward, width),
            ("ffn_down", width, feed_forward),
        ):
            if alphabet and name in ("attn_output", "ffn_down"):
                model.values(f"{at}{name}.weight", np.zeros((rows, columns)))
            else:
                model.tensor(f"{at}{name}.weight", rows, columns, kind=kind)
        if arch == "qwen2":
            for name, size in (("attn_q", heads * head), ("attn_k", kv_heads * head), ("attn_v", kv_heads * head)):
                model.ones(f"{at}{name}.bias", size)
        if arch == "gemma3":
            for name, size in (("attn_q_norm", head), ("attn_k_norm", head)):
                model.ones(f"{at}{name}.weight", size)
            for name in ("post_attention_norm", "post_ffw_norm"):
                model.ones(f"{at}{name}.weight", width)
        model.ones(at + "ffn_norm.weight", width)
    return model.write()


def bert(path: Path, *, layers: int = 2, width: int = 64, heads: int = 4, context: int = 256, pooling: int = 1) -> Path:
    """An encoder that makes embeddings."""
    model = Model(path, "bert")
    model.numbers(
        context_length=context,
        embedding_length=width,
        block_count=layers,
        feed_forward_length=2 * width,
        attention__head_count=heads,
        attention__layer_norm_epsilon=1e-5,
        attention__causal=False,
        pooling_type=pooling,
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{chr(c)}" for c in range(97, 123))]
    words += ["\u2581hello", "\u2581world", *map(chr, range(97, 123))]
    model.writer.add_tokenizer_model("bert")
    model.writer.add_token_list(words)
    model.writer.add_token_types([TokenType.CONTROL] * 5 + [TokenType.NORMAL] * (len(words) - 5))
    model.writer.add_unk_token_id(1)
    model.writer.add_bos_token_id(2)
    model.writer.add_sep_token_id(3)
    model.writer.add_pad_token_id(0)
    model.writer.add_mask_token_id(4)
    model.writer.add_token_type_count(2)
    model.tensor("token_embd.weight", len(words), width)
    model.tensor("position_embd.weight", context, width)
    model.tensor("token_types.weight", 2, width)
    norms = ["token_embd_norm"]
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            model.tensor(f"{at}{name}.weight", width, width)
            model.ones(f"{at}{name}.bias", width)
        model.tensor(f"{at}ffn_up.weight", 2 * width, width)
        model.ones(f"{at}ffn_up.bias", 2 * width)
        model.tensor(f"{at}ffn_down.weight", width, 2 * width)
        model.ones(f"{at}ffn_down.bias", width)
        norms += [f"{at}attn_output_norm", f"{at}layer_output_norm"]
    for name in norms:
        model.ones(f"{name}.weight", width)
        model.ones(f"{name}.bias", width)
    return model.write()


def projector(path: Path) -> Path:
    """What turns images into tokens, as far as its header goes."""
    model = Model(path, "clip")
    model.writer.add_type("mmproj")
    model.tensor("v.patch_embd.weight", 8, 8)
    return model.write()


def keys_only(path: Path, arch: str, **texts: str) -> Path:
    """A header with one tensor, and texts under the keys `general__type` and so on."""
    model = Model(path, arch)
    for name, value in texts.items():
        model.writer.add_string(name.replace("__", "."), value)
    model.tensor("weight", 4, 32)
    return model.write()


def eye(path: Path, *, width: int = 32, to: int = 64) -> Path:
    """A projector of LLaVA's kind that llama.cpp loads: a small CLIP for images of 28 by 28, two layers behind it."""
    model = Model(path, "clip")
    writer = model.writer
    writer.add_type("mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": 28, "patch_size": 14, "embedding_length": width, "feed_forward_length": 2 * width,
        "projection_dim": to, "block_count": 2, "attention.head_count": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    model.tensor("v.class_embd", width)
    model.tensor("v.patch_embd.weight", width, 3, 14, 14)
    model.tensor("v.position_embd.weight", 1 + (28 // 14) ** 2, width)
    norms = ["v.pre_ln", "v.post_ln"]
    for layer in range(2):
        at = f"v.blk.{layer}."
        norms += [f"{at}ln1", f"{at}ln2"]
        for name, rows, columns in (
            *((f"attn_{what}", width, width) for what in ("q", "k", "v", "out")),
            ("ffn_up", 2 * width, width),
            ("ffn_down", width, 2 * width),
        ):
            model.tensor(f"{at}{name}.weight", rows, columns)
            model.ones(f"{at}{name}.bias", rows)
    for name in norms:
        model.ones(f"{name}.weight", width)
        model.ones(f"{name}.bias", width)
    for name, columns in (("mm.0", width), ("mm.2", to)):
        model.tensor(f"{name}.weight", to, columns)
        model.ones(f"{name}.bias", to)
    return model.write()
