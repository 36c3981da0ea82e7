"""Writes the files that only PyTorch can write, for the tests that read them without it.

Run by an interpreter that has torch, transformers and safetensors: `python tests/builtin/make_data.py FOLDER`. Those
under `tests/builtin/data` were made so; set MODELIUM_TEST_PYTHON to that interpreter and the tests make them anew.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file


def state_dict() -> dict[str, torch.Tensor]:
    """Every way in which a tensor can lie in a storage."""
    torch.manual_seed(0)
    table = torch.randn(6, 4)
    parts = torch.arange(24, dtype=torch.int64).reshape(2, 3, 4)
    return {
        "plain": table,
        "tied": table,
        "transposed": table.t(),
        "row": table[2],
        "every_other": parts[:, ::2, 1:],
        "repeated": torch.arange(3.0).expand(2, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).half(),
        "bfloat": torch.nn.Parameter(torch.randn(3, 2).bfloat16()),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
    }


class FromFile(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.from_file("weights.raw", False, 4)


class Save(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "stolen.pt")
        return x


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(x) * scale, x


def save_script(module: torch.jit.ScriptModule, path: Path) -> None:
    """Saved without its debug entries, which hold the paths of the machine that it was made on."""
    module.save(path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in entries:
            if not info.filename.endswith(".debug_pkl"):
                archive.writestr(info, data)
    torch.jit.load(path)


def bert(folder: Path) -> None:
    """A Hugging Face folder as old ones were: pickled weights, some of them shared."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = BertForMaskedLM(config)
    folder.mkdir(exist_ok=True)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrs"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state_dict()
    torch.save(tensors, folder / "state_dict.pt")
    old = {name: tensor for name, tensor in tensors.items() if name != "float8"}  # younger than the old format
    torch.save(old, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "expected.safetensors")
    torch.save(torch.nn.Linear(2, 2), folder / "whole_module.pt")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "epoch": 3}, folder / "training.pt")
    torch.save({"a": torch.zeros(3).to_sparse()}, folder / "sparse.pt")
    save_script(torch.jit.script(TwoInputs()), folder / "script.pt")
    save_script(torch.jit.trace(torch.nn.Linear(3, 1), torch.zeros(1, 3)), folder / "traced.pt")
    save_script(torch.jit.script(FromFile()), folder / "script_reads.pt")
    save_script(torch.jit.script(Save()), folder / "script_saves.pt")
    bert(folder / "bert")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
