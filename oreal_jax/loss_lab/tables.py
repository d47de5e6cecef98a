"""Results of losses as tables, JSON and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from oreal_jax.console import make_table
from oreal_jax.errors import InputError
from oreal_jax.loss_lab.coefficients import LossResult, agreement
from oreal_jax.loss_lab.load import SavedTrajectory

MAX_LABELS = 48  # tokens of a completion whose texts fit under its picture


def make_tables(results: Mapping[str, LossResult]) -> list[Table]:
    """Show the terms of losses, shares of their coefficients, and their agreement."""
    names = {name for result in results.values() for name in result.terms}
    value = lambda x: "" if x is None else f"{x:+.5f}"
    shares = next(iter(results.values())).shares
    tables = [
        make_table(
            ["", *results],
            (
                (name, *(value(result.terms.get(name)) for result in results.values()))
                for name in ["loss", *sorted(names - {"loss"})]
            ),
            title="terms",
        ),
        make_table(
            ["", *(name.replace("_", " ") for name in shares)],
            (
                (loss, *(f"{x:.1%}" for x in result.shares.values()))
                for loss, result in results.items()
            ),
            title="shares of |d loss / d log pi|",
            caption="early: the first half of a completion's tokens",
        ),
    ]
    pair = lambda x: f"{x['cosine']:+.2f} {x['same_sign']:.0%}"
    if len(results) == 1:
        return tables
    alike = make_table(
        ["", *results],
        (
            (loss, *(pair(agreement(a, b)) for b in results.values()))
            for loss, a in results.items()
        ),
        title="agreement",
        caption="cosine of the coefficients; share of tokens with the same sign",
    )
    return [*tables, alike]


def to_json(
    results: Mapping[str, LossResult], trajectories: Sequence[SavedTrajectory]
) -> dict[str, Any]:
    """Return all numbers as plain JSON values; coefficients by completion."""
    names = [trajectory.name for trajectory in trajectories]
    return {
        "completions": len(trajectories),
        "tokens": sum(trajectory.length for trajectory in trajectories),
        "losses": {
            loss: {
                "terms": result.terms,
                "shares": result.shares,
                "coefficients": {
                    name: values.tolist()
                    for name, values in zip(names, result.coefficients, strict=True)
                },
                "agreement": {
                    name: agreement(result, other) for name, other in results.items()
                },
            }
            for loss, result in results.items()
        },
    }


def plot(
    results: Mapping[str, LossResult],
    trajectories: Sequence[SavedTrajectory],
    indices: Sequence[int],
    picture: Path,
) -> None:
    """Plot each loss's coefficients along the completions at `indices`.

    In units of the loss's mean |coefficient|: shapes are compared, not learning rates.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(
            "--picture needs matplotlib: pip install 'oreal-jax[demo]'"
        ) from None
    height = 2.6 * len(indices) + 0.4
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(len(indices), 1, squeeze=False)[:, 0]
    for panel, index in zip(panels, indices, strict=True):
        trajectory = trajectories[index]
        tokens = np.arange(trajectory.length)
        for loss, result in results.items():
            unit = np.abs(np.concatenate(result.coefficients)).mean() or 1.0
            values = result.coefficients[index] / unit
            panel.plot(tokens, values, drawstyle="steps-mid", label=loss)
        panel.axhline(0, color="black", linewidth=0.5)
        verdict = "correct" if trajectory.correct else "incorrect"
        panel.set_title(f"{trajectory.name}: {verdict}", loc="left", fontsize=9)
        panel.set_ylabel("coefficient\n(mean |.| = 1)")
        if len(tokens) <= MAX_LABELS:
            panel.set_xticks(tokens, map(_label, trajectory.pieces), rotation=90)
        panel.margins(x=0.01)
    lines, losses = panels[0].get_legend_handles_labels()
    figure.legend(lines, losses, loc="outside upper right", ncols=6)
    panels[-1].set_xlabel("token (below 0: pi is raised; above: lowered)")
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"{picture}: cannot be written: {error}") from None


def _label(piece: str) -> str:
    """Return a token's text with visible spaces, escaped so that it is no formula."""
    return repr(piece)[1:-1].replace(" ", "␣").replace("$", "\\$") or "∅"
