"""The NVTX range around a sampled launch: where it belongs, in letters that every printer of ranges leaves alone.

Nsight Compute's CSV separates the fields of a range by colons and quotes them, and its filters give a meaning to
`/ [ ] + * @ ,`; so an operator `aten::mm` is written `aten.mm` here, and comes back as it was.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

SAMPLE = "tunescope"  # the range that ncu looks into; the one that says the place lies within it
_PATTERN = re.compile(r"\b(forward|recompute|backward)\|([\w.]*)\|([\w.]+)\|([\w.]*)")


class SampledPlace(NamedTuple):
    """phase: forward, recompute or backward. module: its path. op: as `aten::mm`. node: of autograd, or empty."""

    phase: str
    module: str
    op: str
    node: str


def range_name(phase: str, module: str, op: str, node: str) -> str:
    return "|".join((phase, module, _plain(op), _plain(node)))


def place_of(ranges: Iterable[str]) -> SampledPlace | None:
    """The place that the innermost of these ranges says, whatever else a printer put around it; None if none does."""
    for text in reversed(list(ranges)):
        if found := _PATTERN.search(text):
            phase, module, op, node = found.groups()
            return SampledPlace(phase, module, op.replace(".", "::"), node.replace(".", "::"))
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^\w.]", "_", name.replace("::", "."))
