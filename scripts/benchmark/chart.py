"""The chart: one group of bars a phase, on a logarithmic scale of seconds, as SVG that reads on light and on dark paper."""
import html
import math

from . import phases, programs
from .report import number
from .results import FLOOR, OVERLAY, OWN

SHOWN = [OWN, OVERLAY, FLOOR, "tar+zstd"]
PHASES = [
    phases.FORK,
    phases.UNPACK,
    phases.COMMIT_FULL,
    phases.COMMIT_EDITS,
    phases.WALK,
    phases.READ,
    phases.READ_AGAIN,
    phases.READ_COLD,
    phases.REMOVE,
    phases.ABANDON,
    phases.CHANGE_LARGE,
    programs.CARGO,
    programs.NPM,
    programs.GIT,
    programs.MAKE,
]
LEFT, RIGHT, BAR, GAP, TOP = 340, 70, 13, 12, 84
WIDTH = 940

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.small { font-size: 11px; fill: #59636e }
.grid { stroke: #d1d9e0; stroke-width: 1 }
.s0 { fill: #0969da } .s1 { fill: #bc4c00 } .s2 { fill: #8c959f } .s3 { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .small { fill: #9198a1 }
  .grid { stroke: #3d444d }
  .s0 { fill: #4493f8 } .s1 { fill: #f0883e } .s2 { fill: #7d8590 } .s3 { fill: #3fb950 }
}
"""


def shown(results):
    return [(phase, results.rows[phase]) for phase in PHASES if phase in results.rows and results.rows[phase].median(OWN)]


def has_bars(results):
    """Whether anything was measured that the chart shows."""
    return bool(shown(results))


def chart(results, caption):
    """Returns the SVG of one state's results, which have something to show."""
    rows = shown(results)
    medians = [row.median(name) for _, row in rows for name in SHOWN if row.median(name)]
    low, high = math.floor(math.log10(min(medians))), math.ceil(math.log10(max(medians)))
    high = max(high, low + 1)

    def x(seconds):
        return LEFT + (math.log10(seconds) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    body, y = [], TOP
    for phase, row in rows:
        bars = [(index, name, row.median(name)) for index, name in enumerate(SHOWN) if row.median(name)]
        middle = y + len(bars) * BAR / 2 + 4
        body.append(f'<text x="{LEFT - 10}" y="{middle:.0f}" text-anchor="end">{html.escape(phase)}</text>')
        for index, name, seconds in bars:
            # A bar on a logarithmic scale starts at the scale's end: its least width keeps the shortest visible.
            width = max(x(seconds) - LEFT, 2)
            told = f"{phase}: {name} {number(seconds, 's')} s"
            body.append(f'<rect class="s{index}" x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" rx="2"><title>{html.escape(told)}</title></rect>')
            body.append(f'<text class="small" x="{LEFT + width + 5:.1f}" y="{y + BAR - 3}">{number(seconds, "s")}</text>')
            y += BAR
        y += GAP
    grid = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        grid.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP - 8}" x2="{at:.1f}" y2="{y - GAP + 4}"/>')
        grid.append(f'<text class="small" x="{at:.1f}" y="{TOP - 14}" text-anchor="middle">{10.0**power:g} s</text>')
    legend, at = [], LEFT
    for index, name in enumerate(SHOWN):
        if any(row.median(name) for _, row in rows):
            legend.append(f'<rect class="s{index}" x="{at}" y="37" width="11" height="11" rx="2"/><text x="{at + 16}" y="47">{html.escape(name)}</text>')
            at += 110
    height = y + 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">\n'
        f"<title>{html.escape(caption)}</title>\n<style>{STYLE}</style>\n"
        f'<text class="title" x="10" y="24">Seconds a phase takes, on a logarithmic scale; shorter is better</text>\n'
        + "\n".join(grid + legend + body)
        + f'\n<text class="small" x="10" y="{height - 6}">{html.escape(caption)}</text>\n</svg>\n'
    )
