"""An upcycle's report as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ckptbridge.trainer.upcycling.report import REPORT_FILE, TOLERANCE, UpcycleReport

_MOST_LAYERS = 16
"""A model with more of them shows those that differ most, the first and the last."""


def lines(report: UpcycleReport) -> list[str]:
    """The report for people, nothing coloured: the verdict first, then figures, layers and settings."""
    told = [*_verdict(report), "", f"{report.tokens} tokens of {report.text}, computed in fp32", *_figures(report)]
    told += _logits(report)
    told += ["", *_layers(report)]
    if report.settings:
        told += ["", "to train it:"]
        told += [f"  {setting.name}: {setting.value} ({setting.source})" for setting in report.settings]
    return told


def _verdict(report: UpcycleReport) -> list[str]:
    measured = f"logits differ by {report.judged.max_relative_difference:.1e} of the largest"
    allowed = f"tolerance {report.tolerance:.0e}"
    if report.tolerance > TOLERANCE:
        allowed += ": weights in half precision are multiplied by a factor, and rounded once more"
    if not report.is_exact:
        told = [f"{report.method} is not exact: {measured}"]
        told += [f"  because {reason}" for reason in report.inexact]
        return told if report.passed else [*told, "DEFECT: the mixture computes numbers that are not finite"]
    exact = "exact" if report.rounded is None else f"exact for the source rounded to {report.rounded_to}"
    if report.passed and report.is_grown_rounding:
        told = [
            f"{report.method} is {exact}: no layer's own output differs by more than {report.largest_by_itself:.1e}; "
            f"that rounding grows over {len(report.layers)} layers, and {measured}"
        ]
    elif report.passed:
        told = [f"{report.method} is {exact}: {measured} ({allowed})"]
    else:
        told = [f"DEFECT: {report.method} should be {exact}, but {measured} ({allowed})"]
        if report.first_defect is not None:
            layer = report.layers[report.first_defect]
            told.append(f"  layer {layer.layer} differs most by itself: {layer.output_difference:.1e} of its output")
    if report.rounded is not None:
        told.append(
            f"  of the source as it is they differ by {report.logits[0].max_relative_difference:.1e}: that is the "
            f"rounding to {report.rounded_to}"
        )
    return told + [f"  as long as: {condition}" for condition in report.conditions]


def _figures(report: UpcycleReport) -> list[str]:
    source, mixture = report.cost_source, report.cost_mixture
    rows: list[tuple[str, str, str]] = [("", "source", "mixture")]
    for number, found in enumerate(report.logits):
        which = f" {number}" if len(report.logits) > 1 else ""
        rows.append((f"loss{which}, nats a token", f"{found.loss_source:.6f}", f"{found.loss_mixture:.6f}"))
    rows += [
        ("parameters", _short(source.parameters), _short(mixture.parameters)),
        ("parameters that a token meets", _short(source.active_parameters), _short(mixture.active_parameters)),
        (
            f"FLOPs a token, forward, {report.flops_sequence_length} tokens",
            _short(source.flops_a_token),
            _short(mixture.flops_a_token),
        ),
    ]
    return _aligned(rows)


def _logits(report: UpcycleReport) -> list[str]:
    told: list[str] = []
    for path, found in zip(report.sources, report.logits, strict=True):
        against = f" against {path}" if len(report.sources) > 1 else ""
        told.append(
            f"loss difference {found.loss_difference:+.1e}, KL {found.kl:.1e}, max logit difference "
            f"{found.max_abs_difference:.1e} ({found.max_relative_difference:.1e} of the largest), argmax agrees on "
            f"{found.argmax_agreement:.2%}{against}"
        )
    return told


def _layers(report: UpcycleReport) -> list[str]:
    shown = report.layers
    if len(shown) > _MOST_LAYERS:
        by_difference = sorted(shown, key=lambda layer: layer.output_difference, reverse=True)
        shown = tuple(sorted({*by_difference[: _MOST_LAYERS - 2], shown[0], shown[-1]}, key=lambda layer: layer.layer))
    rows: list[tuple[str, ...]] = [("layer", "hidden states differ by", "its own output by", "busiest expert")]
    for layer in shown:
        busiest = "dense" if layer.busiest is None else f"{layer.busiest:.2f} of the mean"
        rows.append((str(layer.layer), f"{layer.hidden_difference:.1e}", f"{layer.output_difference:.1e}", busiest))
    told = _aligned(rows)
    loads = [rows for layer in report.layers for rows in layer.load]
    if unmet := loads.count(0):
        told.append(f"{unmet} of {len(loads)} experts met no token of this text, so that it says nothing of them")
    if len(shown) < len(report.layers):
        told.append(f"{len(shown)} of {len(report.layers)} layers, those that differ most; {REPORT_FILE} has all")
    return told


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    told: list[str] = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(others, widths[1:], strict=True))]
        told.append("  ".join(cells).rstrip())
    return told


def _short(number: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g} {unit}"
    return f"{number:.4g}"
