from __future__ import annotations

from collections.abc import Iterator

import pytest
from real_triton import Triton


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """One server for all tests of templates; each gives its models names of their own."""
    server = Triton(tmp_path_factory.mktemp("triton"))
    yield server
    server.close()
