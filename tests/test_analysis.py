"""Every analysis on a checkpoint whose answer is planted, and the files it writes."""

import csv
import json
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from test_training import parsed

from unifusion_jax import UniFusion
from unifusion_jax.analysis import FIGURES, Figure, Options
from unifusion_jax.analysis.figure import share_error
from unifusion_jax.analysis.layer_dropout import layer_dropout, thirds, without_layers
from unifusion_jax.analysis.layer_similarity import cosine_similarity, layer_similarity
from unifusion_jax.analysis.losses import losses
from unifusion_jax.analysis.pooling_weights import pooling_weights
from unifusion_jax.analysis.qk_norms import pieces_of, qk_norms, token_norms, word_rows, words_of
from unifusion_jax.analysis.refiner_effect import change_by_position, refiner_effect, without_refiner
from unifusion_jax.analysis.tile_scaling import psnr, ssim, tile_scaling
from unifusion_jax.analysis.verifi_effect import verifi_effect
from unifusion_jax.data.shapes.render import render
from unifusion_jax.data.shapes.source import evaluation_prompts
from unifusion_jax.parallel.mesh import make_mesh
from unifusion_jax.pipeline import Drawn
from unifusion_jax.training.tasks import make_task

TWO = Options(("a red square", "two green triangles"), steps=1)


def checkpoint(frozen, **changes) -> UniFusion:
    """A model whose weights do something, without training."""
    config = parsed(frozen, data__size_px=32, **changes)
    task = make_task(config, make_mesh(config.mesh))
    params = task.init(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params)
    return UniFusion(task.encoder, task.autoencoder, config, task.model_config, params)


@pytest.fixture(scope="module")
def model(frozen):
    return checkpoint(frozen, encoder__layers=(1, 2, 4))


def planted(model, pool):
    """The model with other weights in its pooling."""
    lap = model.params["conditioner"]["lap"]
    lap = lap | {"pool": lap["pool"] | {"kernel": jnp.asarray(pool)[:, None]}}
    return model.with_params(model.params | {"conditioner": model.params["conditioner"] | {"lap": lap}})


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# Layers


def test_cosines_of_planted_layers():
    layers = np.zeros((1, 2, 4, 3), np.float32)
    layers[0, :, 0] = [1, 0, 0]
    layers[0, :, 1] = [2, 0, 0]  # as the first, longer
    layers[0, :, 2] = [0, 3, 0]  # at right angles
    layers[0, 0, 3], layers[0, 1, 3] = [1, 1, 0], [9, 9, 9]  # the second token does not count
    found = cosine_similarity(layers, np.array([[True, False]]))
    half = 0.5**0.5
    np.testing.assert_allclose(
        found, [[1, 1, 0, half], [1, 1, 0, half], [0, 0, 1, half], [half, half, half, 1]], atol=1e-6
    )


def test_layer_similarity_lists_every_pair_of_layers(model, tmp_path):
    picture, table = layer_similarity(model, TWO).write(tmp_path, "figure")
    rows = read(table)
    assert len(rows) == 25 and PIL.Image.open(picture).width > 300
    assert all(float(row["cosine"]) == pytest.approx(1, abs=1e-4) for row in rows if row["layer"] == row["other_layer"])


def test_pooling_weights_are_the_planted_ones(model, tmp_path):
    figure = pooling_weights(planted(model, [0.5, -1.5, 2.0]), TWO)
    picture, table = figure.write(tmp_path, "figure")
    rows = read(table)
    assert [(row["block"], row["layer"], float(row["weight"]), float(row["share"])) for row in rows] == [
        ("0", "1", 0.5, 0.125), ("0", "2", -1.5, 0.375), ("0", "4", 2.0, 0.5),
    ]  # fmt: skip
    assert PIL.Image.open(picture).width > 300


def test_pooling_weights_of_every_block(frozen, tmp_path):
    model = checkpoint(frozen, conditioning__strategy="lap_injection", encoder__layers=(1, 4))
    pool = model.params["conditioner"]["laps"]["blocks"]["lap"]["pool"]
    pool["kernel"] = jnp.asarray([[[1.0], [3.0]], [[0.0], [-2.0]]])
    figure = pooling_weights(model, TWO)
    assert [(row["block"], row["layer"], row["share"]) for row in figure.rows] == [
        (0, 1, 0.25),
        (0, 4, 0.75),
        (1, 1, 0),
        (1, 4, 1),
    ]
    assert figure.write(tmp_path, "figure")[0].exists()


