"""Generated kernels of the tests go to a folder of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def generated_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETAINOPS_CACHE_DIR", str(tmp_path_factory.mktemp("fused")))
        yield
