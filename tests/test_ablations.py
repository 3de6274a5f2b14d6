"""Every bar of the paper's comparisons builds, at both sizes, and its command reads it."""

import runpy

import jax
import pytest
from flax import nnx

from unifusion_jax import encoders
from unifusion_jax.autoencoders import AutoencoderKLConfig
from unifusion_jax.conditioning import ConditioningConfig
from unifusion_jax.config import from_mapping
from unifusion_jax.encoders.internvl import InternVLConfig
from unifusion_jax.encoders.model import TextConfig
from unifusion_jax.encoders.t5 import T5Config
from unifusion_jax.frozen import load_frozen, model_config_of
from unifusion_jax.model import UniFusionModel
from unifusion_jax.parallel.mesh import MeshConfig, make_mesh
from unifusion_jax.parallel.sharding import param_shardings
from unifusion_jax.training import ablations
from unifusion_jax.training.config import TrainConfig
from unifusion_jax.training.phases import phases

ALL = [(figure, bar) for figure, bars in ablations.BARS.items() for bar in bars]
FULL = {
    "google/flan-t5-xxl": T5Config.flan_t5_xxl(),
    "meta-llama/Llama-3.1-8B-Instruct": TextConfig.llama3_1_8b(),
    "OpenGVLab/InternVL2_5-8B": InternVLConfig.internvl2_5_8b(),
}


def config_of(figure, argument) -> TrainConfig:
    get_config = runpy.run_path(f"configs/ablations/{figure}.py")["get_config"]
    return from_mapping(TrainConfig, get_config(argument))


@pytest.mark.parametrize(("figure", "bar"), ALL)
def test_a_bar_at_the_papers_size(figure, bar):
    config = config_of(figure, bar)
    assert config.batch_size == 1024 and config.dit.num_layers == 32 and config.dit.head_dim == 128
    assert config.total_steps == (250_000 if figure in ("figure_22", "figure_23") else 200_000)
    for phase in phases(config):
        sizes = model_config_of(phase.config, FULL[phase.config.encoder.path])
        assert sizes.encoder_size in (4096, 2 * 8 * 128)
        module = nnx.eval_shape(lambda sizes=sizes: UniFusionModel(sizes, rngs=nnx.Rngs(0)))
        param_shardings(module, make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))  # every parameter can be sharded
        maps = [path for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param)) if path[1:2] == ("layers",)]
        assert not any("project" in path or "value" in path for path in maps)  # widths agree, so no maps


@pytest.mark.parametrize(("figure", "bar"), ALL)
def test_a_bar_at_demo_size(figure, bar):
    config = config_of(figure, f"{bar},demo")
    assert config.total_steps == (750 if figure in ("figure_22", "figure_23") else 600)
    for phase in phases(config):
        model_config_of(phase.config, encoders.read_config(phase.config.encoder.path))


def test_the_continued_run_swaps_at_100k_steps():
    first, second = phases(config_of("figure_23", "continued"))
    assert (first.until, second.start, second.until) == (100_000, 100_000, 250_000)
    assert first.config.encoder.path == "google/flan-t5-xxl" and not first.config.encoder.verifi
    assert first.config.conditioning.strategy == "last_layer" and second.config.conditioning.strategy == "lap"
    demo = phases(config_of("figure_23", "continued,demo"))
    assert [phase.until for phase in demo] == [300, 750]


def test_bars_differ_where_the_figure_says():
    off, on = (config_of("figure_19", bar).encoder for bar in ("without_verifi", "with_verifi"))
    assert (off.verifi, on.verifi, off.system_prompts, on.system_prompts) == (False, True, "none", "full")
    penultimate = config_of("figure_22", "penultimate_refiner")
    selection = penultimate.conditioning.select((), 32, 32)
    assert selection.layers == (31,) and selection.form == "states" and penultimate.conditioning.refines
    every = config_of("figure_4", "lap").conditioning.select((), 32, 32).layers
    third = config_of("figure_21", "without_injection").conditioning.select((), 32, 32).layers
    assert every == tuple(range(1, 33)) and third == tuple(range(1, 32, 3))


def test_the_autoencoder_of_the_paper_size_fits():
    flux_1 = AutoencoderKLConfig(z_channels=16, block_out_channels=(128, 256, 512, 512), pack=2)
    assert flux_1.latent_channels == config_of("figure_4", "lap").dit.latent_channels


def test_demo_bars_load(monkeypatch):
    config = config_of("figure_4", "kv_fusion,demo")
    encoder, _ = load_frozen(config)
    assert encoder.form == "key_values" and len(encoder.layers) == config.dit.num_layers
    assert jax.tree.leaves(encoder.params)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lapp", "figure_4 has the bars t5, last_layer, .*, got 'lapp'"),
        ("lap,tiny", r"one of \['paper', 'demo'\], got 'tiny'"),
    ],
)
def test_unknown_bars_and_sizes(argument, message):
    with pytest.raises(ValueError, match=message):
        config_of("figure_4", argument)


def test_defaults_are_the_final_models():
    assert ConditioningConfig().select((), 28, 40).layers == (1, 4, 7, 10, 13, 16, 19, 22, 25, 28)
