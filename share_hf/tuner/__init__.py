"""The PEFT tuner: configuration, layer, model, and its registration under the name SHARE."""

from .config import ShareConfig
from .layer import ShareLayer
from .model import ShareModel, share_layers
from .registration import register
from .saving import save_bases


__all__ = ["ShareConfig", "ShareLayer", "ShareModel", "register", "save_bases", "share_layers"]
