"""The bundled models, one file each. ``MODELS`` maps the name on the command line to the class."""

from aeup.models.autoencoder import Autoencoder, AutoencoderConfig
from aeup.models.vae import VAE, VAEConfig

MODELS = {model.name: model for model in (Autoencoder, VAE)}

__all__ = ["MODELS", "VAE", "Autoencoder", "AutoencoderConfig", "VAEConfig"]
