"""The driver's contract with models of OpenVINO, on the real tritonserver of the wheel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from driver_lab import Lab, TritonContract
from modelium_plugin_triton.backend import TritonBackend
from real_triton import analyse

from modelium.api import LoadRequest
from modelium.api.testing import lay_out, plan_of
from tests.openvino_models import linear

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(600)]  # the first on a new machine installs OpenVINO


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("openvino"))
    yield lab
    await lab.end()


class TestOpenVinoModelsKeepTheContract(TritonContract):
    @pytest.fixture
    def make(self, lab: Lab, tmp_path: Path) -> Callable[[str], LoadRequest]:
        def make(name: str) -> LoadRequest:
            drop = linear(tmp_path / name / "net.xml")
            analysis = analyse(drop)
            (offer,) = (o for o in TritonBackend().offers(analysis, None, ()) if o.serving == "openvino-python")
            plan = plan_of(offer)
            lay_out(TritonBackend().layout(name, analysis, plan), drop, lab.repository / name)
            return lab.request(name, plan, analysis)

        return make

    @pytest.fixture
    def good_model(self, make: Callable[[str], LoadRequest]) -> LoadRequest:
        return make("good")

    @pytest.fixture
    def another_model(self, make: Callable[[str], LoadRequest]) -> LoadRequest:
        return make("another")

    @pytest.fixture
    def bad_model(self, make: Callable[[str], LoadRequest]) -> LoadRequest:
        bad = make("bad")
        for file in bad.path.rglob("*.xml"):
            file.write_text("<net/>")
        return bad
