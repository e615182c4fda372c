"""How a model is divided: its decoder layers, their parts, and the operators of the parts that a figure looks into.

What differs between models is data: families.Layout. A model that has none is divided by the names of its own modules.
Patterns are searched in a module's path below its layer, and in `NODE|OUTER OP|OP|KERNEL` of a piece of work (the node
is empty outside backward; without a GPU the kernel is the operator); the first rule that fits gives the label.
"""

import re
from functools import cache

import pandas as pd

from tunescope.families import FAMILIES
from tunescope.families.family import COPY, MATMUL, Layout

# Parts outside the layers, in the order of a step. What the model's own forward does last is the loss.
EMBEDDING, FINAL_NORM, HEAD, OUTSIDE_LAYERS = "embedding", "final_norm", "lm_head + loss", "rest of the model"
LAYER_ITSELF = "layer itself"  # residual additions

LAYOUTS = tuple(family.layout for family in FAMILIES.values())

# For operators of any module: what kind of work it is.
_KINDS = (
    ("copy", COPY),
    ("matmul", MATMUL),
    ("dequantisation", r"dequantize"),
    ("attention", r"attention|flash_attn"),
    ("norm", r"norm"),
    ("softmax", r"softmax"),
    ("index", r"\|aten::(index|gather|scatter|nonzero|topk|sort|embedding|where|one_hot)\w*\|"),
    ("reduction", r"\|aten::(sum|mean|max|min|amax|argmax)\w*\|"),
    ("gradient accumulation", r"AccumulateGrad\|"),
    ("elementwise", ""),
)


class Division:
    """Layer, part and operator label of every module path of one model."""

    def __init__(self, modules: pd.DataFrame) -> None:
        """modules: latency_files.MODULES_SCHEMA."""
        classes = dict(zip(modules["path"], modules["class_name"], strict=True))
        self.layout = next((known for known in LAYOUTS if known.block_class in classes.values()), None)
        self._stacks = _stacks(classes, self.layout)
        self._embeddings = {path for path, class_name in classes.items() if "Embedding" in class_name}
        self._root = str(modules["path"].iloc[0] or modules["class_name"].iloc[0]) if len(modules) else ""
        self._classes = classes
        self.place = cache(self._place)
        self.op_label = cache(self._op_label)

    def _place(self, module: str) -> tuple[int, str, str]:
        """(decoder layer from 0 or -1, part, path below the layer) of a module's path, or of a name in parentheses."""
        if module.startswith("(") or module == "unattributed":
            return -1, module, ""
        for stack in self._stacks:
            if match := re.match(rf"{re.escape(stack)}\.(\d+)(\..*)?$", module):
                below = match[2] or ""
                part = self._part(below)
                return int(match[1]), part if len(self._stacks) == 1 else f"{stack}: {part}", below
        return -1, self._outside_part(module), ""

    def _part(self, below: str) -> str:
        if not below:
            return LAYER_ITSELF
        if self.layout is not None:
            return next((name for name, pattern in self.layout.parts.items() if re.search(pattern, below)), "other")
        return below.split(".")[1]

    def _outside_part(self, module: str) -> str:
        name = module.rpartition(".")[2]
        inside = module.partition("lora_")[0]
        if any(inside.startswith(path) for path in self._embeddings) and "rotary" not in name:
            return EMBEDDING
        if "head" in module or self._is_whole_model(module):
            return HEAD
        return FINAL_NORM if "norm" in name.lower() else OUTSIDE_LAYERS

    def _is_whole_model(self, module: str) -> bool:
        """Whether its forward is the one that computes the loss: the root, or what a PEFT model wraps."""
        class_name = self._classes.get(module, module)
        return module == self._root or bool(re.search(r"For[A-Z]\w+$|^Peft|^LoraModel$", class_name))

    def _op_label(self, part: str, below: str, node: str, outer_op: str, op: str, kernel: str) -> str:
        """What a piece of work does within its layer, in the words of the layout, or by kind where it has none."""
        work = f"{node}|{outer_op}|{op}|{kernel}"
        if self.layout is None or part not in self.layout.operators:
            return next(label for label, pattern in _KINDS if re.search(pattern, work))
        for rule in self.layout.operators[part]:
            path = re.search(rule.path, below)
            if path and re.search(rule.work, work):
                return rule.label.format(path[0], *path.groups())
        return "other"


def _stacks(classes: dict[str, str], layout: Layout | None) -> list[str]:
    """Paths of the lists of decoder layers: those that hold the layout's block, or the outermost lists of two or more
    modules of one class."""
    if layout is not None:
        blocks = [path for path, class_name in classes.items() if class_name == layout.block_class]
        holders = [match[1] for path in blocks if (match := re.fullmatch(r"(.+)\.\d+\.\w+", path))]
        if holders:
            return list(dict.fromkeys(holders))
    stacks: list[str] = []
    for path, class_name in classes.items():
        if class_name != "ModuleList" or any(path.startswith(f"{outer}.") for outer in stacks):
            continue
        members = [kind for name, kind in classes.items() if re.fullmatch(rf"{re.escape(path)}\.\d+", name)]
        if len(members) > 1 and len(set(members)) == 1:
            stacks.append(path)
    return stacks
