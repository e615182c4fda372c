"""Figures 4, 5 and 6 and the length ablation, looked up: what one step took the paper's A40, at length 128."""

from functools import cache

from tunescope import paper

SEQ_LEN_TOKENS = 128


@cache
def points(model: str) -> list[tuple[int, int]]:
    """(top_k, batch) of the bars of Figure 4: sparse first, then dense, by batch, as the launchers ran them."""
    bars = {(int(row["top_k"]), int(row["batch_size"])) for row in paper.rows("phase_latency") if row["model"] == model}
    return sorted(bars)


def phase_s(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> dict[str, float]:
    """Phase (forward, backward, optimizer) -> seconds of Figure 4; empty where the paper has no such bar."""
    return bar_values("phase_latency", "phase", "latency_s", model, top_k, batch_size, seq_len_tokens)


def layer_s(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> dict[str, float]:
    """Kind of layer -> seconds of Figure 5: forward and backward of all layers together."""
    return bar_values("layer_latency", "layer", "latency_s", model, top_k, batch_size, seq_len_tokens)


def kernel_us(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> dict[str, float]:
    """Operator of the MoE layer -> microseconds of Figure 6: the mean of one launch, for one expert."""
    return bar_values("kernel_latency", "kernel", "latency_us", model, top_k, batch_size, seq_len_tokens)


def moe_pct(model: str) -> float:
    """The MoE layer's part of the layers' time in Figure 5 (%), mean over the model's bars."""
    shares = [
        100 * layers["moe"] / sum(layers.values())
        for top_k, batch in points(model)
        if (layers := layer_s(model, top_k, batch, SEQ_LEN_TOKENS))
    ]
    return sum(shares) / len(shares)


def layers_of_step_frac(model: str) -> list[float]:
    """Of each bar, Figure 5's sum over Figure 4's forward and backward, which should be about the same."""
    fractions = []
    for top_k, batch in points(model):
        layers = layer_s(model, top_k, batch, SEQ_LEN_TOKENS)
        phases = phase_s(model, top_k, batch, SEQ_LEN_TOKENS)
        if layers and phases:
            fractions.append(sum(layers.values()) / (phases["forward"] + phases["backward"]))
    return fractions


def ablation_s(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> float | None:
    """Seconds of forward and backward at one length (section IV-B6). The paper ran the largest batch that fits, and
    says which only at length 128."""
    for row in paper.rows("seq_len_ablation"):
        if (row["model"], int(row["top_k"]), int(row["seq_len_tokens"])) == (model, top_k, seq_len_tokens) and (
            row["batch_size"] == str(batch_size)
        ):
            return float(row["latency_s"])
    return None


def bar_values(
    table: str, key: str, value: str, model: str, top_k: int, batch_size: int, seq_len_tokens: int | None
) -> dict[str, float]:
    """Column `key` -> column `value` of the rows of one bar; empty where the paper has no such bar."""
    wanted = (model, top_k, batch_size, seq_len_tokens)
    return {
        row[key]: float(row[value])
        for row in paper.rows(table)
        if (row["model"], int(row["top_k"]), int(row["batch_size"]), int(row["seq_len_tokens"])) == wanted
    }
