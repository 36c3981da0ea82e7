"""Runs llama.cpp's own server inside the package xllamacpp, with the arguments of llama-server that Modelium uses.

A program of its own, for the interpreter of the environment that has the package: nothing of Modelium is imported.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp  # type: ignore[import-not-found]

FLASH = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--alias", "--host"):
        parser.add_argument(name, required=True)
    for name in ("--port", "--ctx-size", "--parallel", "--n-gpu-layers", "--ubatch-size", "--batch-size"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cache-type-k", default="f16")
    parser.add_argument("--cache-type-v", default="f16")
    parser.add_argument("--flash-attn", choices=sorted(FLASH), default="auto")
    parser.add_argument("--no-mmap", action="store_true")
    parser.add_argument("--embedding", action="store_true")
    parser.add_argument("--pooling", choices=("none", "mean", "cls", "last", "rank"))
    parser.add_argument("--mmproj")
    parser.add_argument("--tensor-split")
    parser.add_argument("--chat-template-file")
    parser.add_argument("--log-verbosity", type=int, default=3)
    return parser.parse_args()


def parameters(given: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.model_alias = {given.alias}
    params.hostnames = [given.host]
    params.port = given.port
    params.n_ctx = given.ctx_size
    params.n_parallel = given.parallel
    params.n_gpu_layers = given.n_gpu_layers
    params.n_ubatch = given.ubatch_size
    params.n_batch = given.batch_size
    params.verbosity = given.log_verbosity
    if given.threads:
        params.cpuparams.n_threads = given.threads
        params.cpuparams_batch.n_threads = given.threads
    params.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{given.cache_type_k.upper()}")
    params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{given.cache_type_v.upper()}")
    params.flash_attn_type = getattr(
        xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{FLASH[given.flash_attn]}"
    )
    if given.no_mmap:
        params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    if given.pooling:
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{given.pooling.upper()}")
    params.embedding = given.embedding
    if given.mmproj:
        params.mmproj.path = given.mmproj
    if given.tensor_split:
        shares = [float(share) for share in given.tensor_split.split(",")]
        params.tensor_split = shares + [0.0] * (len(params.tensor_split) - len(shares))
    if given.chat_template_file:
        with open(given.chat_template_file, encoding="utf-8") as file:
            params.chat_template = file.read()
    # What `kind.ENVIRONMENT` says to llama-server.
    params.fit_params = False
    params.cache_ram_mib = 0
    params.ui = False
    params.endpoint_slots = False
    params.cors_origins = "localhost"
    return params


def main() -> None:
    params = parameters(arguments())
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:  # the log has said why
        raise SystemExit(str(error)) from None
    print(f"serving on {server.listening_address}", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
