"""A third party's plugin, built and installed by pip for a service that uses it, and broken ones that it leaves out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kit import Toy, infer, refused, toy
from tests.service import Served

SLOPES = '''
"""Lines, `{"slope": 2}`: a format that the author's plotter writes, served as the ONNX that is made of it."""

import json
import os
from pathlib import Path

from modelium.api import Analysis, Completeness, Finding, hookimpl
from modelium.errors import ModelError

MODELIUM_HOOKSPEC_VERSION = (1, 0)


def read(path):
    return json.loads(path.read_text()) if path.is_file() and path.suffix == ".slope" else None


@hookimpl
def modelium_completeness(path):
    if path.suffix == ".slope":
        whole = path.read_text().rstrip().endswith("}")
        return Completeness(complete=whole, reason="" if whole else "its closing brace is not there yet")


@hookimpl
def modelium_scan(path):
    line = read(path)
    if line is not None and "slope" in line:
        yield Finding(severity="convert", code="slope", message=f"a line of slope {line['slope']}: it becomes ONNX")


@hookimpl
def modelium_analyze(path):
    line = read(path)
    if line is None:
        return None
    if "curve" in line:
        return Analysis(analyzer="slopes", format="curve", summary=f"a curve of order {line['curve']}", confidence=0.9)
    return Analysis(analyzer="slopes", format="slope", summary=f"a line of slope {line['slope']}", confidence=0.9)


class ToOnnx:
    name = "slope-to-onnx"

    def accepts(self, path, codes):
        return set(codes) == {"slope"}

    def convert(self, path, target):
        import numpy as np
        from onnx import TensorProto, helper, numpy_helper, save

        slope = read(path)["slope"]
        if slope == 0:
            raise ModelError("a line of slope 0 has nothing to compute")
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [helper.make_node("Mul", ["x", "slope"], ["y"])],
            "line",
            [value("x", TensorProto.FLOAT, ["n"])],
            [value("y", TensorProto.FLOAT, ["n"])],
            [numpy_helper.from_array(np.array(slope, np.float32), "slope")],
        )
        target.mkdir()
        save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), target / "line.onnx")
        return f"the line became ONNX"


@hookimpl
def modelium_converters():
    return [ToOnnx()]


class Largest:
    """The one that frees most goes first."""

    name = "largest"

    def __init__(self, notes):
        self.notes = notes

    def rank(self, candidates, now):
        order = [c.name for c in sorted(candidates, key=lambda c: -c.memory_bytes)]
        with open(self.notes, "a") as file:
            file.write(json.dumps(order) + "\\n")
        return order


@hookimpl
def modelium_eviction_policies(settings):
    return [Largest(settings["notes"])] if "notes" in settings else []


@hookimpl
def modelium_transition(transition):
    with open(os.environ["SLOPES_SEEN"], "a") as file:
        file.write(f"{transition.subject} {transition.after}\\n")
