"""Models by name, and the function that builds them.

A model is one line of `FAMILIES`. Its module, ``models_sar`` for the ViTs, registers it with timm when `build_model`
imports it. Torch is not imported before, so a command line can list the names at once.
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
    """The models of one module.

    Attributes:
        module: the module that registers the models with timm.
        names: the baselines; each also exists with ``_sar``.
        patch_size: stride of the patches in px, in pyramids that of the first stage.
        query: default query of the similarity S: ``cls``, or ``mean`` for models without a [CLS] token.
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
    """The settings of a model.

    Attributes:
        name: a key of `MODELS`.
        num_classes: size of the classifier; 0 for a model without one.
        input_size, patch_size: px.
        last_block, similarity, similarity_query: see `models_sar.LastBlock.attach`.
        drop: dropout rate of the projections in attention and MLP.
        drop_path: rate of stochastic depth.
        sizes: further arguments by timm's names, such as ``embed_dim`` and ``depth``.
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
    """Build a model on ``device``, in evaluation mode; returns it and the grid ``(h, w)`` of its similarity maps.

    The weights are drawn from torch's global generator, which is seeded with ``seed`` and not reset afterwards. A
    forward pass of two black images checks the sizes.

    Raises:
        UserError: the sizes give no working model, or one without similarity maps.
    """
    import timm
    import torch

    # 1. build
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
        # 2. check by a forward pass
        with torch.inference_mode():
            black = torch.zeros(2, 3, settings.input_size, settings.input_size, device=device)
            _, similarity = model.eval()(black, return_similarity=True)
    except Exception as error:  # an impossible size raises errors of many types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{settings}: {reason}") from error
    return model, tuple(similarity.shape[-2:])
