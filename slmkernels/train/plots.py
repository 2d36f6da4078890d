"""The loss curve of a run as a picture."""

import json
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def loss_curve(metrics: Path, picture: Path) -> str | None:
    """Draw bits per byte over steps, training and held-out text -> None, or why there is no picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss curve: matplotlib is not installed"
    records = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte", title=metrics.parent.name)
    for kind, style in (("train", "-"), ("valid", "o-")):
        points = [(record["step"], record["bpb"]) for record in records if record["kind"] == kind]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, label=f"{kind}, last {points[-1][1]:.3f}", linewidth=1.2
            )
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=120)
    return None
