"""What the models on PyTorch share: device, threads, number type, and loading that runs no code of the model's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from memory import give_back_memory

# Nothing is ever fetched: the model's own folder holds all that it needs. Must be set before transformers is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def device(args: dict[str, str], parameters: dict[str, str]) -> Any:
    """The `torch.device` of this instance; sets the number of threads on the way."""
    import torch

    threads = int(parameters.get("threads", "0"))
    if threads > 0:
        torch.set_num_threads(threads)
    if args["model_instance_kind"] != "GPU":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this instance is of KIND_GPU, and PyTorch finds no GPU: use KIND_CPU or install its CUDA build"
        )
    return torch.device("cuda", int(args["model_instance_device_id"]))


def number_type(device: Any, parameters: dict[str, str]) -> Any:
    """What to compute in: on a GPU the checkpoint's own type, on a CPU FP32, unless `dtype` says otherwise."""
    import torch

    wanted = parameters.get("dtype", "auto")
    if wanted == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    return getattr(torch, wanted)


def pretrained(kind: Any, folder: Path, device: Any, dtype: Any, may_lack: tuple[str, ...] = ()) -> Any:
    """Load a model with one of transformers' `Auto` classes.

    Raises `ValueError` when weights are missing, which transformers would fill with random numbers; `may_lack` are
    the parts that are not used here.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = kind.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(key for key in info["missing_keys"] if not any(part in key for part in may_lack))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"the weights lack {shown}: the checkpoint was made for another task than {kind.__name__}")
    model = model.to(device).eval()
    _read_weights(model)
    give_back_memory()
    return model


def _read_weights(model: Any) -> None:
    """Touch each page of those that are mapped from their file: from now on its memory is what it will be, and the
    first request takes no longer than the next."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[::4096].sum()


def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def longest_input(model: Any, tokenizer: Any = None) -> int | None:
    """The most tokens that the model takes at once; None when nothing limits it."""
    import torch

    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)
    for name, module in model.named_modules():
        # Models after RoBERTa count positions from behind the padding's.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(known, default=None)
