"""The models by name, and how one is built.

A model is one line of `FAMILIES`. Importing its module registers it with timm, and `build_model` does so; the module of
the ViTs is ``models_sar``. Nothing slow is imported before that, so a command line can list the names at once.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from utils import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Family:
    """Models of one module.

    Attributes:
        module: registers them with timm.
        names: of the baselines; each also exists with ``_sar``.
        patch_size: px between two patches; in a pyramid, of its first stage.
        query: default of ``similarity_query``: ``cls``, or ``mean`` for models without a class token.
    """

    module: str
    names: tuple[str, ...]
    patch_size: int
    query: str = "cls"


FAMILIES = (
    Family("models_sar", ("vit_base", "vit_small", "vit_tiny"), 16),
    Family("models.t2t", ("t2t_vit_14", "t2t_vit_t_14"), 16),
    Family("models.pvt", ("pvt_small",), 4),
    Family("models.cvt", ("cvt_13",), 4),
    Family("models.swin", ("swin_tiny",), 4, query="mean"),
)
MODELS: dict[str, Family] = {
    f"{name}{suffix}": family for family in FAMILIES for name in family.names for suffix in ("", "_sar")
}


@dataclass(frozen=True)
class ModelSettings:
    """The settings that `build_model` builds a model from.

    Attributes:
        name: a key of `MODELS`.
        num_classes: 0 for none.
        input_size, patch_size: px.
        last_block, similarity, similarity_query: see `models_sar.LastBlock.attach`.
        drop: rate of dropout after the projections of attention and MLP.
        drop_path: rate of stochastic depth.
        sizes: other sizes by timm's names (``embed_dim``, ``depth``, ...).
    """

    name: str
    num_classes: int
    input_size: int
    patch_size: int
    last_block: str
    similarity: str = "dot"
    similarity_query: str = "cls"
    drop: float = 0.0
    drop_path: float = 0.0
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = {"img_size": self.input_size, "patch_size": self.patch_size, **self.sizes}
        return f"--model {self.name} with {sizes}"


def register(name: str) -> None:
    """Import the module that registers the model ``name`` with timm."""
    importlib.import_module(MODELS[name].module)


def build_model(settings: ModelSettings, device: "torch.device", seed: int = 0) -> "tuple[nn.Module, tuple[int, int]]":
    """Build a model and try it on two black images.

    Args:
        settings: see `ModelSettings`.
        device: of the weights.
        seed: of the weights; torch's generator continues from there.

    Returns:
        The model in evaluation mode, and the grid ``(h, w)`` of its similarity maps.

    Raises:
        UserError: the sizes make no model, or none that returns similarity maps.
    """
    import timm
    import torch

    register(settings.name)
    torch.manual_seed(seed)
    try:
        model = timm.create_model(
            settings.name,
            num_classes=settings.num_classes,
            last_block=settings.last_block,
            similarity=settings.similarity,
            similarity_query=settings.similarity_query,
            proj_drop_rate=settings.drop,
            drop_path_rate=settings.drop_path,
            img_size=settings.input_size,
            patch_size=settings.patch_size,
            **settings.sizes,
        )
        model.to(device)
        with torch.inference_mode():
            black = torch.zeros(2, 3, settings.input_size, settings.input_size, device=device)
            _, similarity = model.eval()(black, return_similarity=True)
    except Exception as error:  # impossible sizes raise errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{settings}: {reason}") from error
    return model, tuple(similarity.shape[-2:])
