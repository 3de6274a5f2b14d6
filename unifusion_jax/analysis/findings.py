"""The report of the micro-study: what the paper finds, what it is here, and whether the directions agree."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unifusion_jax.analysis.figure import Figure

Scores = Mapping[str, Sequence[Mapping[str, float]]]

# Two-sided 95 % quantiles of Student's t by degrees of freedom, from any table; 1.96 beyond.
_T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Names of scores: how they are written, and whether more is better.
_MEASURES = {
    "held_out_loss": ("held-out loss", False),
    "facts": ("correct facts, own words", True),
    "facts_described": ("correct facts, description given", True),
    "facts_two_references": ("correct facts, two references", True),
    "facts_two_references_chance": ("the same by chance", True),
    "psnr_db_1_tiles": ("PSNR in dB, 1 tile", True),
    "psnr_db_5_tiles": ("PSNR in dB, 5 tiles", True),
    "psnr_db_10_tiles": ("PSNR in dB, 10 tiles", True),
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One finding of the paper as a comparison of two scores.

    Attributes:
      title: what is compared.
      paper: what the paper says, with its number where it gives one.
      ahead: (arm, score) that is better in the paper.
      behind: (arm, score) that is worse there, or as good.
      equal: whether the paper finds both equal.
    """

    title: str
    paper: str
    ahead: tuple[str, str]
    behind: tuple[str, str]
    equal: bool = False


def _against(arm: str, *, title: str, paper: str, ahead: str = "lap", equal: bool = False) -> list[Claim]:
    """Two claims about two arms that are told the same words: by loss and by facts."""
    measures = ("held_out_loss", "facts_described")
    return [Claim(title, paper, (ahead, measure), (arm, measure), equal) for measure in measures]


CLAIMS: tuple[Claim, ...] = (
    *_against("last_layer", title="LAP over the last layer", paper="LAP ahead (figure 4)"),
    *_against(
        "kv_fusion", title="LAP over key-value fusion", paper="LAP ahead, by more than over the last layer (figure 4)"
    ),
    *_against("hidden_state_injection", title="LAP over hidden state injection", paper="LAP ahead (figure 4)"),
    *_against("lap_injection", title="one LAP over one for each block", paper="one LAP strongly ahead (figure 21)"),
    *_against(
        "lap_words",
        ahead="t5_style",
        title="T5-style last layer over LAP, both without rewriting",
        paper="T5 ahead by 4.1 points at 200k steps, by 0.7 at 400k (figure 4)",
    ),
    *_against(
        "lap_all_layers",
        title="every third layer over all layers",
        paper="every third used more evenly (figure 7); no score given",
        equal=True,
    ),
    *_against("lap", ahead="lap_refiner", title="refiner over none", paper="refiner ahead (figure 22)"),
    *_against(
        "penultimate_refiner",
        ahead="lap_refiner",
        title="LAP with refiner over penultimate layer with refiner",
        paper="LAP ahead (figure 22)",
    ),
    Claim("rewriting over the user's words", "rewriting ahead (figure 19)", ("lap", "facts"), ("lap_words", "facts")),
    Claim(
        "5 tiles over 1",
        "more tiles, better reconstruction (figure 5)",
        ("pictures", "psnr_db_5_tiles"),
        ("pictures", "psnr_db_1_tiles"),
    ),
    Claim(
        "10 tiles over 5",
        "more tiles, better reconstruction (figure 5)",
        ("pictures", "psnr_db_10_tiles"),
        ("pictures", "psnr_db_5_tiles"),
    ),
    Claim(
        "text to image after the editing stage over before",
        "editing training improves it (section 5)",
        ("edits", "facts_described"),
        ("pictures", "facts_described"),
    ),
    Claim(
        "two references, never trained on, over chance",
        "works zero-shot (figure 10)",
        ("edits", "facts_two_references"),
        ("edits", "facts_two_references_chance"),
    ),
    *_against(
        "lap",
        ahead="continued",
        title="continued from another encoder over from scratch",
        paper="exactly equal (figure 23)",
        equal=True,
    ),
)


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of paired differences and half of its 95 % confidence interval."""
    count = len(differences)
    quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96
    return float(np.mean(differences)), quantile * float(np.std(differences, ddof=1)) / math.sqrt(count)


def verdict(claim: Claim, mean: float, half: float) -> str:
    """Says whether the direction is the paper's; `mean` is how far `ahead` is better here."""
    if abs(mean) <= half:
        return "no difference resolved, as in the paper" if claim.equal else "not resolved"
    if claim.equal:
        return "differs: " + ("ahead" if mean > 0 else "behind")
    return "agrees" if mean > 0 else "opposite"


