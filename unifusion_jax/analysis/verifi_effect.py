"""Figure 19: what rewriting the prompt does to prompt following, measured by the built-in world's detector."""

from typing import Any

from unifusion_jax.analysis.figure import Figure, Options, bars, share_error
from unifusion_jax.evaluation.shapes import Drawing, evaluate_prompts
from unifusion_jax.pipeline import UniFusion


def score_rows(scores: dict[str, float], count: int, **labels: Any) -> list[dict[str, Any]]:
    """Returns a line for each score, with the standard error of a share of `count` prompts."""
    return [
        {**labels, "score": name, "share": share, "standard_error": share_error(share, count)}
        for name, share in scores.items()
    ]


def verifi_effect(model: UniFusion, options: Options) -> Figure:
    """Scores held-out prompts with the encoder's description and with the user's own words, of the same noise."""
    rows = []
    for rewrite in (False, True):
        text = "verifi" if rewrite else "words"
        drawing = Drawing(options.steps, options.guidance, text, seed=options.seed)
        scores = evaluate_prompts(model, drawing, count=options.count, pairs=("seen",))
        rows += score_rows(scores, options.count, rewrite=rewrite)
    return Figure(rows, lambda axes: draw_pairs(axes, rows, "rewrite", "Prompt following with and without rewriting"))


def draw_pairs(axes: Any, rows: list[dict[str, Any]], label: str, title: str) -> None:
    """Draws, for each score, the shares of both settings side by side."""
    ordered = sorted(rows, key=lambda row: (row["score"], row[label]))
    names = [f"{row['score'].removeprefix('seen/')}\n{label}={row[label]}" for row in ordered]
    shares, errors = ([row[key] for row in ordered] for key in ("share", "standard_error"))
    bars(axes, names, shares, errors, y="share of correct", title=title)
    axes.tick_params(axis="x", labelsize=6, rotation=60)
