"""The built-in world: pictures of coloured shapes, words for them, edits of them, and a detector that reads them."""

from unifusion_jax.data.shapes.detector import Detection, detect
from unifusion_jax.data.shapes.edits import EDIT_KINDS, sample_edit, sample_multi_reference
from unifusion_jax.data.shapes.language import Fact, describe, facts, parse_description, user_prompt
from unifusion_jax.data.shapes.render import render
from unifusion_jax.data.shapes.scene import HELD_OUT_PAIRS, Scene, SceneObject, generator, sample_scene, split_of
from unifusion_jax.data.shapes.scoring import EditScore, Score, score, score_edit
from unifusion_jax.data.shapes.source import (
    EvaluationEdit,
    ShapesSource,
    evaluation_compositions,
    evaluation_edits,
    evaluation_prompts,
)

__all__ = [
    "EDIT_KINDS",
    "HELD_OUT_PAIRS",
    "Detection",
    "EditScore",
    "EvaluationEdit",
    "Fact",
    "Scene",
    "SceneObject",
    "Score",
    "ShapesSource",
    "describe",
    "detect",
    "evaluation_compositions",
    "evaluation_edits",
    "evaluation_prompts",
    "facts",
    "generator",
    "parse_description",
    "render",
    "sample_edit",
    "sample_multi_reference",
    "sample_scene",
    "score",
    "score_edit",
    "split_of",
    "user_prompt",
]