def compare(claim: Claim, scores: Scores) -> dict[str, Any]:
    """Returns a line of the report's table; runs of one seed are paired."""
    better = 1 if _MEASURES[claim.ahead[1]][1] else -1
    ahead, behind = ([run[score] for run in scores[arm]] for arm, score in (claim.ahead, claim.behind))
    mean, half = interval([better * (a - b) for a, b in zip(ahead, behind, strict=True)])
    return {
        "comparison": claim.title,
        "paper": claim.paper,
        "measure": _MEASURES[claim.ahead[1]][0],
        "ahead": float(np.mean(ahead)),
        "behind": float(np.mean(behind)),
        "better_by": mean,
        "half_interval": half,
        "direction": verdict(claim, mean, half),
    }


def arm_rows(scores: Scores) -> list[dict[str, Any]]:
    """Returns mean and standard error over seeds of every score of every arm."""
    rows = []
    for arm, runs in scores.items():
        for name in runs[0]:
            values = [run[name] for run in runs]
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
            rows.append({"arm": arm, "score": name, "mean": float(np.mean(values)), "standard_error": error})
    return rows


def write(scores: Scores, output: Path, *, steps: int, command: str) -> Path:
    """Writes findings.md, and findings.png with findings.csv, and returns the report's path."""
    rows = arm_rows(scores)
    losses = [row for row in rows if row["score"] == "held_out_loss"]

    def draw(axes: Any) -> None:
        arms, means, errors = ([row[key] for row in losses] for key in ("arm", "mean", "standard_error"))
        for seed in range(len(scores["lap"])):
            axes.plot([scores[arm][seed]["held_out_loss"] for arm in arms], ".", color="silver")
        axes.errorbar(
            range(len(arms)), means, errors, fmt="o", capsize=4
        )  # no bars: these differences start far from 0
        axes.set_xticks(range(len(arms)), arms, rotation=60, ha="right")
        axes.grid(axis="y", alpha=0.3)
        title = f"{steps} steps, {len(scores['lap'])} seeds (grey), mean and standard error"
        axes.set(ylabel="held-out loss", title=title)

    Figure(rows, draw, size_inches=(8.0, 5.0)).write(output, "findings")
    report = output / "findings.md"
    report.write_text(_text(rows, [compare(claim, scores) for claim in CLAIMS], len(scores["lap"]), steps, command))
    return report


def _text(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], seeds: int, steps: int, command: str
) -> str:
    lines = [
        "# Findings",
        "",
        "The paper's comparisons with the demo's networks: a DiT of 3 million parameters and 96 px pictures of one or two",
        f"shapes, {steps} steps of 16 pictures with 4 noises each, {seeds} seeds an arm. The paper's models are a thousand times",
        "larger and trained a thousand times longer: a direction that does not show here may well show there.",
        "",
        "```bash",
        command,
        "```",
        "",
        "The loss is that of held-out records, at the same times and noises for every run. Facts are those that a prompt",
        "states and the detector finds in the picture. Differences pair runs of one seed; the interval is that of 95 %",
        'confidence (Student\'s t), and a direction is "not resolved" when it holds zero. The T5-style arm reads the last',
        "layer of the demo's own encoder, as there is no small T5. The arm of edits goes on from that of pictures for half as",
        "many steps, and part of what it is ahead is these steps. A perceptual distance is missing from the reconstructions:",
        "its weights are no part of this package.",
        "",
        f"Of {len(found)} comparisons one in twenty would seem resolved by chance alone.",
        "",
        "| comparison | paper | measure | first | second | first better by | direction |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['comparison']} | {row['paper']} | {row['measure']} | {row['ahead']:.4g} | {row['behind']:.4g} | "
        f"{row['better_by']:+.2g} ± {row['half_interval']:.2g} | {row['direction']} |"
        for row in found
    ]
    lines += ["", "![Held-out loss of every arm](findings.png)", "", "Mean and standard error over seeds:", ""]
    lines += ["| arm | score | mean | standard error |", "|---|---|---|---|"]
    lines += [
        f"| {row['arm']} | {_MEASURES[row['score']][0]} | {row['mean']:.4g} | {row['standard_error']:.2g} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
