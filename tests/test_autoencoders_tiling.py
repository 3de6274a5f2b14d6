"""Decoding within a memory budget: what fits is whole, what does not is tiled, and tiles differ by what is documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from autoencoders_support import perturbed

from unifusion_jax.autoencoders import (
    Autoencoder,
    AutoencoderKLConfig,
    AutoencoderKLWanConfig,
    AutoencoderTinyConfig,
    tiling,
)

KL = AutoencoderKLConfig(z_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4)
WAN = AutoencoderKLWanConfig(
    base_dim=8,
    z_channels=4,
    dim_mult=(1, 1, 2),
    num_res_blocks=1,
    temporal_downsample=(False, True),
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)
CONVOLUTIONS = AutoencoderTinyConfig(
    z_channels=3,
    encoder_block_out_channels=(4, 4),
    decoder_block_out_channels=(4, 4),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 0),
)
REACH_CELLS = 5  # of CONVOLUTIONS: 1 + 3 at the resolution of z, 2 halves of a cell after doubling


@functools.cache
def random_autoencoder(config):
    return perturbed(Autoencoder.create(config, seed=0))


def latents_of(config, *shape):
    return jax.random.normal(jax.random.key(7), (*shape, config.latent_channels))


def bytes_of(autoencoder, count, height, width):
    decode = functools.partial(autoencoder.decode_fn, autoencoder.params)
    return tiling.needed_bytes(decode, (count, height, width, autoencoder.latent_channels))


def programs(autoencoder, latents, max_bytes):
    jaxpr = jax.make_jaxpr(functools.partial(autoencoder.decode_fn, max_bytes=max_bytes))(autoencoder.params, latents)
    return str(jaxpr).count("conv_general_dilated")


@pytest.mark.parametrize("config", [KL, WAN, CONVOLUTIONS])
def test_what_fits_is_decoded_whole(config):
    autoencoder = random_autoencoder(config)
    latents = latents_of(config, 2, 6, 9)
    whole = autoencoder.decode(latents)
    enough = bytes_of(autoencoder, 2, 6, 9)
    np.testing.assert_array_equal(autoencoder.decode(latents, max_bytes=enough), whole)
    assert bytes_of(autoencoder, 1, 6, 9) < enough
    one_by_one = autoencoder.decode(latents, max_bytes=enough - 1)
    np.testing.assert_array_equal(one_by_one[:1], autoencoder.decode(latents[:1]))
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)


def test_tiles_of_a_convolutional_decoder_join_without_a_seam():
    autoencoder = random_autoencoder(CONVOLUTIONS)
    latents = latents_of(CONVOLUTIONS, 2, 190, 100)
    budget = bytes_of(autoencoder, 1, 96, 96)
    decode = functools.partial(autoencoder.decode_fn, autoencoder.params)
    tile = tiling.tile_cells(decode, latents.shape, latents.dtype, budget)
    assert tile == (96, 96) and REACH_CELLS <= 96 // 16
    tiled, whole = autoencoder.decode(latents, max_bytes=budget), autoencoder.decode(latents)
    np.testing.assert_allclose(tiled, whole, atol=2e-5)
    # one program for all tiles, whatever their number
    assert programs(autoencoder, latents, budget) == programs(autoencoder, latents, None)


# Measured with tiles of 24 of 48 x 44 cells: KL 0.064 and 0.069, Wan 0.045 and 0.069; docs/autoencoders.md has them too.
@pytest.mark.parametrize(("config", "image_deviation", "step_deviation"), [(KL, 0.08, 0.08), (WAN, 0.06, 0.08)])
def test_deviation_on_random_weights(config, image_deviation, step_deviation):
    autoencoder = random_autoencoder(config)
    latents = latents_of(config, 1, 48, 44)
    tiled = np.asarray(autoencoder.decode(latents, max_bytes=bytes_of(autoencoder, 1, 24, 24)))
    whole = np.asarray(autoencoder.decode(latents))
    assert tiled.shape == whole.shape

    def relative(change):
        return float(np.sqrt(np.mean(np.square(change(tiled) - change(whole))) / np.mean(np.square(change(whole)))))

    image, steps = relative(lambda x: x), max(relative(functools.partial(np.diff, axis=axis)) for axis in (1, 2))
    print(f"{type(config).__name__}: image {image:.4f} steps {steps:.4f}")
    assert 0 < image < image_deviation and steps < step_deviation


@pytest.mark.parametrize("config", [KL, WAN])
def test_compiled_program_keeps_to_the_budget(config):
    autoencoder = random_autoencoder(config)
    latents = latents_of(config, 1, 64, 64)
    budget = bytes_of(autoencoder, 1, 24, 24)

    def held(max_bytes):
        compiled = jax.jit(functools.partial(autoencoder.decode_fn, max_bytes=max_bytes)).lower(
            autoencoder.params, latents
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    picture = 64 * 64 * autoencoder.downsample**2 * 3 * 4
    whole, tiled = held(None), held(budget)
    print(f"{type(config).__name__}: budget {budget}, tiled {tiled}, whole {whole}, picture {picture}")
    assert tiled <= budget + picture < whole <= bytes_of(autoencoder, 1, 64, 64)


def test_shares_of_tiles_sum_to_one():
    for cells, tile in ((24, 24), (25, 24), (50, 24), (47, 8), (1000, 64)):
        starts, shares = tiling._placed(cells, tile, 2)
        total = np.zeros(2 * cells)
        for start, share in zip(starts, shares, strict=True):
            total[2 * start : 2 * (start + tile)] += share
        np.testing.assert_allclose(total, 1.0, rtol=1e-6)
        assert starts[0] == 0 and starts[-1] == cells - tile and (shares >= 0).all()
        assert shares[0, 0] == 1 and (len(starts) == 1 or (shares[1, 0] == 0 and shares[0, -1] == 0))


def test_too_small_a_budget():
    autoencoder = random_autoencoder(KL)
    needed = bytes_of(autoencoder, 1, 8, 8)
    with pytest.raises(ValueError, match=rf"the smallest tile, 8 x 8 latent cells, needs {needed} bytes.* bfloat16"):
        autoencoder.decode(latents_of(KL, 1, 40, 40), max_bytes=needed - 1)


def test_counted_bytes():
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    assert tiling.activation_bytes(lambda x: x + 1, x) == 1024
    assert (
        tiling.activation_bytes(lambda x: (x + 1) * 2 + 3, x) == 2048
    )  # each step holds what it reads and what it makes
    assert tiling.activation_bytes(lambda x: (x + 1, x + 2, x + 3), x) == 3072
    assert tiling.activation_bytes(lambda x: jax.lax.map(lambda y: jnp.exp(y) + 1, x), x) == 1024 + 8
