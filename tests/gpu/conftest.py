"""Everything here needs a GPU, and says so where there is none."""

from pathlib import Path

import pytest

from tunescope.gpus import list_gpus

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if list_gpus().gpus:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="NEEDS A GPU, none was found: this code did not run here"))
