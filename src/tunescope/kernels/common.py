"""What the kernels' public functions share: refusals in the same words, and the layout they want."""

from torch import Tensor

from tunescope.errors import UserError


def check_known(implementation: str, known: tuple[str, ...], what: str) -> None:
    """Raises UserError for an implementation that is not among the known ones of `what`."""
    if implementation not in known:
        raise UserError(
            f"there is no implementation {implementation!r} of the {what}", cure=f"take one of {', '.join(known)}"
        )


def not_importable(package: str, error: ImportError) -> UserError:
    """To raise where an optional package was asked for."""
    return UserError(
        f"the package {package} cannot be imported",
        cause=str(error),
        cure="pip install --no-build-isolation -r requirements/cuda.txt, or take the implementation triton",
    )


def time_contiguous(x: Tensor) -> Tensor:
    """x itself where its last axis, time, has stride 1; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