def test_norms_of_planted_queries_and_keys(model):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    lap = params["conditioner"]["lap"]
    block = lap["blocks"]["blocks"]
    eye = jnp.eye(32)
    lap["norm"]["scale"] = jnp.ones(32)
    block["attention_norm"]["scale"] = jnp.ones((2, 32))
    lap["layer_embedding"] = jnp.zeros((3, 32))
    for name, factors in (("query", (2.0, 0.0)), ("key", (3.0, 0.0)), ("value", (0.5, 0.0))):
        block["attention"][name]["kernel"] = jnp.stack([factor * eye for factor in factors])
    states = jax.random.normal(jax.random.key(3), (1, 2, 3, 32)) * jnp.array([1.0, 50.0, 0.1])[:, None]
    chosen = model.with_params(params).module().conditioner.lap
    # A normalised state of width 32 has the norm sqrt(32), whatever its layer's scale.
    expected = np.broadcast_to(np.array([2.0, 3.0, 0.5]) * 32**0.5, (1, 2, 3, 3))
    np.testing.assert_allclose(token_norms(chosen, states), expected, rtol=1e-3)
    np.testing.assert_allclose(token_norms(chosen, states, block=1), 0, atol=1e-6)


def test_words_are_means_over_their_tokens():
    pieces = ["dr", "ink", "ing", " a", " be", "er", "."]
    assert words_of(pieces) == [("drinking", [0, 1, 2]), ("a", [3]), ("beer.", [4, 5, 6])]
    norms = np.arange(7 * 2 * 3, dtype=np.float32).reshape(7, 2, 3)
    rows = word_rows(0, pieces, norms, layers=(1, 4))
    assert [(row["word"], row["layer"], row["tokens"], row["query_norm"]) for row in rows[:2]] == [
        ("drinking", 1, 3, 6.0), ("drinking", 4, 3, 9.0),
    ]  # fmt: skip
    assert rows[0]["product"] == 6.0 * 7.0


def test_qk_norms_of_a_checkpoint_cover_the_words(model, tmp_path):
    figure = qk_norms(model, TWO)
    words = [row["word"] for row in figure.rows if row["prompt"] == 0 and row["layer"] == 1]
    assert words == ["a", "red", "square"]
    assert all(row["product"] > 0 for row in figure.rows)
    assert figure.write(tmp_path, "figure")[0].exists()
    ids = model.encoder.processor.tokenizer("a red square", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(model.encoder.processor, ids)) == "a red square"
    snow = model.encoder.processor.tokenizer("a 雪 b", add_special_tokens=False)[
        "input_ids"
    ]  # several tokens a character
    assert len(snow) > 5 and [word for word, _ in words_of(pieces_of(model.encoder.processor, snow))] == [
        "a",
        "雪",
        "b",
    ]


def test_thirds():
    assert thirds(3) == {"first": [0], "middle": [1], "last": [2]}
    assert thirds(10) == {"first": [0, 1, 2], "middle": [3, 4, 5, 6], "last": [7, 8, 9]}


def test_dropping_layers_that_have_no_weight_changes_nothing(model, tmp_path):
    figure = layer_dropout(planted(model, [0.0, 3.0, 0.0]), TWO)
    changed = {(row["dropped"], row["prompt"]): row["mean_difference_levels"] for row in figure.rows}
    for words in TWO.prompts:
        assert changed["none", words] == changed["first", words] == changed["last", words] == 0
        assert changed["middle", words] > 0
    assert [row["layers"] for row in figure.rows[::2]] == ["", "1", "2", "4"]
    picture, _ = figure.write(tmp_path, "figure")
    assert PIL.Image.open(picture).size == (2 * 36 + 4, 4 * 36 + 4)


def test_dropped_layers_lose_their_weight_only(model):
    kernel = without_layers(model.params, [0, 2])["conditioner"]["lap"]["pool"]["kernel"]
    before = model.params["conditioner"]["lap"]["pool"]["kernel"]
    np.testing.assert_array_equal(kernel, before * jnp.array([[0], [1], [0]]))


# Pictures


