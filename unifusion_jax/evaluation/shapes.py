"""The built-in world's benchmark: held-out prompts, read back from the generated pictures by the detector."""

import collections
from collections.abc import Sequence

import numpy as np
import tqdm

from unifusion_jax.data.shapes.detector import detect
from unifusion_jax.data.shapes.scoring import score
from unifusion_jax.data.shapes.source import evaluation_prompts
from unifusion_jax.pipeline import UniFusion


def evaluate_prompts(
    model: UniFusion,
    *,
    count: int,
    steps: int,
    guidance: float,
    num_objects: Sequence[int] = (1, 2),
    pairs: Sequence[str] = ("seen", "held_out"),
    rewrite: bool | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Scores `count` held-out prompts of each kind.

    Args:
      model: what to score.
      count: prompts for each entry of `pairs`.
      steps: solver steps.
      guidance: guidance scale.
      num_objects: numbers of objects in the scenes.
      pairs: "seen": unseen scenes of shape-colour pairs that training has; "held_out": with a pair it never has.
      rewrite: VERIFI on or off; as the model was trained when None.
      batch_size: pictures at a time.
      seed: of prompts and noise.

    Returns:
      For each kind: `<kind>/all_correct`, the share of pictures that bear out everything their prompt states, and the mean
      share of correct facts by category.
    """
    scores = {}
    for kind in pairs:
        prompts = evaluation_prompts(count, num_objects=tuple(num_objects), seed=seed, pairs=kind)
        correct: list[bool] = []
        categories = collections.defaultdict(list)
        for start in tqdm.trange(0, count, batch_size, desc=f"held-out prompts, {kind} pairs", unit="batch"):
            chosen = prompts[start : start + batch_size]
            images = model.generate(
                [prompt for prompt, _, _ in chosen], seed=seed + start, steps=steps, guidance=guidance, rewrite=rewrite
            )
            for image, (_, facts, _) in zip(images, chosen, strict=True):
                result = score(facts, detect(np.asarray(image)))
                correct.append(result.all_correct)
                for category, share in result.by_category.items():
                    categories[category].append(share)
        scores[f"{kind}/all_correct"] = float(np.mean(correct))
        scores |= {f"{kind}/{category}": float(np.mean(shares)) for category, shares in sorted(categories.items())}
    return scores
