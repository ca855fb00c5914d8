"""The demo's picture: how the loss fell, and how evenly the experts were used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_INK, _SOFT, _GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
_TRAIN, _HELD_OUT, _DENSE = "#7b8794", "#0b6e99", "#d1495b"


def draw(path: Path, records: Sequence[dict[str, Any]], dense_loss: float, title: str) -> None:
    """Write a PNG: loss curves of the run's log beside the dense model's loss, and each expert's load by layer."""
    # The object interface, not pyplot: no global state, and no display is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    # Batches differ by ten times what training gains, so each curve has its own scale.
    panels = figure.subplot_mosaic(
        [["held_out", "load"], ["train", "load"]], width_ratios=(1.7, 1), height_ratios=(2, 1)
    )
    panels["held_out"].sharex(panels["train"])
    _draw_held_out(panels["held_out"], records, dense_loss)
    _draw_train(panels["train"], records)
    load = next(r["expert_load"] for r in reversed(records) if "fraction" in r.get("expert_load", {}))
    _draw_load(figure, panels["load"], load)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=_INK)
    figure.savefig(path)


def _draw_held_out(axes: Any, records: Sequence[dict[str, Any]], dense_loss: float) -> None:
    curve = [(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]
    axes.axhline(dense_loss, color=_DENSE, lw=1.6, ls=(0, (4, 2)), label=f"dense model, as it came: {dense_loss:.4f}")
    label = f"mixture of experts: {curve[0][1]:.4f} → {curve[-1][1]:.4f}"
    axes.plot(*zip(*curve, strict=True), color=_HELD_OUT, lw=2.2, marker="o", ms=5, label=label, clip_on=False)
    axes.set_title("loss on held-out files, nats a token", loc="left", fontsize=10, color=_INK)
    axes.tick_params(labelbottom=False)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _style_curve(axes)


def _draw_train(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    curve = [(r["step"], r["loss"]) for r in records if "loss" in r]
    axes.plot(*zip(*curve, strict=True), color=_TRAIN, lw=1.4, marker=".", clip_on=False)
    axes.set_title("loss on training batches", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("step", color=_INK)
    axes.set_xlim(0, curve[-1][0])
    axes.xaxis.get_major_locator().set_params(integer=True)
    _style_curve(axes)


def _style_curve(axes: Any) -> None:
    axes.grid(axis="y", color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_SOFT)
    axes.tick_params(colors=_INK, labelsize=9)


def _draw_load(figure: Any, axes: Any, load: dict[str, Any]) -> None:
    """Layers downwards, experts across; white is an even share."""
    shares = load["fraction"]
    even = 1 / len(shares[0])
    reach = max(0.05, max(abs(share - even) for row in shares for share in row))
    image = axes.imshow(
        shares, aspect="auto", cmap="RdBu_r", vmin=even - reach, vmax=even + reach, interpolation="nearest"
    )
    axes.set_title("expert load: share of the choices", loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("expert", color=_INK)
    axes.set_ylabel("layer", color=_INK)
    axes.set_xticks(range(len(shares[0])))
    layers = load["layers"]
    ticks = range(0, len(layers), max(1, len(layers) // 6))
    axes.set_yticks(list(ticks), [str(layers[i]) for i in ticks])
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.06, pad=0.02, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, colors=_INK, length=0)