def test_psnr_and_ssim_of_planted_errors():
    source = np.full((32, 32, 3), 100, np.uint8)
    assert psnr(source, source) == float("inf")
    assert psnr(source, source + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    assert ssim(noise, noise) == pytest.approx(1)
    assert ssim(source, noise) < 0.2


class Told(NamedTuple):
    """What the painter is told: the words, and the pixels it will draw."""

    texts: list[str]
    pixels: list


class Painter(UniFusion):
    """A model that reconstructs with an error that shrinks with the tiles, and draws what it is told to."""

    def __init__(self, model, draws=None):
        self.config, self.draws = model.config, draws

    def condition(self, prompts, *, tiles=None, rewrite=None, **options):
        texts = [prompt.instruction for prompt in prompts]
        if self.draws is not None:
            return Told(texts, [self.draws(words, rewrite) for words in texts])
        return Told(texts, [np.asarray(prompt.images[0]).astype(int) + 90 // tiles for prompt in prompts])

    def sample(self, condition, **options):
        return [PIL.Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)) for pixels in condition.pixels]

    def draw(self, prompts, *, rewrite=None, **options):
        told = self.condition(prompts, rewrite=rewrite)
        yield from map(Drawn, self.sample(told), told.texts)


def test_reconstruction_by_number_of_tiles(model, tmp_path):
    grey = tuple(PIL.Image.new("RGB", (40, 40), (level,) * 3) for level in (20, 60))
    figure = tile_scaling(Painter(model), Options(images=grey))
    found = {(row["tiles"], row["image"]): row["psnr_db"] for row in figure.rows}
    for tiles, error in ((1, 90), (5, 18), (10, 9)):
        assert found[tiles, 0] == found[tiles, 1] == pytest.approx(20 * np.log10(255 / error))
    assert PIL.Image.open(figure.write(tmp_path, "figure")[0]).size == (2 * 36 + 4, 4 * 36 + 4)


def test_tile_scaling_of_a_checkpoint(model):
    figure = tile_scaling(model, Options(count=1, steps=1))
    assert [row["tiles"] for row in figure.rows] == [1, 5, 10]
    assert all(np.isfinite(row["psnr_db"]) and -1 <= row["ssim"] <= 1 for row in figure.rows)


def test_verifi_effect_of_a_painter_that_needs_the_description(model, tmp_path):
    scenes = {words: render(scene) for words, _, scene in evaluation_prompts(6)}
    blank = np.full((96, 96, 3), 255, np.uint8)

    def draws(words, rewrite):
        return np.asarray(scenes[words]) if rewrite else blank

    painter = Painter(model, draws)
    figure = verifi_effect(painter, Options(count=6))
    share = {(row["rewrite"], row["score"]): row["share"] for row in figure.rows}
    assert share[True, "seen/all_correct"] == 1 and share[False, "seen/all_correct"] == 0
    assert figure.write(tmp_path, "figure")[0].exists()


def test_errors_of_shares():
    assert share_error(0.5, 100) == pytest.approx(0.05) and share_error(1.0, 10) == 0


def test_change_by_position_of_planted_tokens():
    before = np.tile(np.array([1.0, 0.0]), (1, 8, 1))
    after = before.copy()
    after[0, 4:6] = [0, 2]  # the third quarter turns by a right angle, whatever its length
    after[0, 6:] = [-1, 0]  # the last is turned round
    np.testing.assert_allclose(change_by_position(before, after, np.ones((1, 8), bool)), [0, 0, 1, 2], atol=1e-12)


def test_a_refiner_that_does_nothing_has_no_effect(model, tmp_path):
    idle = model.with_params(without_refiner(model.params))
    figure = refiner_effect(idle, Options(TWO.prompts, count=2, steps=1))
    changes = [row["share"] for row in figure.rows if row["score"].startswith("token change")]
    np.testing.assert_allclose(changes, 0, atol=1e-6)
    scores = [
        [row["share"] for row in figure.rows if row["refiner"] == refined and "/" in row["score"]]
        for refined in (True, False)
    ]
    assert scores[0] == scores[1] and scores[0]
    busy = refiner_effect(model, Options(TWO.prompts, count=2, steps=1))
    assert min(row["share"] for row in busy.rows if row["score"].startswith("token change")) > 0.01
    assert busy.write(tmp_path, "figure")[0].exists()


# What cannot be


@pytest.mark.parametrize(("name", "message"), [
    ("pooling_weights", "Only lap and lap_injection pool layers; .* is 'last_layer'"),
    ("qk_norms", "looks into LAP; .* is 'last_layer'"),
    ("layer_dropout", "drops layers of LAP; .* is 'last_layer'"),
    ("refiner_effect", "has no refiner"),
])  # fmt: skip
def test_figures_that_a_checkpoint_cannot_give(frozen, name, message):
    model = checkpoint(frozen, conditioning__strategy="last_layer", conditioning__refiner_blocks=0)
    with pytest.raises(ValueError, match=message):
        FIGURES[name](model, TWO)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figure = Figure([{"a": 1}], draw=lambda axes: None)
    with pytest.raises(ImportError, match=r"pip install 'unifusion_jax\[analysis\]'"):
        figure.write(tmp_path, "figure")


def test_options_out_of_range():
    with pytest.raises(ValueError, match="count and steps must be 1 or more, got 0 and 20"):
        Options(count=0)


# What trainings logged


def write_log(workdir, *entries):
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return workdir


def test_losses_of_two_trainings_are_listed_and_drawn(tmp_path):
    first = write_log(tmp_path / "a", {"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "evaluation": 1.0})
    second = write_log(tmp_path / "b", {"step": 1, "loss": 3.0}, {"step": 2, "loss": 0.5})
    figure = losses([first, second])
    assert [tuple(row.values()) for row in figure.rows] == [("a", 1, 2.0), ("b", 1, 3.0), ("b", 2, 0.5)]
    picture, table = figure.write(tmp_path, "loss")
    assert np.asarray(PIL.Image.open(picture)).std() > 0 and len(table.read_text().splitlines()) == 4


def test_a_training_without_the_quantity_names_what_it_has(tmp_path):
    with pytest.raises(ValueError, match="never logged 'los'; it has loss"):
        losses([write_log(tmp_path / "a", {"step": 1, "loss": 2.0})], "los")
    with pytest.raises(ValueError, match="holds no training"):
        losses([tmp_path])
