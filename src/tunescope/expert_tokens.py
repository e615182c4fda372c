"""What the probe of tokens per expert leaves in a point's folder: its file name and columns.

profile_data/README.md says what every column means. No torch: measuring writes it, analysing reads it.
"""

import pyarrow as pa

EXPERT_TOKENS_FILE = "expert_tokens.arrow"
# The probe runs before the first step and after the last.
BEFORE, AFTER = "before", "after"

# One row per probe, moment, layer and expert; router_entropy_bits is the layer's, the rest from num_queries on the
# probe's, both repeated.
EXPERT_TOKENS_SCHEMA = pa.schema(
    [
        pa.field("probe", pa.string(), nullable=False),
        pa.field("when", pa.string(), nullable=False),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("expert", pa.int32(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("num_queries", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("padding_tokens", pa.int64(), nullable=False),
        pa.field("top_k", pa.int32(), nullable=False),
        pa.field("num_experts", pa.int32(), nullable=False),
        pa.field("router_entropy_bits", pa.float64(), nullable=False),
    ]
)
