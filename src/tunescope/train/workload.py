"""What one run trains, as data: made by a launcher without torch, carried out by the engine."""

from dataclasses import asdict, dataclass
from typing import Any

from tunescope.config import Point


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run in full.

    recipe: LLaMA-Factory arguments before the point's own.
    model_config: the config.json of the point.
    model_dir: folder whose weights and tokenizer are linked, None for neither.
    data_entry: LLaMA-Factory's description of the user's data file, None for synthetic queries.
    num_samples: queries in the training set.
    max_steps: optimizer steps at most; None: as many epochs as the recipe says.
    moe: path that the loaded model's MoE blocks are switched to; None: as the model has them.
    checkpointed_layers: numbers of the decoder layers that are recomputed in backward; None: as the recipe says.
    graphs: steps are replayed as CUDA graphs.
    """

    point: Point
    recipe: dict[str, Any]
    model_config: dict[str, Any]
    model_dir: str | None
    data_entry: dict[str, Any] | None
    num_samples: int
    max_steps: int | None
    use_cpu: bool
    moe: str | None = None
    checkpointed_layers: tuple[int, ...] | None = None
    graphs: bool = False

    def to_json(self) -> dict[str, Any]:
        """All but where files lie, which differs between machines and changes nothing that is trained.

        Without what is left as it is, so that points measured before it existed keep their identity.
        """
        content = asdict(self)
        for name in ("moe", "checkpointed_layers", "graphs"):
            if content[name] in (None, False):
                del content[name]
        del content["model_dir"], content["data_entry"]
        return content
