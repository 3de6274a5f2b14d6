"""What the tests of autoencoders share: random weights everywhere, and the comparison with a reference."""

import jax
import numpy as np
import torch

TOLERANCE = 1e-4  # of the root mean square of the reference


def randomised(model, seed=0):
    """Gives every weight, norm scales and batch-norm statistics included, a value that a slip would show in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 0.1)
            elif "running_mean" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def perturbed(autoencoder, scale=0.1, seed=0):
    """The same autoencoder with noise on every weight, so that none is left at the zero or one that it starts from."""
    leaves, tree = jax.tree.flatten(autoencoder.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + scale * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return autoencoder.with_params(jax.tree.unflatten(tree, noisy))


def random_images(height, width, seed=1):
    """Two images [2, 3, height, width] in [-1, 1]."""
    return torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def nhwc(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


def assert_close(ours, reference):
    reference = nhwc(reference)
    assert ours.shape == reference.shape
    assert np.abs(reference[0] - reference[1]).max() > 0.1 * np.sqrt(np.mean(reference**2))  # it depends on the input
    worst = float(np.abs(np.asarray(ours) - reference).max() / np.sqrt(np.mean(reference**2)))
    print(f"max difference / rms: {worst:.2e}")
    assert worst < TOLERANCE


def cosine(ours, reference):
    ours, reference = np.asarray(ours, np.float64).ravel(), nhwc(reference).astype(np.float64).ravel()
    return float(ours @ reference / np.sqrt((ours @ ours) * (reference @ reference)))
