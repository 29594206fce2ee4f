"""How do the figures of all competitors look side by side? The plots of README.md, as
SVG.
"""

from __future__ import annotations

import matplotlib
from figures import NOOPS, SINGLE, Figures, number

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "microq",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

from matplotlib import pyplot  # noqa: E402

MICROQ_COLOUR = "#c0392b"
COLOUR = "#7f8c8d"
CURVES = [  # (question, name of the values, title, scale of the x axis)
    ("growth", "enqueue", "enqueued per second, by jobs queued", "log"),
    ("growth", "drain", "no-ops per second, by jobs queued", "log"),
    ("workers", "drain", "no-ops per second, by worker processes", "linear"),
]


def draw(results, home):
    figures = Figures(results)
    save(speed(figures), home / "speed.svg")
    save(costs(figures), home / "costs.svg")
    save(growth(figures), home / "growth.svg")


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def medians(figures, question, figure):
    """Return {"competitor, label": median}."""
    values = {}
    for (asked, competitor), columns in figures.results.values.items():
        if asked != question or competitor == "floor":
            continue
        for label, column_figure in columns:
            median = figures.median(question, competitor, label, column_figure)
            if column_figure == figure and median is not None:
                name = f"{competitor}, {label}" if label else competitor
                values[name] = median
    return values


def bars(axes, values, title, lowest_is_best=False, scale="linear"):
    """Draw a bar for each value, the best on top."""
    names = sorted(values, key=values.get, reverse=lowest_is_best)
    widths = [values[name] for name in names]
    colours = [colour_of(name) for name in names]
    drawn = axes.barh(names, widths, color=colours, height=0.7)
    texts = [number(width) for width in widths]
    axes.bar_label(drawn, texts, padding=3, fontsize=8)
    if scale == "log":
        title += ", log scale"
    axes.set(xscale=scale, title=title)
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)


def colour_of(name):
    return MICROQ_COLOUR if name.startswith("microq") else COLOUR


def panels(*sizes):
    """Return a figure with a panel for each number of bars."""
    height = 0.27 * max(sizes) + 1
    return pyplot.subplots(1, len(sizes), figsize=(13, height))


def speed(figures):
    enqueue = medians(figures, "enqueue", SINGLE)
    drain = medians(figures, "drain", NOOPS)
    latency = medians(figures, "latency", "ms")
    figure, axes = panels(len(enqueue), len(drain), len(latency))
    left, middle, right = axes
    bars(left, enqueue, "enqueued per second, one by one")
    bars(middle, drain, "no-ops per second, one worker process")
    bars(right, latency, "latency, p50, ms", lowest_is_best=True, scale="log")
    return figure


def costs(figures):
    queued = medians(figures, "bytes", "queued")
    finished = medians(figures, "bytes", "finished")
    memory = medians(figures, "idle", "memory, MB")
    figure, axes = panels(len(queued), len(finished), len(memory))
    left, middle, right = axes
    bars(left, queued, "bytes in Redis, a queued job", lowest_is_best=True)
    title = "bytes in Redis, a finished job"
    bars(middle, finished, title, lowest_is_best=True, scale="log")
    title = "MB, an idle worker with all its processes"
    bars(right, memory, title, lowest_is_best=True)
    return figure


def growth(figures):
    figure, all_axes = pyplot.subplots(1, 3, figsize=(13, 3.4))
    for axes, curve in zip(all_axes, CURVES, strict=True):
        question, name, title, scale = curve
        for (asked, competitor), columns in figures.results.values.items():
            if asked == question:
                draw_curve(axes, competitor, name, columns)
        axes.set(title=title, xscale=scale, yscale="log", ylim=(10, None))
        axes.legend(frameon=False, loc="lower right")
    return figure


def draw_curve(axes, competitor, name, columns):
    points = []
    for (column_name, x), column in columns.items():
        if column_name == name:
            points.append((x, column[0]))
    if not points:
        return
    xs, ys = zip(*sorted(points), strict=True)
    colour = MICROQ_COLOUR if competitor == "microq" else None
    axes.plot(xs, ys, marker="o", label=competitor, color=colour)
