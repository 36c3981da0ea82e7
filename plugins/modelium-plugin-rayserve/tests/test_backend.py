"""What is offered, what is written for it, and what a load request comes to. Nothing runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from modelium_plugin_rayserve import reasons
from modelium_plugin_rayserve.backend import RayServeBackend
from modelium_plugin_rayserve.launch import choose_port, command, private_folder
from modelium_plugin_rayserve.modelconfig import newest_version, read_config
from modelium_plugin_rayserve.nodes import Nodes
from modelium_plugin_rayserve.orders import order
from modelium_plugin_rayserve.servings import SERVINGS
from modelium_plugin_rayserve.settings import RayServeSettings, replica_settings
from pydantic import ValidationError

from modelium.api import Analysis, Device, Installable, LoadRequest, Offer, RuntimeBackend, RuntimeInfo, Tensor
from modelium.api.fakes import load_request
from modelium.api.testing import plan_of
from modelium.errors import ConfigError, DriverError, LoadRejected, ModelError

GIB = 2**30
X = Tensor(name="x", datatype="FP32", shape=(-1, 4))


def device(id: str, runtime: str = "") -> Device:
    return Device(id=id, kind=id.rpartition("/")[2][:-2], name=id, total_bytes=8 * GIB, used_bytes=0, runtime=runtime)


HERE = [device("cpu:0")]
TWO = [device("cpu:0"), device("far/cpu:0", "ray_serve"), device("elsewhere/cpu:0", "other")]


def analysis(format: str, **fields: Any) -> Analysis:
    return Analysis(analyzer="test", format=format, summary="", confidence=1, **fields)


ONNX = analysis("onnx", inputs=(X,), outputs=(X,), facts={"batch_dim": True}, weights_bytes=1000)
PYTHON = analysis(
    "python-model", entry="model.py", inputs=(X,), outputs=(X,), facts={"device_kinds": ["cpu"], "imports": ["torch"]}
)
LLM = analysis(
    "huggingface", entry="config.json", task="text-generation", parameters=10**8, weights_bytes=2 * 10**8,
    dtype="bfloat16", facts={"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "tokenizer": True},
)  # fmt: skip


def info(**facts: Any) -> RuntimeInfo:
    return RuntimeInfo(name="ray_serve", version="2.60.0", instance="1", adopted=False, facts=facts)


def offers(what: Analysis, runtime: RuntimeInfo | None = None, devices: list[Device] = HERE) -> list[Offer]:
    return list(RayServeBackend().offers(what, runtime, devices))


def test_it_is_a_backend_that_can_be_installed() -> None:
    assert isinstance(RayServeBackend(), RuntimeBackend) and isinstance(RayServeBackend(), Installable)


@pytest.mark.parametrize(
    ("what", "serving", "packs", "decoupled"),
    [
        (ONNX, "onnx-python", ["onnx"], False),
        (PYTHON, "python-model", ["torch"], False),
        (LLM, "transformers-text-generation", ["torch"], True),
    ],
)
def test_each_kind_is_offered_as_its_template(what: Analysis, serving: str, packs: list[str], decoupled: bool) -> None:
    (offer,) = offers(what)
    assert (offer.serving, offer.settings["packs"], offer.settings["decoupled"]) == (serving, packs, decoupled)
    assert offer.requires == ("ray", *packs)
    assert not offer.native and offer.devices == 1
    assert offers(what, info(packs=["ray"]))[0].requires == tuple(packs)
    assert offers(what, info(packs=None, own=False))[0].requires == ()


def test_what_it_can_not_serve_is_refused_or_left_to_others() -> None:
    assert offers(analysis("gguf")) == []
    assert offers(ONNX.model_copy(update={"inputs": (X.model_copy(update={"datatype": "BF16"}),)})) == []
    with pytest.raises(ModelError, match="quantised with awq"):
        offers(LLM.model_copy(update={"facts": {"quantization": "awq"}}))
    with pytest.raises(ModelError, match="no text"):
        offers(LLM.model_copy(update={"facts": {"unsupported": "no text"}}))


def test_a_triton_directory_of_a_python_model_is_served_as_it_is() -> None:
    facts = {
        "backend": "python", "sequence": False, "served": [1], "decoupled": True, "imports": ["onnxruntime"],
        "instances": [{"kind": "KIND_CPU", "count": 1, "gpus": []}],
    }  # fmt: skip
    (offer,) = offers(analysis("triton", entry="config.pbtxt", facts=facts))
    assert offer.serving == "as-is" and offer.settings["packs"] == ["onnx"] and offer.settings["decoupled"]
    assert RayServeBackend().layout("m", ONNX, plan_of(offer)).files == {".": "."}
    for changed in ({"backend": "onnxruntime"}, {"sequence": True}, {"served": [1, 2]}):
        assert offers(analysis("triton", entry="config.pbtxt", facts=facts | changed)) == []


def test_gpus_are_offered_to_what_computes_on_them() -> None:
    both = [*HERE, device("cuda:0")]
    assert offers(LLM, devices=both)[0].device_kinds == ("cuda", "cpu")
    assert offers(ONNX, devices=both)[0].device_kinds == ("cpu",)
    assert offers(ONNX, info(own=False, packs=None), both)[0].device_kinds == ("cuda", "cpu")
    assert offers(PYTHON, devices=both)[0].device_kinds == ("cpu",)
    gpu = PYTHON.model_copy(update={"facts": {"device_kinds": ["cuda"], "imports": []}})
    assert offers(gpu, devices=both)[0].device_kinds == ("cuda",)
    assert offers(gpu, devices=HERE) == []


def test_more_nodes_are_offered_with_a_replica_on_each() -> None:
    plain, spread = offers(ONNX, info(), TWO)
    assert spread.serving == "onnx-python-spread" and spread.devices == 2 and spread.settings["replicas"] == 2
    assert spread.memory_bytes == 2 * plain.memory_bytes
    assert RayServeBackend().layout("m", ONNX, plan_of(spread)).files == {"1/model.onnx": "."}


def test_default_settings_count_in_the_estimate() -> None:
    (one,), (many,) = offers(ONNX, info()), offers(ONNX, info(default_settings={"replicas": 2, "max_replicas": 3}))
    assert many.memory_bytes == 3 * one.memory_bytes
    assert many.settings["replicas"] == 2 and many.settings["max_replicas"] == 3
    assert many.elastic and not one.elastic


def test_on_a_cpu_weights_are_counted_as_fp32_with_room_for_a_cache() -> None:
    (offer,) = offers(LLM)
    cache = 2 * 2 * 2 * 64 * 4 * 4096
    assert offer.memory_bytes == SERVINGS["transformers-text-generation"].overhead_bytes + 4 * 10**8 + cache


def test_a_rendered_folder_is_one_that_plain_triton_serves(tmp_path: Path) -> None:
    layout = RayServeBackend().layout("net", ONNX, plan_of(offers(ONNX)[0], replicas=2, threads=3))
    assert layout.files == {"1/model.onnx": "."}
    assert "class TritonPythonModel" in layout.texts["1/model.py"]
    (tmp_path / "config.pbtxt").write_text(layout.texts["config.pbtxt"])
    config = read_config(tmp_path, "net")
    assert config["max_batch_size"] == 32 and config["dynamic_batching"] == {
        "max_queue_delay_microseconds": "0", "preserve_ordering": False, "priority_levels": "0",
        "default_priority_level": "0", "preferred_batch_size": [], "priority_queue_policy": {},
    }  # fmt: skip
    assert config["input"][0]["dims"] == [4]
    assert config["instance_group"][0]["count"] == 2
    assert config["parameters"]["threads"] == {"string_value": "3"}


def test_wrong_settings_are_refused_when_the_folder_is_made() -> None:
    offer = offers(ONNX)[0]
    for wrong, words in (
        ({"replicas": 0}, "replicas"),
        ({"num_gpus": 2}, "at most 1"),
        ({"num_cpus": "x"}, "num_cpus"),
    ):
        with pytest.raises(ModelError, match=words):
            RayServeBackend().layout("m", ONNX, plan_of(offer, **wrong))
    with pytest.raises(ModelError, match="max_replicas"):
        replica_settings({"replicas": 3, "max_replicas": 2})
    with pytest.raises(ModelError, match="no way of serving called 'nonsense'"):
        RayServeBackend().layout("m", ONNX, plan_of(offer).model_copy(update={"serving": "nonsense"}))


# --------------------------------------------------------------------------- orders


def request(tmp_path: Path, *devices: str, kind: str = "cpu", **settings: Any) -> LoadRequest:
    folder = tmp_path / "m"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text('backend: "python"')
    made = load_request("m", folder, memory_bytes=4 * GIB, devices=devices or ("cpu:0",))
    plan = made.plan.model_copy(update={"device_kind": kind, "settings": settings})
    sizes = {device: 16 * GIB for device in made.devices}
    return made.model_copy(update={"plan": plan, "device_bytes": sizes})


def ordered(what: LoadRequest, *nodes: str, own: bool = True) -> dict[str, Any]:
    log = Path("/log")
    return order(what, own=own, nodes=nodes or ("here",), log=log, uuid_of=lambda device: f"GPU-{device}")


def test_an_order_says_all_that_the_controller_needs(tmp_path: Path) -> None:
    found = ordered(request(tmp_path, num_cpus=1.5, max_ongoing_requests=7, packs=["onnx"]))
    assert (found["name"], found["version"], found["folder"]) == ("m", "1", str(tmp_path / "m"))
    assert found["config"]["name"] == "m"
    assert found["sees_gpus"] == "" and not found["gpu"] and found["threads"] == 2
    assert found["options"]["num_replicas"] == 1 and found["options"]["max_ongoing_requests"] == 7
    assert found["options"]["ray_actor_options"] == {"num_cpus": 1.5}


def test_our_own_cluster_takes_the_ledgers_gpu_and_others_choose_one_with_room(tmp_path: Path) -> None:
    what = request(tmp_path, "cuda:1", kind="cuda")
    own, other = ordered(what), ordered(what, own=False)
    assert own["sees_gpus"] == "GPU-cuda:1" and "num_gpus" not in own["options"]["ray_actor_options"]
    assert other["sees_gpus"] is None and other["options"]["ray_actor_options"]["num_gpus"] == 0.25
    named = ordered(request(tmp_path, "cuda:1", kind="cuda", num_gpus=0.5))
    assert named["sees_gpus"] is None and named["options"]["ray_actor_options"]["num_gpus"] == 0.5


@pytest.mark.parametrize(
    ("booked", "replicas", "most", "share"),
    [
        (40, 1, 4, 0.13),
        (40, 4, 4, 0.13),
        (10, 1, 4, 0.13),  # as the default settings have it, or as it was measured while there was one
        (60, 1, 4, 0.19),
        (6, 1, 4, 0.08),
        (20, 4, None, 0.07),
        (15, 1, None, 0.19),
        (6, 1, None, 0.08),
    ],
)
def test_a_gpu_s_share_is_that_of_one_replica(
    tmp_path: Path, booked: int, replicas: int, most: int | None, share: float
) -> None:
    made = request(tmp_path, "cuda:0", kind="cuda", replicas=replicas, max_replicas=most)
    changes = {
        "analysis": made.analysis.model_copy(
            update={"weights_bytes": 10 * GIB - SERVINGS["python-model"].overhead_bytes}
        ),
        "memory_bytes": booked * GIB,
        "device_bytes": {"cuda:0": 80 * GIB},
    }
    options = ordered(made.model_copy(update=changes), own=False)["options"]
    assert options["ray_actor_options"]["num_gpus"] == share
    assert 80 * replicas * (share - 0.01) <= booked, "but for rounding no more than the ledger lets in"


def test_autoscaling_and_spreading(tmp_path: Path) -> None:
    options = ordered(request(tmp_path, replicas=2, max_replicas=5, target_ongoing_requests=3))["options"]
    assert "num_replicas" not in options
    assert options["autoscaling_config"] == {
        "min_replicas": 2, "initial_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 3,
    }  # fmt: skip
    spread = ordered(request(tmp_path, "cpu:0", "far/cpu:0", replicas=2), "here", "far")
    assert spread["nodes"] == ["here", "far"]
    assert spread["options"]["num_replicas"] == 2 and spread["options"]["max_replicas_per_node"] == 1


def test_what_can_not_be_ordered_is_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(LoadRejected, match="replicas"):
        ordered(request(tmp_path, replicas="many"))
    what = request(tmp_path)
    (tmp_path / "m/config.pbtxt").write_text('backend: "onnxruntime"')
    with pytest.raises(LoadRejected, match="'onnxruntime'; Ray serves models of Triton's python backend"):
        ordered(what)
    (tmp_path / "m/config.pbtxt").write_text("nonsense: 1")
    with pytest.raises(LoadRejected, match="no configuration of Triton's"):
        ordered(what)
    (tmp_path / "m/1").rmdir()
    with pytest.raises(LoadRejected, match="no version folder"):
        newest_version(tmp_path / "m", "m")


# --------------------------------------------------------------------------- nodes


def node(id: str, name: str, *, alive: bool = True, look: bool = True, gpus: int = 0) -> dict[str, Any]:
    found = {
        "total": 4 * GIB, "used": GIB, "held": {"7": {"cpu:0": 5, "cuda:0": 6}},
        "gpus": [{"id": f"cuda:{n}", "name": "H1", "total": GIB, "used": 1} for n in range(gpus)],
    }  # fmt: skip
    return {"id": id, "name": name, "alive": alive, "resources": {}, "look": found if look else None}


def test_devices_of_other_nodes_bear_their_names() -> None:
    nodes = Nodes(
        {
            "node": "aaaaaaaaaa",
            "nodes": [
                node("aaaaaaaaaa", "10.0.0.1"),
                node("bbbbbbbbbb", "10.0.0.2", gpus=1),
                node("cccccccccc", "twin"),
                node("dddddddddd", "twin"),
                node("eeeeeeeeee", "10.0.0.3", alive=False),
                node("ffffffffff", "new", look=False),
            ],
        }
    )
    found = nodes.devices("ray_serve")
    assert [d.id for d in found] == ["10.0.0.2/cpu:0", "10.0.0.2/cuda:0", "twin-cccccccc/cpu:0", "twin-dddddddd/cpu:0"]
    assert {d.runtime for d in found} == {"ray_serve"} and found[1].kind == "cuda" and found[0].used_bytes == GIB
    assert nodes.placed(["cpu:0"]) == ["aaaaaaaaaa"]
    assert nodes.placed(["10.0.0.2/cuda:0", "cpu:0", "10.0.0.2/cpu:0"]) == ["bbbbbbbbbb", "aaaaaaaaaa"]
    with pytest.raises(DriverError, match=r"10\.0\.0\.3 has left"):
        nodes.placed(["10.0.0.3/cpu:0"])
    assert nodes.held("bbbbbbbbbb", 7) == {"10.0.0.2/cpu:0": 5, "10.0.0.2/cuda:0": 6}
    assert nodes.held("bbbbbbbbbb", 8) == {} == nodes.held("ffffffffff", 7)


# --------------------------------------------------------------------------- reasons

DIED = "The deployment failed to start 1 times in a row. Error:\nActorDiedError()"


def raised(error: str) -> str:
    """What Serve says of a model that raised while it loaded."""
    return (
        "The deployment failed to start 1 times in a row. See controller logs for details. Error:\n"
        "\x1b[36mray::ServeReplica:m:ModeliumModel.initialize_and_get_metadata()\x1b[39m (pid=338)\n"
        '  File "/x/ray/serve/_private/replica.py", line 1928, in initialize\n'
        "    raise RuntimeError(traceback.format_exc()) from None\n"
        "RuntimeError: Traceback (most recent call last):\n"
        '  File "/x/ray/serve/_private/replica.py", line 1867, in initialize\n    await x()\n'
        '  File "/repository/m/1/model.py", line 21, in initialize\n    self.load()\n    ^^^^\n'
        f"{error}"
    )


@pytest.mark.parametrize(
    ("said", "log", "kind", "code", "words"),
    [
        (raised("ValueError: no such weights"), [], LoadRejected, "load_rejected", "m: ValueError: no such"),
        (raised("ModuleNotFoundError: No module named 'sklearn'"), [], LoadRejected, "module_missing", "sklearn"),
        (raised("torch.OutOfMemoryError: CUDA out of memory. Tried"), [], DriverError, "out_of_memory", "CUDA out"),
        (DIED, ["ouch"], DriverError, "process_died", "ouch"),
        (DIED, ["std::bad_alloc"], DriverError, "out_of_memory", "for lack of memory"),
        ("nobody knows", [], LoadRejected, "load_rejected", "nobody knows"),
    ],
)
def test_failures_are_told_in_the_models_own_words(
    said: str, log: list[str], kind: type[DriverError], code: str, words: str
) -> None:
    error = reasons.failure("m", said, log)
    assert type(error) is kind and error.code == code and words in error.message
    assert "ray/serve" not in error.message and "\x1b" not in error.message


def test_a_failure_shows_where_in_the_model() -> None:
    error = reasons.failure("m", raised("ValueError: no such weights"))
    assert error.message.splitlines()[1:] == ["  at /repository/m/1/model.py, line 21, in initialize"]
    assert reasons.in_short(raised("ValueError: no such weights")) == "ValueError: no such weights"


# --------------------------------------------------------------------------- settings and launching


@pytest.mark.parametrize("address", ["10.0.0.5:6379", "auto", None, "head.local:1"])
def test_addresses(address: str | None) -> None:
    assert RayServeSettings(address=address).address == address


@pytest.mark.parametrize("address", ["ray://10.0.0.5:10001", "10.0.0.5", "http://x:8265", ":1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValidationError, match="HOST:PORT"):
        RayServeSettings(address=address)


def test_our_own_cluster_is_for_this_user_and_this_machine(tmp_path: Path) -> None:
    made = command(RayServeSettings(), Path("/python"), tmp_path, "7")
    assert made.env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and made.env["RAY_USAGE_STATS_ENABLED"] == "0"
    token = Path(made.env["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    assert made.facts["instance"] == "7" and str(private_folder(tmp_path)) in made.facts["socket"]
    assert token.read_text() not in " ".join(made.argv)
    other = command(RayServeSettings(address="10.0.0.5:6379"), Path("/python"), tmp_path, "7")
    assert not any(name.startswith("RAY_AUTH") for name in other.env)
    private_folder(tmp_path).rmdir()


def test_a_folder_that_others_may_open_is_not_used(tmp_path: Path) -> None:
    folder = private_folder(tmp_path)
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="open to others"):
        private_folder(tmp_path)
    folder.rmdir()


def test_a_port_is_kept_for_as_long_as_it_is_free(tmp_path: Path) -> None:
    import socket

    first = choose_port(0, tmp_path)
    assert choose_port(0, tmp_path) == first
    with socket.create_server(("127.0.0.1", first)):
        assert choose_port(0, tmp_path) != first
        with pytest.raises(ConfigError, match=str(first)):
            choose_port(first, tmp_path)
