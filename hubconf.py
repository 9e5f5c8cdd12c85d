"""The registered models for ``torch.hub``: ``torch.hub.load(folder, "vit_small_sar", source="local")``.

``folder`` is this repository; keywords go to the model. ``torch.hub`` imports the modules `models` and `utils` under
these names: a program that has other modules of the same names loaded cannot use it.
"""

from collections.abc import Callable as _Callable

import timm
from torch import nn as _nn

import models

dependencies = ["torch", "timm", "einops"]


def _entry_point(name: str) -> "_Callable[..., _nn.Module]":
    """The function that builds the registered model ``name``."""

    def create(**kwargs) -> _nn.Module:
        models.register(name)
        return timm.create_model(name, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""``{name}`` with random weights.

    Args:
        kwargs: those of ``timm.create_model`` and of the model, for example ``num_classes``, ``img_size``,
            ``embed_dim``, ``depth``, ``num_heads``, ``last_block``. ``checkpoint_path`` loads the weights of a
            checkpoint that main.py wrote.
    """
    return create


# one entry point for each registered model; torch.hub looks them up among the module's names
globals().update({name: _entry_point(name) for name in models.MODELS})
