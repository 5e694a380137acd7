"""PSPNet semantic segmentation: the model, its images and masks, and the numbers taken from them.

Everything that this package offers by name stands here; ``docs/network.md`` shows it in use. A name is imported when it
is first asked for, so that ``import pspnet_core`` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pspnet_core.checkpoints.checkpoint import load_checkpoint, save_checkpoint
    from pspnet_core.errors import ConfigError, ImageError, PspnetError
    from pspnet_core.images.run_lengths import decode, encode
    from pspnet_core.inference.segmenter import Segmenter
    from pspnet_core.network.pspnet import PSPNet, PSPNetConfig

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ImageError",
    "PSPNet",
    "PSPNetConfig",
    "PspnetError",
    "Segmenter",
    "decode",
    "encode",
    "load_checkpoint",
    "save_checkpoint",
]

_MODULES = {
    "checkpoints.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "errors": ("ConfigError", "ImageError", "PspnetError"),
    "images.run_lengths": ("decode", "encode"),
    "inference.segmenter": ("Segmenter",),
    "network.pspnet": ("PSPNet", "PSPNetConfig"),
}


def __getattr__(name: str) -> Any:
    """Import what the package offers by name (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
