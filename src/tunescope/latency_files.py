"""What a breakdown of training steps leaves on disk beside steps.arrow: file names and columns.

profile_data/README.md says what every column means. No torch: measuring writes these, analysing reads them.
"""

import pyarrow as pa

PHASES_FILE = "phases.arrow"
SPANS_FILE = "spans.arrow"
MODULES_FILE = "modules.arrow"
CALLS_FILE = "calls.arrow"
EVENTS_FILE = "events.arrow"
MEMORY_EVENTS_FILE = "memory_events.arrow"
MEMORY_PARTS_FILE = "memory_parts.arrow"
TRACE_FILE = "trace.json.gz"
OOM_SNAPSHOT_FILE = "oom_snapshot.pickle"

# Names that the recorder gives its marks in a trace; whoever opens it in a viewer sees them too.
CALL_PREFIX = "nn.Module: "
MARK_PREFIX = "tunescope mark: "
PARAMETER_PREFIX = "tunescope gradient of: "
NODE_PREFIX = "autograd::engine::evaluate_function: "

# Marks, in the order in which the Trainer passes them. A recorded step is from RESUME to STEP_END; what lies between
# STEP_END and the next RESUME is the profiler's own.
RESUME, STEP_BEGIN, PRE_OPTIMIZER, OPTIMIZER, STEP_END = (
    "resume", "step_begin", "pre_optimizer", "optimizer", "step_end",
)  # fmt: skip

# Phases of a step, in the order of a table. "recompute" lies inside "backward" in PHASES_FILE, which is by clock, and
# beside it in everything that is by kernel.
FORWARD, RECOMPUTE, BACKWARD, CLIP, OPTIMIZER_STEP, REST = (
    "forward", "recompute", "backward", "clip", "optimizer", "rest",
)  # fmt: skip
PHASES = (FORWARD, RECOMPUTE, BACKWARD, CLIP, OPTIMIZER_STEP, REST)

# What an event is.
OP, CALL, NODE, PARAMETER, MARK, ANNOTATION, LAUNCH = "op", "call", "node", "parameter", "mark", "annotation", "launch"
KERNEL, MEMCPY, MEMSET, MEMORY = "kernel", "memcpy", "memset", "memory"
GPU_KINDS = (KERNEL, MEMCPY, MEMSET)


# What is counted of memory, and what the allocator says, which only a GPU has.
PARTS = ("frozen_weights", "trained_weights", "gradients", "buffers", "optimizer")
EVERYTHING = "everything"


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, dtype, nullable=False) for name, dtype in columns.items()])


_NAME = pa.dictionary(pa.int32(), pa.string())

PHASES_SCHEMA = _schema(step=pa.int32(), phase=_NAME, duration_ns=pa.int64(), host_duration_ns=pa.int64())
SPANS_SCHEMA = _schema(step=pa.int32(), module=pa.int32(), phase=_NAME, duration_ns=pa.int64())
MODULES_SCHEMA = _schema(
    module=pa.int32(), path=pa.string(), class_name=pa.string(), frozen_bytes=pa.int64(), trained_bytes=pa.int64()
)
CALLS_SCHEMA = _schema(
    call=pa.int32(), module=pa.int32(), is_recompute=pa.bool_(), sequence_begin=pa.int64(), sequence_end=pa.int64()
)
EVENTS_SCHEMA = _schema(
    kind=_NAME,
    name=_NAME,
    start_ns=pa.int64(),
    duration_ns=pa.int64(),
    thread=pa.int32(),
    device=pa.int16(),
    correlation=pa.int64(),
    sequence=pa.int64(),
    forward_thread=pa.int32(),
    ref=pa.int32(),
    allocated_bytes=pa.int64(),
)
MEMORY_PARTS_SCHEMA = _schema(moment=_NAME, part=_NAME, allocated_bytes=pa.int64())
