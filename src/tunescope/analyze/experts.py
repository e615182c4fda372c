"""Tokens per expert as tidy tables: the load of each expert, and how even the loads of a layer are."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from tunescope.expert_tokens import AFTER, BEFORE, EXPERT_TOKENS_FILE
from tunescope.results import PointFormatError

ALL_LAYERS = "all"  # in the column `layer`: the mean over layers
_GROUP = ["probe", "when", "layer"]
_OF_PROBE = ["num_queries", "num_tokens", "padding_tokens", "top_k", "num_experts"]
LOAD_COLUMNS = (*_GROUP, "expert", "tokens", "tokens_per_query", *_OF_PROBE, "router_entropy_bits")
STATISTICS = (
    "mean_tokens_per_query", "expert_imbalance", "coefficient_of_variation", "variance_population",
    "load_entropy_bits", "busiest_expert",
)  # fmt: skip
SUMMARY_COLUMNS = (*_GROUP, *_OF_PROBE, *STATISTICS, "router_entropy_bits")


@dataclass(frozen=True, kw_only=True)
class ExpertPoint:
    """The expert loads of one measured run, and what a reader must know of the run to believe them.

    label: what was trained, for people (`Point.label`). weights: `random` or `checkpoint`. synthetic_probes: probes
    whose queries are random words of the data set's lengths. loads: of expert_tokens().
    """

    label: str
    model: str
    device: str
    preset: str
    weights: str
    synthetic_probes: tuple[str, ...]
    loads: pd.DataFrame


def expert_tokens(rows: pa.Table) -> pd.DataFrame:
    """Rows of EXPERT_TOKENS_SCHEMA, checked, as one row per probe, moment, layer and expert with LOAD_COLUMNS.

    layer: its number as text, or ALL_LAYERS, which comes last. There `tokens` is the sum over layers, and
    `tokens_per_query` and `router_entropy_bits` are means over layers: a query's tokens pass through every layer, so
    that the loads of a layer and of ALL_LAYERS both sum to tokens per query x top_k.

    Raises PointFormatError where the counts of a layer do not sum to num_tokens x top_k, and for rows that cannot be
    of one probe run twice.
    """
    frame = rows.to_pandas()
    if frame.empty:
        return pd.DataFrame(columns=list(LOAD_COLUMNS))
    frame["probe"] = pd.Categorical(frame["probe"], categories=frame["probe"].unique(), ordered=True)
    frame["when"] = pd.Categorical(frame["when"], categories=[BEFORE, AFTER], ordered=True)
    frame = frame.sort_values([*_GROUP, "expert"], ignore_index=True)
    _check(frame)
    over_layers = frame.groupby(["probe", "when", "expert"], observed=True, as_index=False).agg(
        {"tokens": "sum", "router_entropy_bits": _mean} | dict.fromkeys(_OF_PROBE, "first")
    )
    frame["tokens_per_query"] = frame["tokens"] / frame["num_queries"]
    over_layers["tokens_per_query"] = over_layers["tokens"] / over_layers["num_queries"] / frame["layer"].nunique()
    frame["layer"] = frame["layer"].astype(str)
    over_layers["layer"] = ALL_LAYERS
    joined = pd.concat([frame, over_layers], ignore_index=True)
    # Stable: layers keep the order of their numbers, the mean over them comes last, experts stay in order.
    joined = joined.sort_values(["probe", "when"], kind="stable", ignore_index=True)
    joined[["probe", "when"]] = joined[["probe", "when"]].astype(str)
    return joined[list(LOAD_COLUMNS)]


def expert_summary(loads: pd.DataFrame) -> pd.DataFrame:
    """How even the loads of expert_tokens() are: one row per probe, moment and layer, in its order, SUMMARY_COLUMNS.

    See load_statistics() for the columns; router_entropy_bits is the mean over tokens of each token's own entropy.
    """
    if loads.empty:
        return pd.DataFrame(columns=list(SUMMARY_COLUMNS))
    num_experts = int(loads["num_experts"].iloc[0])
    first = loads.iloc[::num_experts].reset_index(drop=True)
    statistics = load_statistics(loads["tokens_per_query"].to_numpy().reshape(-1, num_experts))
    return pd.concat([first, statistics], axis=1)[list(SUMMARY_COLUMNS)]


def load_statistics(tokens_per_query_GE: np.ndarray) -> pd.DataFrame:
    """STATISTICS of loads (groups, experts), one row per group. Units: tokens/query but where said.

    expert_imbalance: max / mean, from 1 (even) to E / top_k (the same experts for every token).
    coefficient_of_variation: population standard deviation / mean, from 0.
    variance_population: (tokens/query)^2, divided by E and not E - 1; it grows with the square of a query's length.
    load_entropy_bits: of the experts' shares; log2(E) is even.
    busiest_expert: from 0; the first where several are.
    """
    loads_GE = np.asarray(tokens_per_query_GE, dtype=float)
    mean_G = loads_GE.mean(axis=1)
    shares_GE = loads_GE / loads_GE.sum(axis=1, keepdims=True)
    information_GE = -np.log2(shares_GE, out=np.zeros_like(shares_GE), where=shares_GE > 0)
    return pd.DataFrame(
        {
            "mean_tokens_per_query": mean_G,
            "expert_imbalance": loads_GE.max(axis=1) / mean_G,
            "coefficient_of_variation": loads_GE.std(axis=1) / mean_G,
            "variance_population": loads_GE.var(axis=1),
            "load_entropy_bits": (shares_GE * information_GE).sum(axis=1),
            "busiest_expert": loads_GE.argmax(axis=1),
        }
    )


def _mean(column: pd.Series) -> float:
    """With a layer that has no number there is none of all."""
    return float(column.mean(skipna=False))


def _check(frame: pd.DataFrame) -> None:
    """frame: the rows sorted by group and expert. Raises PointFormatError."""
    if frame["when"].isna().any():
        raise _not_a_probe(f"a moment other than {BEFORE} and {AFTER}")
    if (frame[["top_k", "num_experts"]].nunique() != 1).any():
        raise _not_a_probe("several numbers of experts, or of experts a token")
    if (frame.groupby("probe", observed=True)[_OF_PROBE].nunique() != 1).any(axis=None):
        raise _not_a_probe("other queries before training than after, or in one layer than in another")
    top_k, num_experts = int(frame["top_k"].iloc[0]), int(frame["num_experts"].iloc[0])
    if not 1 <= top_k <= num_experts or (frame[["num_queries", "num_tokens"]] < 1).any(axis=None):
        raise _not_a_probe(f"top_k {top_k} of {num_experts} experts, or a probe of no token")
    groups = frame.groupby(_GROUP, observed=True)
    whole = len(frame) == num_experts * groups.ngroups
    if not whole or (frame["expert"] != np.tile(np.arange(num_experts), groups.ngroups)).any():
        raise _not_a_probe(f"a layer that has not each of {num_experts} experts once")
    layers = frame.groupby(["probe", "when"], observed=True)["layer"].nunique()
    if (layers != frame["layer"].nunique()).any():
        raise _not_a_probe("a layer that was counted in one probe and not in another")
    if (frame["tokens"] < 0).any() or (frame["tokens"] > frame["num_tokens"]).any():
        raise _not_a_probe("an expert with more tokens than the probe has, or fewer than none")
    sums = groups.agg({"tokens": "sum", "num_tokens": "first"}).reset_index()
    for row in sums[sums["tokens"] != sums["num_tokens"] * top_k].to_dict("records"):
        raise PointFormatError(
            f"{EXPERT_TOKENS_FILE}: layer {row['layer']} gave its experts {row['tokens']} tokens of probe "
            f"{row['probe']} {row['when']} training; {row['num_tokens']} tokens x top-{top_k} are "
            f"{row['num_tokens'] * top_k}",
            cause="tokens were counted twice or lost, or the file was changed",
            cure=_RERUN,
        )


def _not_a_probe(what: str) -> PointFormatError:
    return PointFormatError(f"{EXPERT_TOKENS_FILE} holds {what}", cause="it is not of one measured run", cure=_RERUN)


_RERUN = "delete the point's folder and run the launcher again; the other points stay"
