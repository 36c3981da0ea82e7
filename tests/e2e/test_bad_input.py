"""What must not be served, and surroundings that are not as they should be: refused with a reason, and nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import models
from tests.e2e.kit import fingerprint, infer, outputs, toy
from tests.service import MODELIUM, Served, free_port, processes_of, served

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 261, "hidden_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bad")
    config = {"orchestration": {"settle_s": 0.3, "rescan_interval_s": 2}}
    with served(folder / "root", config) as service:
        service.drop(toy(folder / "good").path)
        service.until_state("good", "READY")
        yield service


def llama(path: Path, **changes: Any) -> Path:
    """A folder that looks like a model of Hugging Face's, by its header and configuration."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    (path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    save_file({"model.embed_tokens.weight": np.zeros((261, 32), np.float32)}, path / "model.safetensors")
    return path


class Bomb:
    """A pickle of this writes the file `marker` when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def content(path: Path) -> Any:
    return fingerprint(path) if path.is_dir() and not path.is_symlink() else path.read_bytes()


def refusal(service: Served, name: str) -> dict[str, Any]:
    """What is shown of a drop of that name, once it is refused: in quarantine, or marked where it lies."""

    def told() -> dict[str, Any] | None:
        shown = service.ps()
        found = [m for n, m in shown.items() if n in (f"incoming/{name}", f"quarantine/{name}")]
        return next((m for m in found if m["state"] == "INVALID"), None)

    found: dict[str, Any] = service.until(told, 90, f"{name} to be refused")
    listed = service.cli("ps").stdout
    (line,) = [line for line in listed.splitlines() if line.startswith(f"{found['name']} ")]
    assert "INVALID" in line and found["reason"].splitlines()[0] in line
    return found


def check_refused(service: Served, source: Path, *words: str, name: str | None = None) -> dict[str, Any]:
    """Drop a copy of `source`: it is refused with these words, kept whole, and nothing of it is served."""
    name = name or source.name
    before = content(source)
    service.drop(source, name)
    found = refusal(service, name)
    for word in words:
        assert word in found["reason"], found["reason"]
    assert content(service.root / found["name"]) == before
    assert not (service.root / "repository" / name).exists()
    return found


# --------------------------------------------------------------------------- not whole


@pytest.fixture(scope="module")
def stalled(service: Served, made: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Drops that stop growing before they are whole, all at once; what is missing of each that it can be told of."""
    incoming = service.root / "incoming"
    source = made("text-generation", "llama")
    weights = (source / "model.safetensors").read_bytes()
    shutil.copytree(source, incoming / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    (incoming / "half" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    folder = tmp_path_factory.mktemp("stalled")
    onnx = models.onnx_linear(folder / "whole.onnx").read_bytes()
    (incoming / "cut.onnx").write_bytes(onnx[:-20])
    (incoming / "empty.onnx").touch()
    shardless = llama(folder / "shardless")
    (shardless / "model.safetensors").rename(shardless / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (shardless / "model.safetensors.index.json").write_text(json.dumps(index))
    service.drop(shardless)
    return {"half/model.safetensors": weights[len(weights) // 2 :], "cut.onnx": onnx[-20:]}


def test_half_a_model_is_marked_where_it_lies(service: Served, stalled: dict[str, bytes]) -> None:
    for name, missing in (
        ("half", "model.safetensors"), ("cut.onnx", "cut.onnx"), ("empty.onnx", "empty.onnx"),
        ("shardless", "model-2.safetensors"),
    ):  # fmt: skip
        told = refusal(service, name)
        assert told["name"] == f"incoming/{name}"
        assert "incomplete" in told["reason"] and missing in told["reason"], told["reason"]


def test_it_is_taken_in_when_the_rest_comes(service: Served, stalled: dict[str, bytes]) -> None:
    for name in ("half", "cut.onnx"):
        refusal(service, name)
    for name, rest in stalled.items():
        with (service.root / "incoming" / name).open("ab") as file:
            file.write(rest)
    service.until_state("cut", "READY")
    service.until_state("half", "READY")
    assert service.post("/v2/models/half/generate", {"text_input": "a", "max_tokens": 2})["num_output_tokens"] == 2


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["my model.onnx", "a..b.onnx", "..hidden.onnx", "stats.onnx", "-x.onnx", "\u00fc.onnx"]
)
def test_names(service: Served, tmp_path: Path, name: str) -> None:
    source = models.onnx_linear(tmp_path / "source.onnx")
    if name.startswith("."):
        # what begins with a dot is not looked at: it is how files hide while they are written
        service.drop(source, name)
        service.until(lambda: infer(service, "good", [1]) == [2])
        assert (service.root / "incoming" / name).exists()
        (service.root / "incoming" / name).unlink()
        return
    told = check_refused(service, source, "can't be a model's name", name=name)
    if name == "my model.onnx":
        assert "my-model" in told["reason"]


def test_a_name_that_is_taken(service: Served, tmp_path: Path) -> None:
    before = fingerprint(service.root / "repository" / "good")
    source = models.onnx_linear(tmp_path / "good.onnx")
    service.drop(source)
    told = refusal(service, "good.onnx")
    assert "a model named good is there already" in told["reason"]
    assert content(service.root / told["name"]) == content(source)
    assert fingerprint(service.root / "repository" / "good") == before
    assert infer(service, "good", [1]) == [2]


def test_a_triton_directory_under_another_name(service: Served, tmp_path: Path) -> None:
    source = toy(tmp_path / "inner")
    source.path.rename(tmp_path / "outer")
    check_refused(service, tmp_path / "outer", "'inner'", "'outer'")


# --------------------------------------------------------------------------- not a model, or more than one


def test_a_text_file(service: Served, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("remember the milk\n")
    check_refused(service, tmp_path / "notes.txt", "not a model that any analyzer knows")


def test_an_empty_folder(service: Served, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    check_refused(service, tmp_path / "nothing")


def test_links_that_lead_outside(service: Served, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not for the repository")
    folder = tmp_path / "links"
    folder.mkdir()
    for name, target in (("config.json", secret), ("model.safetensors", Path("/etc/passwd")), ("up", Path("../.."))):
        (folder / name).symlink_to(target)
    hidden = service.root / "coming-links"
    shutil.copytree(folder, hidden, symlinks=True)
    hidden.rename(service.root / "incoming" / "links")
    told = refusal(service, "links")
    assert "link" in told["reason"]
    kept = service.root / told["name"]
    assert {p.name: os.readlink(p) for p in kept.iterdir()} == {p.name: os.readlink(p) for p in folder.iterdir()}
    assert secret.read_text() == "not for the repository"


def test_a_link_as_a_drop(service: Served, tmp_path: Path) -> None:
    source = models.onnx_linear(tmp_path / "far.onnx")
    (service.root / "incoming" / "far.onnx").symlink_to(source)
    told = refusal(service, "far.onnx")
    assert "link" in told["reason"]
    assert source.exists()


# --------------------------------------------------------------------------- code


def test_code_that_the_configuration_names(service: Served, tmp_path: Path) -> None:
    marker = tmp_path / "code-ran"
    folder = llama(tmp_path / "custom", auto_map={"AutoModelForCausalLM": "modeling.Custom"}, model_type="custom")
    (folder / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\n")
    check_refused(service, folder, "auto_map")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.pkl", "bomb.bin", "bomb.onnx"])
def test_a_pickle_that_is_a_program(service: Served, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "pickle-ran"
    source = tmp_path / name
    source.write_bytes(pickle.dumps(Bomb(marker)))
    check_refused(service, source)
    assert not marker.exists()


def test_weights_that_are_a_program(service: Served, tmp_path: Path) -> None:
    marker = tmp_path / "weights-ran"
    folder = llama(tmp_path / "trojan")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(marker)}))
    told = check_refused(service, folder, "system")
    assert "pickle" in told["reason"] and not marker.exists()


def test_a_state_dict_is_converted(
    service: Served, made: Callable[..., Path], torch_python: Path, tmp_path: Path
) -> None:
    """Pickled weights and nothing else: they become safetensors, and the original is kept."""
    source = tmp_path / "pickled"
    shutil.copytree(made("text-classification", "bert"), source)
    script = (
        "import sys, torch; from safetensors.torch import load_file; "
        "torch.save(load_file(sys.argv[1] + '/model.safetensors'), sys.argv[1] + '/pytorch_model.bin')"
    )
    subprocess.run([str(torch_python), "-c", script, str(source)], check=True)
    (source / "model.safetensors").unlink()
    before = fingerprint(source)
    service.drop(source)
    service.until_state("pickled", "READY")
    body = {"inputs": [{"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["hello there"]}]}
    found = outputs(service.post("/v2/models/pickled/infer", body))["logits"]
    expected = models.original(
        torch_python, "text-classification", made("text-classification", "bert"), texts=["hello there"]
    )
    np.testing.assert_allclose(found, expected[0], atol=1e-4)
    assert not list((service.root / "repository" / "pickled").rglob("*.bin"))
    (kept,) = (service.root / "trash").glob("pickled*")
    assert fingerprint(kept) == before


def test_python_in_a_triton_directory_is_told_of(service: Served) -> None:
    """There it is what the person wants; who looks is told that code runs."""
    codes = {f["code"]: f["message"] for f in service.model("good")["findings"]}
    assert "python_code" in codes and "trust" in codes["python_code"]


# --------------------------------------------------------------------------- what becomes of it


def test_what_was_refused_can_be_taken_out_or_away(service: Served, tmp_path: Path) -> None:
    (tmp_path / "junk.txt").write_text("junk")
    told = check_refused(service, tmp_path / "junk.txt")
    service.kill()
    service.start()
    assert refusal(service, "junk.txt")["reason"] == told["reason"]  # remembered over a restart
    service.cli("rm", told["name"])
    assert service.state(told["name"]) == "-"
    assert [p.read_text() for p in (service.root / "trash").glob("junk.txt*")] == ["junk"]
    (tmp_path / "junk2.txt").write_text("junk")
    told = check_refused(service, tmp_path / "junk2.txt")
    (service.root / told["name"]).unlink()
    service.until(lambda: service.state(told["name"]) == "-", what="it to be forgotten")


def test_the_good_model_never_noticed(service: Served) -> None:
    service.until_state("good", "READY")
    assert infer(service, "good", [1]) == [2]
    assert service.get("/health")["status"] in ("ok", "degraded")


# --------------------------------------------------------------------------- surroundings


def fails(*arguments: str, env: dict[str, str] | None = None, prefix: list[str] | None = None) -> str:
    """What `modelium ARGUMENTS` says on stderr when it must fail: one clear error, and an exit code that tells."""
    done = subprocess.run(
        [*(prefix or []), *MODELIUM, *arguments],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **(env or {})},
    )  # fmt: skip
    assert done.returncode not in (0, -9), done
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"orchestraton": {}}, ("orchestraton", "did you mean 'orchestration'", "line 1")),
        ({"orchestration": {"policies": {"evict_after_idle_second": 3}}}, ("did you mean 'evict_after_idle_seconds'",)),
        ({"triton": {"endpont": "http://x"}}, ("triton.endpont", "did you mean 'endpoint'")),
        ({"triton": {"endpoint": "127.0.0.1:8000"}}, ("triton.endpoint", "http://127.0.0.1:8000")),
        ({"metrics": {"enabled": "perhaps"}}, ("metrics.enabled", "'perhaps'")),
        ({"brain": {"name": "ruels"}}, ("brain.name", "'rules'")),
        ({"eviction": {"name": "lur"}}, ("eviction.name", "'lru'")),
    ],
    ids=["section", "policy", "plugin's key", "plugin's value", "value", "brain", "policy's name"],
)
def test_a_mistake_in_the_configuration(tmp_path: Path, config: dict[str, Any], words: tuple[str, ...]) -> None:
    file = tmp_path / "modelium.yaml"
    file.write_text(json.dumps(config))
    root = tmp_path / "root"
    said = fails("serve", "--root", str(root), "--config", str(file), "--port", str(free_port()))
    for word in words:
        assert word in said, said
    assert not processes_of(tmp_path)


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails("serve", "--root", str(tmp_path / "root"), "--port", str(port))
    assert f"port {port} on 127.0.0.1 is in use" in said and "--port" in said
    assert not processes_of(tmp_path)


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = fails("serve", "--root", str(tmp_path / "file" / "root"), "--port", str(free_port()))
    assert str(tmp_path / "file") in said
    said = fails("serve", "--root", "/proc/modelium", "--port", str(free_port()))
    assert "/proc/modelium" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o500)
    assert str(root) in fails("serve", "--root", str(root), "--port", str(free_port()))


def mounting(target: Path, options: str) -> list[str]:
    """What runs a command in a mount namespace of its own, in which `target` is a file system of its own."""
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(target)]


@pytest.fixture
def mountable(tmp_path: Path) -> Path:
    """A folder that `mounting` can put a file system on. No right but that of every user is needed for it."""
    target = tmp_path / "small"
    target.mkdir()
    done = subprocess.run([*mounting(target, "size=1m"), "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this kernel lets nobody mount in a namespace of his own: {done.stderr.strip()}")
    return target


def test_a_read_only_disk(mountable: Path, tmp_path: Path) -> None:
    root = mountable / "root"
    said = fails("serve", "--root", str(root), "--port", str(free_port()), prefix=mounting(mountable, "ro"))
    assert str(root) in said and "Read-only" in said


def test_a_full_disk(mountable: Path, tmp_path: Path) -> None:
    """The repository lies on a disk of one megabyte: what is larger stays where it was dropped, and is told why."""
    prefix = mounting(mountable, "size=1m")
    service = Served(tmp_path / "root", {"orchestration": {"settle_s": 0.3}}, repository=mountable, prefix=prefix)
    try:
        service.start()
        small, large = toy(tmp_path / "small-one"), toy(tmp_path / "large-one")
        (large.path / "1" / "weights.bin").write_bytes(os.urandom(3_000_000))
        before = fingerprint(large.path)
        service.drop(large.path)
        told = refusal(service, "large-one")
        assert told["name"] == "incoming/large-one"
        assert "make room" in told["reason"] and str(mountable) in told["reason"]
        assert fingerprint(service.root / "incoming" / "large-one") == before
        service.drop(small.path)
        service.until_state("small-one", "READY")
        assert infer(service, "small-one", [1]) == [2]
    finally:
        service.down()
