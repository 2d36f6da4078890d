"""The figures of a run: the overview, one for each operation, how times scale, what a call costs the host.

Each is drawn from the plain data that `report.to_json` makes. Ours is vermilion everywhere; all colours are
of Okabe and Ito's palette, which colour-blind readers tell apart, and markers differ beside them. Text stays
text in the SVG files, which keeps them small.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .cases import OURS, is_ours
from .machine_kind import slug

Result = dict[str, Any]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "slmkernels", "font.family": "DejaVu Sans", "font.size": 9}
OUR_COLOUR = "#D55E00"
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")
MARKERS = "osD^vPX"
# What the overview shows, and how it calls it.
HEADLINES = {
    "sliding_window/standard/forward/fp32": "Sliding window, forward",
    "sliding_window/standard/forward_backward/fp32": "Sliding window, forward + backward",
    "sliding_window/decode/step/fp32": "Sliding window, a decoded token",
    "linear/plain/forward_backward/fp32": "Linear attention, forward + backward",
    "linear/gated_delta/forward_backward/fp32": "Gated delta rule, forward + backward",
    "linear/decode/step/fp32": "Gated delta rule, a decoded token",
    "hybrid/standard/forward_backward/fp32": "Hybrid attention, forward + backward",
    "hybrid/decode/step/fp32": "Hybrid attention, a decoded token",
    "causal_conv1d/standard/forward_backward/fp32": "Causal convolution, forward + backward",
    "causal_conv1d/decode/step/fp32": "Causal convolution, a decoded token",
    "experts/standard/forward_backward/fp32": "Experts, forward + backward",
    "experts/decode/forward/fp32": "Experts, a decoded token",
    "experts/segments/forward_backward/fp32": "Experts of documents, forward + backward",
    "experts/route/forward_backward/fp32": "Routing, forward + backward",
    "end_to_end/small_lm_15m/training/fp32": "SmallLM 15m, a step of training",
    "end_to_end/small_lm_15m/generation/fp32": "SmallLM 15m, decoding",
    "end_to_end/qwen3_next/training/fp32": "Qwen3-Next, small, a step of training",
    "end_to_end/qwen3_next/generation/fp32": "Qwen3-Next, small, generation",
    "end_to_end/mistral/training/fp32": "Mistral, small, a step of training",
    "end_to_end/mistral/generation/fp32": "Mistral, small, generation",
    "end_to_end/olmoe/training/fp32": "OLMoE, small, a step of training",
    "end_to_end/olmoe/generation/fp32": "OLMoE, small, generation",
}
MOST_UNNAMED = 12  # cases of an overview where the run holds no headline
HEADING = 1.2  # height of a group's title, in bars
# axis -> what its figure shows
AXES = {
    "T": ("tokens", "us a token"),
    "W": ("keys in the window", "ms"),
    "E": ("experts", "ms"),
}


class Threads(NamedTuple):
    """A candidate of a case: how many times as fast it is as with one thread."""

    case: str
    name: str
    threads: int
    times: float
    seconds: float  # median


def write(run: dict[str, Any], folder: Path) -> list[str]:
    """Draw all that the run has data for, SVG and PNG, into a folder -> the names without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in _figures(run):
            for suffix in ("svg", "png"):
                metadata = {"Date": None} if suffix == "svg" else None
                figure.savefig(folder / f"{name}.{suffix}", dpi=130, metadata=metadata)
            written.append(name)
    return written


