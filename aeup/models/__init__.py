"""The bundled models, one file each. ``MODELS`` maps the name on the command line to the class."""

from aeup.models.autoencoder import Autoencoder, AutoencoderConfig
from aeup.models.base import Model
from aeup.models.contractive import Contractive, ContractiveConfig
from aeup.models.dcgan import DCGAN, DCGANConfig
from aeup.models.denoising import Denoising, DenoisingConfig
from aeup.models.fcn import FCN, FCNConfig
from aeup.models.sparse import Sparse, SparseConfig
from aeup.models.vae import VAE, VAEConfig

MODELS = {model.name: model for model in (Autoencoder, Denoising, Sparse, Contractive, VAE, DCGAN, FCN)}

__all__ = [
    "DCGAN",
    "FCN",
    "MODELS",
    "VAE",
    "Autoencoder",
    "AutoencoderConfig",
    "Contractive",
    "ContractiveConfig",
    "DCGANConfig",
    "Denoising",
    "DenoisingConfig",
    "FCNConfig",
    "Model",
    "Sparse",
    "SparseConfig",
    "VAEConfig",
]
