"""What Nsight Compute counts for a launch: the metrics that are collected, and the columns they become.

Figure 9 is SM_PERCENT and Figure 10 MEMORY_PERCENT, ncu's "Compute (SM) Throughput" and "Memory Throughput" of its
Speed Of Light section: each the busiest unit of its kind. The second is not DRAM, which has a metric of its own.
"""

import pyarrow as pa

DURATION_NS = "duration_ns"
SM_PERCENT, MEMORY_PERCENT, DRAM_PERCENT = "sm_percent", "memory_percent", "dram_percent"

# Column -> ncu's metric.
METRICS = {
    DURATION_NS: "gpu__time_duration.sum",
    SM_PERCENT: "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    MEMORY_PERCENT: "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    DRAM_PERCENT: "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_written_bytes": "dram__bytes_write.sum",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "sm_clock_hz": "sm__cycles_elapsed.avg.per_second",
    "dram_clock_hz": "dram__cycles_elapsed.avg.per_second",
}
# Without these there is no figure: they are asked for whatever ncu says of them.
ESSENTIAL = (DURATION_NS, SM_PERCENT, MEMORY_PERCENT, DRAM_PERCENT)
# What a launch was configured with, which is known without counting.
LAUNCH_METRICS = {
    "grid_blocks": "launch__grid_size",
    "block_threads": "launch__block_size",
    "registers_per_thread": "launch__registers_per_thread",
}

COUNTERS_FILE = "counters.arrow"
REPORT_FILE = "counters.ncu-rep"
NCU_LOG_FILE = "ncu.log"
SAMPLING_FILE = "sampling.json"
OP_WORK_FILE = "op_work.arrow"

COUNTERS_SCHEMA = pa.schema(
    [
        pa.field("kernel", pa.string(), nullable=False),  # demangled, and as the compiler named it
        pa.field("mangled", pa.string(), nullable=False),
        pa.field("ranges", pa.list_(pa.string()), nullable=False),  # NVTX push/pop ranges around it, outermost first
        *(pa.field(name, pa.float64()) for name in (*METRICS, *LAUNCH_METRICS)),
    ]
)
# What each operator of the layers had to do in one step, by measure/op_work.py: the least that it could have moved.
OP_WORK_SCHEMA = pa.schema(
    [
        pa.field(name, dtype, nullable=False)
        for name, dtype in {
            "path": pa.string(), "phase": pa.string(), "node": pa.string(), "op": pa.string(), "num_calls": pa.int64(),
            "flop": pa.int64(), "read_bytes": pa.int64(), "written_bytes": pa.int64(),
        }.items()
    ]
)  # fmt: skip

# ncu writes a quantity in the unit that its size suggests, unless told not to; a clock also in cycles over time.
_SCALES = {
    "n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1.0, "K": 1e3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
}  # fmt: skip
_NANOSECONDS = {
    "": 1.0, "nsecond": 1.0, "ns": 1.0, "usecond": 1e3, "us": 1e3, "msecond": 1e6, "ms": 1e6, "second": 1e9, "s": 1e9,
}  # fmt: skip
_CYCLES = "cycle/"


def in_column_unit(column: str, value: float, unit: str) -> float | None:
    """A metric's value in its column's unit: ns, bytes, Hz, percent; None for a unit that cannot be. An empty unit is
    taken for the one that ncu calls base."""
    unit = unit.strip()
    if column == DURATION_NS:
        return value * _NANOSECONDS[unit] if unit in _NANOSECONDS else None
    if column.endswith("_hz") and unit.startswith(_CYCLES):
        time = unit.removeprefix(_CYCLES)
        return value * 1e9 / _NANOSECONDS[time] if time and time in _NANOSECONDS else None
    for suffix, base in (("_bytes", "byte"), ("_hz", "hz")):
        if column.endswith(suffix) and unit:
            prefix = unit[: -len(base)] if unit.lower().endswith(base) else None
            return value * _SCALES[prefix] if prefix in _SCALES else None
    return value