def operations(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results by operation, without those that stand on a curve."""
    found = {}
    for result in results:
        if not result.get("scaling"):
            found.setdefault(result["operation"], []).append(result)
    return found


def curves(run: dict[str, Any], axis: str) -> dict[str, list[Result]]:
    """The results along an axis, by curve: operation, what is fixed, mode."""
    found = {}
    for result in run["results"]:
        scaling, ran = result.get("scaling"), any(c["status"] == "ok" for c in result["candidates"])
        if ran and scaling and scaling["axis"] == axis:
            mode = result["case"].split("/")[-2].replace("_", " + ")
            name = f"{result['operation']}, {scaling['curve']}, {mode}"
            found.setdefault(name, []).append(result)
    return {name: sorted(part, key=lambda r: r["scaling"]["at"]) for name, part in found.items()}


def _figures(run: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    groups = _headlines(run["results"])
    if groups:
        yield "scoreboard", _overview(run, groups)
    for operation, results in operations(run["results"]).items():
        if any(peer["speedup"] for result in results for peer in result["candidates"]):
            yield slug(operation).replace("-", "_"), _one_operation(run, operation, results)
    for axis in AXES:
        parts = {name: part for name, part in curves(run, axis).items() if name.endswith("backward")}
        if parts:
            yield f"scaling_{axis}", _scaling(run, axis, parts)
    if bars := thread_speedups(run):
        yield "scaling_threads", _threads(run, bars)
    if run.get("overhead"):
        yield "overhead", _overhead(run)


def where(run: dict[str, Any]) -> str:
    """The machine, on one line."""
    facts = {"threads": 1} | run["environment"]
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    machine = facts.get("gpu") or f"{facts['cpu']}, {threads}"
    return f"{machine}, torch {facts['torch']}, {facts.get('date', '')[:10]}"


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _ratio_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


# ---- the overview ------------------------------------------------------------------------------------------


def _headlines(results: list[Result]) -> dict[str, list[Result]]:
    """title -> the peers of one case that compute the same function, slowest first."""
    chosen = {r["case"]: r for r in results if r["case"] in HEADLINES} or {
        r["case"]: r for r in results[:MOST_UNNAMED]
    }
    names = [name for name in HEADLINES if name in chosen] or list(chosen)
    groups = {}
    for name in names:
        peers = [c for c in chosen[name]["candidates"] if c["speedup"] and c["status"] == "ok"]
        if peers:
            peers.sort(key=lambda c: -c["speedup"]["medians"])
            groups[HEADLINES.get(name, name)] = peers
    return groups


def _overview(run: dict[str, Any], groups: dict[str, list[Result]]) -> Figure:
    """Two columns of bars, as even as the groups allow."""
    heights = {title: len(peers) + HEADING for title, peers in groups.items()}
    left, total = [], 0.0
    for title, height in heights.items():
        if total + height / 2 > sum(heights.values()) / 2 and left:
            break
        left.append(title)
        total += height
    columns = [part for part in (left, [title for title in groups if title not in left]) if part]
    tallest = max(sum(heights[title] for title in part) for part in columns)
    figure = Figure(figsize=(5.6 * len(columns), 1.0 + 0.2 * tallest), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False, sharex=True)[0]
    ratios = [c["speedup"]["medians"] for peers in groups.values() for c in peers]
    for axes, part in zip(panels, columns, strict=True):
        rows = {title: [(c["name"], c["speedup"]["medians"]) for c in groups[title]] for title in part}
        _bar_groups(axes, rows, lambda name, ratio: COLOURS[0] if ratio >= 1 else COLOURS[-1], start=1)
        axes.set_ylim(tallest - HEADING / 2, -0.8)  # bars of one width
        axes.set_xlim(min(0.8, *ratios) * 0.95, max(2, *ratios) * 1.5)
        _ratio_axis(axes)
        axes.axvline(1, color=OUR_COLOUR, linewidth=2.5)
        axes.text(1, 1.0, f"{OURS} = 1", transform=axes.get_xaxis_transform(), color=OUR_COLOUR, ha="center",
                  va="bottom", fontsize=8.5, fontweight="bold")  # fmt: skip
        axes.set_xlabel("time of the peer, ours = 1 (medians, log scale)", fontsize=8.5)
    figure.suptitle(where(run), fontsize=8, color="0.35")
    return figure


def _bar_groups(
    axes: Axes,
    groups: dict[str, list[tuple[str, float]]],
    colour: Callable[[str, float], str],
    start: float,
) -> None:
    """Bars with their names and values, below the title of their group; drawn from `start` on."""
    y, ticks = 0.0, {}
    for title, bars in groups.items():
        axes.text(-0.02, y, title, transform=axes.get_yaxis_transform(), ha="right", va="center",
                  fontsize=8.5, fontweight="bold")  # fmt: skip
        for name, value in bars:
            y += 1
            axes.barh(y, value - start, left=start, height=0.74, color=colour(name, value))
            axes.annotate(f"{value:.3g}", (max(value, start), y), (3, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
            ticks[y] = name
        y += HEADING
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y - HEADING / 2, -0.8)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


# ---- one operation -----------------------------------------------------------------------------------------


def _one_operation(run: dict[str, Any], operation: str, results: list[Result]) -> Figure:
    """A row for each case, a mark for each peer (open: a yardstick); right of 1, ours is faster."""
    figure = Figure(figsize=(9, 1.7 + 0.25 * len(results)), layout="constrained")
    axes = figure.subplots()
    points: dict[tuple[str, bool], list[tuple[float, int]]] = {}
    for row, result in enumerate(results):
        for c in result["candidates"]:
            if c["speedup"]:
                key = c["name"], c["status"] == "yardstick"
                points.setdefault(key, []).append((c["speedup"]["medians"], row))
    styles = zip(cycle(COLOURS), cycle(MARKERS), strict=False)
    for ((name, is_yardstick), places), (colour, marker) in zip(points.items(), styles, strict=False):
        label = f"{name} (yardstick)" if is_yardstick else name
        fill = "none" if is_yardstick else "full"
        axes.plot(
            *zip(*places, strict=True), marker, color=colour, fillstyle=fill, markersize=5.5, label=label
        )
    axes.axvline(1, color=OUR_COLOUR, linewidth=2, label=f"{OURS} = 1")
    axes.set_yticks(range(len(results)), [_row_label(result) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    _tidy(axes)
    _ratio_axis(axes)
    axes.set_xlabel("time over ours, ratio of medians (log scale; right of 1: ours is faster)", fontsize=8.5)
    figure.suptitle(f"{operation}: {where(run)}", fontsize=9)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _row_label(result: Result) -> str:
    state = result["candidates"][0]["status"]
    name = (
        result["case"].split("/", 1)[-1].replace("forward_backward", "forward + backward").replace("/", ", ")
    )
    return name if state == "ok" else f"{name} ({state.upper()})"


# ---- scaling -----------------------------------------------------------------------------------------------


def _scaling(run: dict[str, Any], axis: str, parts: dict[str, list[Result]]) -> Figure:
    """A panel for each curve; where the axis counts tokens, a level line is linear time."""
    size, unit = AXES[axis]
    columns = min(2, len(parts))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(4.7 * columns, 0.5 + 3.0 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (name, results) in zip(panels, parts.items(), strict=False):
        _lines(panel, axis, results)
        panel.set_title(name, fontsize=8.5)
        panel.set_xlabel(f"{size} (log scale)", fontsize=8)
        panel.set_ylabel(f"{unit} (median, log scale)", fontsize=8)
    for panel in panels[len(parts) :]:
        panel.set_visible(False)
    figure.suptitle(where(run), fontsize=8, color="0.35")
    return figure


def _lines(axes: Axes, axis: str, results: list[Result]) -> None:
    series: dict[str, list[tuple[int, float]]] = {}
    for result in results:
        at = result["scaling"]["at"]
        for c in result["candidates"]:
            if c["status"] == "ok" and c["median_s"]:
                value = c["median_s"] * (1e6 / at if axis == "T" else 1e3)
                series.setdefault(c["name"], []).append((at, value))
    styles = zip(cycle(COLOURS), cycle(MARKERS[1:]), strict=False)
    for name, places in series.items():
        if is_ours(name):
            style = {"color": OUR_COLOUR, "marker": "o", "linewidth": 2.4, "zorder": 3}
        else:
            colour, marker = next(styles)
            style = {"color": colour, "marker": marker, "linewidth": 1.2}
        axes.plot(*zip(*places, strict=True), markersize=4.5, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({result["scaling"]["at"] for result in results})
    axes.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _tidy(axes)
    axes.legend(fontsize=7.5, frameon=False)


# ---- threads and the host ----------------------------------------------------------------------------------


def thread_speedups(run: dict[str, Any]) -> list[Threads]:
    """What ran with one thread and with more, by medians."""
    found, every = [], run["environment"].get("threads")
    parts = {part["threads"]: part["results"] for part in run.get("threads", ())}
    alone = {r["case"]: {c["name"]: c for c in r["candidates"]} for r in parts.pop(1, ())}
    for threads, results in sorted({**parts, every: run["results"]}.items()):
        for result in results:
            for c in result["candidates"]:
                one = alone.get(result["case"], {}).get(c["name"])
                if one and one["status"] == c["status"] == "ok" and one["median_s"] and c["median_s"]:
                    times = one["median_s"] / c["median_s"]
                    found.append(Threads(result["case"], c["name"], threads, times, c["median_s"]))
    return found


def _threads(run: dict[str, Any], found: list[Threads]) -> Figure:
    """Ours and the fastest peer of each case, with the most threads."""
    most = max(row.threads for row in found)
    groups = {}
    for row in (row for row in found if row.threads == most):
        groups.setdefault(HEADLINES.get(row.case, row.case), []).append(row)
    for title, rows in groups.items():
        ours = [row for row in rows if is_ours(row.name)]
        peers = sorted((row for row in rows if not is_ours(row.name)), key=lambda row: row.seconds)
        groups[title] = [(row.name, row.times) for row in ours + peers[:1]]
    count = sum(len(rows) + HEADING for rows in groups.values())
    figure = Figure(figsize=(8, 1.0 + 0.2 * count), layout="constrained")
    axes = figure.subplots()
    _bar_groups(axes, groups, lambda name, times: OUR_COLOUR if is_ours(name) else COLOURS[0], start=0)
    axes.axvline(most, color="0.4", linestyle=":", linewidth=1)
    axes.set_xlabel(f"times as fast with {most} threads as with 1 (medians; dotted: {most})", fontsize=8.5)
    figure.suptitle(f"ours and the fastest peer; {where(run)}", fontsize=8, color="0.35")
    return figure


def _overhead(run: dict[str, Any]) -> Figure:
    """A bar for each call, a tick for what it may take."""
    rows = run["overhead"]
    figure = Figure(figsize=(8, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        colour = COLOURS[0] if row["passed"] else OUR_COLOUR
        axes.barh(y, row["microseconds_min"], height=0.72, color=colour)
        axes.plot([row["bar"]] * 2, [y - 0.45, y + 0.45], color="black", linewidth=1.6)
    labels = [row["operation"] + ", with gradients" * row["gradients"] for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("us a call of one token, minimum (black: the bar it must stay below)", fontsize=8.5)
    figure.suptitle(where(run), fontsize=8, color="0.35")
    return figure
