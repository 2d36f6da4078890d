"""The curves of a run as pictures."""

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


def _figure(width: float, height: float):
    """A matplotlib figure that needs no display, or None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def loss_curve(metrics: Path, picture: Path) -> str | None:
    """Draw bits per byte over steps, training and held-out text -> None, or why there is no picture."""
    figure = _figure(7, 4)
    if figure is None:
        return "no loss curve: matplotlib is not installed"
    records = read_metrics(metrics)
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


def expert_curves(metrics: Path, picture: Path) -> str | None:
    """Draw how the experts of each layer share the tokens, over steps -> None, or why there is no picture.

    A column for each layer that has experts: the share of the tokens of every expert, the router's entropy in
    nats, the load-balance loss.
    """
    records = [r for r in read_metrics(metrics) if r["kind"] == "train" and "tokens_per_expert" in r]
    if not records:
        return "no picture of experts: no step of the run tells of them"
    layers = len(records[0]["tokens_per_expert"])
    figure = _figure(max(4, 2.4 * layers), 6)
    if figure is None:
        return "no picture of experts: matplotlib is not installed"
    panels = figure.subplots(3, layers, sharex=True, sharey="row", squeeze=False)
    steps = [record["step"] for record in records]
    for layer in range(layers):
        loads = [record["tokens_per_expert"][layer] for record in records]
        shares = [[tokens / max(1, sum(load)) for tokens in load] for load in loads]
        panels[0, layer].plot(steps, shares, linewidth=1)  # a line for each expert
        panels[0, layer].set_title(f"expert layer {layer + 1}")
        for row, name in ((1, "router_entropy"), (2, "load_balance")):
            panels[row, layer].plot(steps, [record[name][layer] for record in records], linewidth=1.2)
        panels[2, layer].set_xlabel("step")
    for row, label in enumerate(("share of tokens", "router entropy, nats", "load-balance loss")):
        panels[row, 0].set_ylabel(label)
        for axes in panels[row]:
            axes.grid(alpha=0.3)
    figure.suptitle(metrics.parent.name)
    figure.savefig(picture, dpi=120)
    return None
