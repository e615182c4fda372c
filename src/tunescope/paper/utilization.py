"""Figures 9 and 10, looked up: how much of the paper's A40 the kernels of the MoE layer used, at length 128."""

from tunescope.paper.latency import bar_values

TIME_WEIGHTED = "time_weighted"


def sm_percent(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> dict[str, float]:
    """Operator of the MoE layer, or TIME_WEIGHTED -> Figure 9's SM utilisation (%): of the busiest SM unit."""
    return bar_values("sm_utilization", "kernel", "sm_throughput_pct", model, top_k, batch_size, seq_len_tokens)


def memory_percent(model: str, top_k: int, batch_size: int, seq_len_tokens: int | None) -> dict[str, float]:
    """Operator of the MoE layer, or TIME_WEIGHTED -> Figure 10 (%): of the busiest memory unit, not of DRAM."""
    table, value = "memory_utilization", "memory_throughput_pct"
    return bar_values(table, "kernel", value, model, top_k, batch_size, seq_len_tokens)
