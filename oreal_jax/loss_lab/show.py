"""What an examination looks like: tables, JSON, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from oreal_jax.errors import InputError
from oreal_jax.loss_lab.examination import Examination, agreement
from oreal_jax.loss_lab.recorded import Recorded

LABELLED = 48  # tokens of a completion that are still written under its picture


def tables(examined: Mapping[str, Examination]) -> list[Table]:
    """The terms of each loss, where its coefficients lie, and how the losses agree."""
    terms = Table(title="terms")
    terms.add_column("")
    names = {name for examination in examined.values() for name in examination.terms}
    shares = Table(
        title="where |d loss / d log p| lies",
        caption="early: the first half of a completion's tokens",
    )
    shares.add_column("")
    for name in next(iter(examined.values())).shares:
        shares.add_column(name.replace("_", " "), justify="right")
    for loss, examination in examined.items():
        terms.add_column(loss, justify="right")
        shares.add_row(loss, *(f"{x:.1%}" for x in examination.shares.values()))
    for name in ["loss", *sorted(names - {"loss"})]:
        values = (e.terms.get(name) for e in examined.values())
        terms.add_row(name, *("" if v is None else f"{v:+.5f}" for v in values))
    if len(examined) == 1:
        return [terms, shares]
    alike = Table(
        title="agreement",
        caption="cosine of the coefficients; tokens pulled, pushed or left alone alike",
    )
    alike.add_column("")
    for loss in examined:
        alike.add_column(loss, justify="right")
    for loss, one in examined.items():
        pairs = (agreement(one, other) for other in examined.values())
        alike.add_row(
            loss, *(f"{p['cosine']:+.2f} {p['same_sign']:.0%}" for p in pairs)
        )
    return [terms, shares, alike]


def as_json(
    examined: Mapping[str, Examination], recorded: Sequence[Recorded]
) -> dict[str, Any]:
    """Everything, as plain JSON values; coefficients by completion."""
    return {
        "completions": len(recorded),
        "tokens": sum(trajectory.lists.shape[1] for trajectory in recorded),
        "losses": {
            loss: {
                "terms": examination.terms,
                "shares": examination.shares,
                "coefficients": {
                    trajectory.name: coefficient.tolist()
                    for trajectory, coefficient in zip(
                        recorded, examination.coefficients, strict=True
                    )
                },
                "agreement": {
                    name: agreement(examination, other)
                    for name, other in examined.items()
                },
            }
            for loss, examination in examined.items()
        },
    }


def draw(
    examined: Mapping[str, Examination],
    recorded: Sequence[Recorded],
    places: Sequence[int],
    picture: Path,
) -> None:
    """Draws each loss's coefficient along some completions.

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
    height = 2.6 * len(places) + 0.4
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(len(places), 1, squeeze=False)[:, 0]
    for panel, place in zip(panels, places, strict=True):
        trajectory = recorded[place]
        tokens = np.arange(len(trajectory.pieces))
        for loss, examination in examined.items():
            unit = np.abs(np.concatenate(examination.coefficients)).mean() or 1.0
            panel.plot(
                tokens,
                examination.coefficients[place] / unit,
                drawstyle="steps-mid",
                label=loss,
            )
        panel.axhline(0, color="black", linewidth=0.5)
        verdict = "correct" if trajectory.correct else "incorrect"
        panel.set_title(f"{trajectory.name}: {verdict}", loc="left", fontsize=9)
        panel.set_ylabel("coefficient\n(mean |.| = 1)")
        if len(tokens) <= LABELLED:
            panel.set_xticks(tokens, map(_label, trajectory.pieces), rotation=90)
        panel.margins(x=0.01)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=6
    )
    panels[-1].set_xlabel("token (below 0: pulled towards; above: pushed away)")
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"{picture}: cannot be written: {error}") from None


def _label(piece: str) -> str:
    """A token's text, its spaces visible; no formula for matplotlib to read."""
    return repr(piece)[1:-1].replace(" ", "␣").replace("$", "\\$") or "∅"
