"""The table as text."""
from .results import FLOOR, OVERLAY

WIDTH = 11


def number(value, unit):
    """Three digits that count, never in powers of ten."""
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    digits = 6 if value < 0.001 else 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f}" + (" ×" if unit == "×" else "")


def ratio(value):
    return "" if value is None else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def wrapped(name):
    """A subject's name as the two lines of its column's head."""
    first, _, second = name.replace("-", "- ", 1).partition(" ")
    return first, second


def table(results, order):
    """Yields lines: a row for each phase, a column for each subject, the ratios, and the goals with their verdicts."""
    names = results.subjects(order)
    first = max(len(phase) for phase in results.rows) + 2
    yield results.state
    yield "medians, in seconds where no unit is given"
    for line in (0, 1):
        heads = [wrapped(name)[line] for name in names] + (["×", "×"] if line == 0 else [FLOOR, OVERLAY])
        yield (" " * first + "".join(f"{head:>{WIDTH}}" for head in heads) + ("   goals" if line else "")).rstrip()
    for phase, row in results.rows.items():
        text = f"{phase:<{first}}"
        for name in names:
            median = row.median(name)
            text += f"{'–' if median is None else number(median, row.unit):>{WIDTH}}"
        text += f"{ratio(row.ratio(FLOOR)):>{WIDTH}}{ratio(row.ratio(OVERLAY)):>{WIDTH}}"
        goals = [f"{v.wanted} {v.text} {'met' if v.met else f'MISSED ({ratio(v.measured)})'}" for v in results.verdicts(phase)]
        yield (text + "   " + "; ".join(goals)).rstrip()
    verdicts = [v for phase in results.rows for v in results.verdicts(phase)]
    yield f"goals: {sum(v.met for v in verdicts)} of {len(verdicts)} met"
    for name, why in results.failed.items():
        yield f"failed and left out from there on: {name}: {why}"
