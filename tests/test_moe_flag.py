"""--moe: which path the experts of a launcher's points take, how rows say it, and that both train."""

from pathlib import Path

import pytest
from launching import REPO, run, table, tunescope

from tunescope.errors import UserError
from tunescope.measure.plan import Options, make_plan, moe_of

POINT = "random:sparse:bs=2:seq=16"


def spec_of(**flags: str):
    return make_plan(Options(preset="tiny", points=POINT, **flags)).specs[0]


def test_auto_is_the_models_own_and_leaves_identities_as_they_were() -> None:
    for model, path in (("mixtral", "stock"), ("qwen3_moe", "stock"), ("blackmamba", "grouped")):
        auto, named = spec_of(model=model), spec_of(model=model, moe=path)
        assert moe_of(auto.workload) == path
        assert auto.point_json() == named.point_json()
        assert "moe" not in auto.workload.to_json()
        assert path not in auto.point_id


@pytest.mark.parametrize(("model", "path"), [("mixtral", "grouped"), ("qwen3_moe", "grouped"), ("blackmamba", "loop")])
def test_another_path_is_another_point(model: str, path: str) -> None:
    usual, other = spec_of(model=model), spec_of(model=model, moe=path)
    assert moe_of(other.workload) == other.identity()["moe"] == path
    assert other.point_id == f"{usual.point_id}-{path}"
    assert other.point_json()["recipe_hash"] != usual.point_json()["recipe_hash"]


@pytest.mark.parametrize(("model", "path"), [("mixtral", "loop"), ("blackmamba", "stock"), ("mixtral", "fast")])
def test_a_path_that_the_model_has_not_is_refused(model: str, path: str) -> None:
    with pytest.raises(UserError, match="has no such path"):
        spec_of(model=model, moe=path)
    done = tunescope("run", "throughput", "--model", model, "--preset", "tiny", "--moe", path)
    assert done.code == 2
    assert "use one of auto" in done.err


def test_stock_and_grouped_stand_side_by_side(tmp_path: Path) -> None:
    for path in ("stock", "grouped"):
        launcher = [REPO / "mixtral_tp.sh", "--preset", "tiny", "--points", POINT, "--queries", "12", "--out", tmp_path]
        done = run(*launcher, "--moe", path)
        assert done.code == 0, done.err
    rows = table(tmp_path)
    assert {row["moe"]: row["status"] for row in rows} == {"stock": "ok", "grouped": "ok"}
    text = run("python3", REPO / "throughput.py", tmp_path).out
    assert "MoE path" in text.split("\n")[2]
