"""Frozen image autoencoders: images to latents and back.

Example:
    autoencoder = autoencoders.load("FLUX.2-dev/vae")   # a diffusers folder, or a hub id
    latents = autoencoder.encode(images)                # [B, h, w, 3] in [-1, 1] -> [B, h / 16, w / 16, 128]
    images = autoencoder.decode(latents)
    images = autoencoder.decode(latents, max_bytes=2**30)   # in tiles where the activations would exceed 1 GiB
"""

from unifusion_jax.autoencoders.autoencoder import Autoencoder as Autoencoder
from unifusion_jax.autoencoders.autoencoder import load as load
from unifusion_jax.autoencoders.autoencoder import read_config as read_config
from unifusion_jax.autoencoders.config import AutoencoderKLConfig as AutoencoderKLConfig
from unifusion_jax.autoencoders.kl import AutoencoderKL as AutoencoderKL
from unifusion_jax.autoencoders.loss import LossWeights as LossWeights
from unifusion_jax.autoencoders.loss import autoencoder_loss as autoencoder_loss
from unifusion_jax.autoencoders.tiny import AutoencoderTinyConfig as AutoencoderTinyConfig
from unifusion_jax.autoencoders.wan_config import AutoencoderKLWanConfig as AutoencoderKLWanConfig