'''

BROKEN = {
    "acme-lost": ("lost", "import a_library_that_is_not_there\n", "No module named 'a_library_that_is_not_there'"),
    "acme-old": ("old", "MODELIUM_HOOKSPEC_VERSION = (0, 1)\n", "written for hook specifications 0.1"),
    "acme-typo": (
        "typo",
        "from modelium.api import hookimpl\nMODELIUM_HOOKSPEC_VERSION = (1, 0)\n"
        "@hookimpl\ndef modelium_analyse(path): ...\n",
        "did you mean 'modelium_analyze'?",
    ),
}

RAISES = """
from modelium.api import hookimpl
MODELIUM_HOOKSPEC_VERSION = (1, 0)

@hookimpl
def modelium_analyze(path):
    raise RuntimeError("boom")
"""

VERSION = "2.7.1"


def package(folder: Path, distribution: str, entry: str, code: str) -> Path:
    """The source tree of a plugin, as its author would keep it."""
    module = distribution.replace("-", "_")
    source = folder / distribution / "src" / module
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(code)
    (folder / distribution / "pyproject.toml").write_text(
        f"""
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "{VERSION}"
dependencies = ["modelium"]

[project.entry-points.modelium]
{entry} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["src/{module}"]
"""
    )
    return folder / distribution


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed them: one that is good, one that raises, and three that can't be used at all."""
    folder = tmp_path_factory.mktemp("packages")
    sources = [
        package(folder, "acme-slopes", "slopes", SLOPES),
        package(folder, "acme-raises", "raises", RAISES),
        *(package(folder, name, entry, code) for name, (entry, code, _) in BROKEN.items()),
    ]
    target = folder / "site"
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, site: Path) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("plugins")
    env = {"PYTHONPATH": str(site), "SLOPES_SEEN": str(folder / "seen")}
    service = Served(folder / "root", config(folder), env=env)
    try:
        yield service.start()
    finally:
        service.down()


def config(folder: Path, budget_bytes: int | None = None) -> dict[str, object]:
    policies: dict[str, object] = {"min_resident_seconds": 0, "keep_above_qps": 1000, "fairness_after_s": 3600}
    if budget_bytes is not None:
        policies["device_budget_bytes"] = {"cpu:0": budget_bytes}
    return {
        "orchestration": {"settle_s": 0.3, "rescan_interval_s": 2, "policies": policies},
        "eviction": {"name": "largest", "notes": str(folder / "ranked")},
    }


def test_good_and_broken_plugins_are_listed_by_name_and_version(service: Served) -> None:
    listed = {plugin["name"]: plugin for plugin in service.get("/plugins")}
    good = listed["slopes"]
    assert (good["distribution"], good["version"], good["error"]) == ("acme-slopes", VERSION, None)
    assert {"modelium_analyze", "modelium_converters", "modelium_eviction_policies"} <= set(good["hooks"])
    for distribution, (name, _, said) in BROKEN.items():
        left_out = listed[name]
        assert (left_out["distribution"], left_out["version"]) == (distribution, VERSION)
        assert said in left_out["error"] and left_out["hooks"] == []
    wrong = service.get("/health")["wrong"]
    assert sum("is left out" in line for line in wrong) == len(BROKEN)
    told = service.cli("plugins").stdout
    assert all(f"{distribution} {VERSION}" in told for distribution in ("acme-slopes", *BROKEN))


def test_a_format_of_its_own_is_converted_and_served(service: Served, tmp_path: Path) -> None:
    (tmp_path / "steep.slope").write_text('{"slope": 2.5}')
    service.drop(tmp_path / "steep.slope")
    service.until_state("steep.slope", "READY")
    assert infer(service, "steep.slope", [1, 2]) == [2.5, 5]
    born = service.get("/models/steep.slope/explain")["transitions"][0]
    assert "the line became ONNX" in born["reason"]
    (kept,) = (service.root / "trash").glob("steep.slope*")
    assert json.loads(kept.read_text()) == {"slope": 2.5}


def test_its_word_on_completeness_is_waited_for(service: Served) -> None:
    """It grows by pieces that are longer apart than the settle time, and only its own format knows."""
    place = service.root / "incoming" / "slow.slope"
    place.write_text('{"slope": ')
    service.until(lambda: "closing brace" in _reason(service, "incoming/slow.slope"), what="its word to be told")
    with place.open("a") as file:
        file.write("3}")
    service.until_state("slow.slope", "READY")
    assert infer(service, "slow.slope", [1]) == [3]


def _reason(service: Served, name: str) -> str:
    return str(service.ps().get(name, {}).get("reason", ""))


def test_what_it_knows_and_nobody_serves_is_named(service: Served, tmp_path: Path) -> None:
    (tmp_path / "bent.slope").write_text('{"curve": 3}')
    told = service.post("/plan", {"path": str(tmp_path / "bent.slope")})
    assert told["analysis"]["summary"] == "a curve of order 3" and told["refused"]
    service.drop(tmp_path / "bent.slope")
    service.until(lambda: service.state("quarantine/bent.slope") == "INVALID", what="it to be refused")
    assert "curve" in _reason(service, "quarantine/bent.slope")


def test_what_its_converter_refuses_is_refused_in_its_words(service: Served, tmp_path: Path) -> None:
    (tmp_path / "flat.slope").write_text('{"slope": 0}')
    service.drop(tmp_path / "flat.slope")
    service.until(lambda: service.state("quarantine/flat.slope") == "INVALID", what="it to be refused")
    assert "nothing to compute" in _reason(service, "quarantine/flat.slope")


def test_a_plugin_that_raises_loses_only_its_answer(service: Served) -> None:
    """It raised on every drop above, in the inspector's process; the service tells of it."""
    listed = {plugin["name"]: plugin for plugin in service.get("/plugins")}
    assert listed["raises"]["error"] is None
    assert any("boom" in failure for failure in listed["raises"]["failures"]), listed["raises"]


def test_it_hears_of_transitions(service: Served, tmp_path: Path) -> None:
    seen = Path(service.env["SLOPES_SEEN"]).read_text().splitlines()
    assert "runtime:triton UP" in seen and "steep.slope READY" in seen


def test_its_eviction_policy_decides(service: Served, tmp_path: Path) -> None:
    """The least recently used one is small, and stays; the largest goes."""
    sizes: dict[str, int] = {}
    made: dict[str, Toy] = {}
    for name, ballast in (("small", 20), ("large", 150), ("newcomer", 60)):
        made[name] = toy(tmp_path / name, ballast_bytes=ballast * 2**20)
        service.drop(made[name].path)
        service.until_state(name, "READY")
        sizes[name] = service.get(f"/models/{name}/explain")["measured"]["memory_bytes"]
    for name, model in service.ps().items():
        if model["state"] == "READY":
            service.post(f"/models/{name}/unload")
    service.stop()
    folder = Path(service.env["SLOPES_SEEN"]).parent
    service.configure(config(folder, sizes["small"] + sizes["large"] + sizes["newcomer"] // 2))
    service.start()
    for name in ("small", "large", "newcomer"):
        assert infer(service, name, [1]) == [2]
    assert service.state("small") == "READY" and service.state("large") == "COLD"
    ranked = [json.loads(line) for line in (folder / "ranked").read_text().splitlines()]
    assert ["large", "small"] in ranked


def test_a_policy_that_is_not_there_is_one_clear_error(service: Served, tmp_path: Path) -> None:
    file, root = tmp_path / "modelium.yaml", tmp_path / "root"
    file.write_text(json.dumps({"eviction": {"name": "largst", "notes": "x"}}))
    done = service.cli("serve", "--root", str(root), "--config", str(file), "--port", "0", check=False)
    assert done.returncode != 0 and "did you mean 'largest'" in done.stderr and "Traceback" not in done.stderr
    assert refused(service, "GET", "/models/none-such").status == 404
