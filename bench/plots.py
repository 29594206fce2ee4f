"""The plots of README.md, as SVG."""

from __future__ import annotations

import matplotlib
from figures import NOOPS, SINGLE, Figures, number

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "microq", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip

from matplotlib import pyplot  # noqa: E402

OURS, THEIRS = "#c0392b", "#7f8c8d"


def draw(results, home):
    figures = Figures(results)
    save(speed(figures), home / "speed.svg")
    save(costs(figures), home / "costs.svg")
    save(growth(figures), home / "growth.svg")


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def found(figures, question, figure):
    """Return {"rival, label": median}."""
    return {
        f"{rival}, {label}" if label else rival: middle
        for (asked, rival), values in figures.results.values.items()
        for label, name in values
        if asked == question and name == figure and rival != "floor"
        if (middle := figures.median(question, rival, label, name)) is not None
    }


def bars(axes, values, title, best=max, scale="linear"):
    """Draw a bar for each, the best on top."""
    names = sorted(values, key=values.get, reverse=best is min)
    colours = [OURS if name.startswith("microq") else THEIRS for name in names]
    drawn = axes.barh(
        names, [values[name] for name in names], color=colours, height=0.7
    )
    axes.bar_label(
        drawn, [number(values[name]) for name in names], padding=3, fontsize=8
    )
    axes.set(xscale=scale, title=title + (", log scale" if scale == "log" else ""))
    axes.margins(x=0.2)
    axes.tick_params(axis="y", length=0)


def panels(*sizes):
    return pyplot.subplots(1, len(sizes), figsize=(13, 0.27 * max(sizes) + 1))


def speed(figures):
    enqueue = found(figures, "enqueue", SINGLE)
    drain, latency = found(figures, "drain", NOOPS), found(figures, "latency", "ms")
    figure, (left, middle, right) = panels(len(enqueue), len(drain), len(latency))
    bars(left, enqueue, "enqueued per second, one by one")
    bars(middle, drain, "no-ops per second, one worker process")
    bars(right, latency, "latency, p50, ms", min, "log")
    return figure


def costs(figures):
    queued, memory = (
        found(figures, "bytes", "queued"),
        found(figures, "idle", "memory, MB"),
    )
    done = found(figures, "bytes", "finished")
    figure, (left, middle, right) = panels(len(queued), len(done), len(memory))
    bars(left, queued, "bytes in Redis, a queued job", min)
    bars(middle, done, "bytes in Redis, a finished job", min, "log")
    bars(right, memory, "MB, an idle worker with all its processes", min)
    return figure


def growth(figures):
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.4))
    curves = [
        ("growth", "enqueue", "enqueued per second, by jobs queued", "log"),
        ("growth", "drain", "no-ops per second, by jobs queued", "log"),
        ("workers", "drain", "no-ops per second, by worker processes", "linear"),
    ]
    for place, (question, what, title, scale) in zip(axes, curves, strict=True):
        for (asked, rival), values in figures.results.values.items():
            points = sorted(
                (x, column[0]) for (name, x), column in values.items() if name == what
            )
            if asked == question and points:
                colour = OURS if rival == "microq" else None
                place.plot(
                    *zip(*points, strict=True), marker="o", label=rival, color=colour
                )
        place.set(title=title, xscale=scale, yscale="log", ylim=(10, None))
        place.legend(frameon=False, loc="lower right")
    return figure
