"""What was measured, and the goals that it is held against."""
import statistics
from dataclasses import dataclass, field

from . import load, phases, programs

OWN, FLOOR, OVERLAY, FUSE_OVERLAY = "forkvol", "floor", "overlayfs", "fuse-overlayfs"


@dataclass
class Goal:
    """At most so many times another subject's median, or so many seconds, or at least or at most so much of its own unit."""

    floor: float = None
    overlay: float = None
    # Holds only where idle cores poll.
    polling: bool = False
    # At least so many times faster than fuse-overlayfs.
    fuse_overlay: float = None
    at_most: float = None
    at_least: float = None


GOALS = {
    phases.FORK: [Goal(overlay=0.35)],
    phases.UNPACK: [Goal(floor=1.2), Goal(overlay=2.3, polling=True), Goal(fuse_overlay=10)],
    phases.COMMIT_FULL: [Goal(overlay=1.0)],
    phases.COMMIT_EDITS: [Goal(overlay=0.7)],
    phases.WALK: [Goal(floor=1.3), Goal(overlay=2.0)],
    phases.READ: [Goal(floor=1.25), Goal(overlay=2.5, polling=True), Goal(fuse_overlay=10)],
    phases.READ_ONLY: [Goal(overlay=1.5)],
    phases.READ_AGAIN: [Goal(overlay=1.0)],
    phases.READ_COLD: [Goal(overlay=0.4)],
    phases.REMOVE: [Goal(floor=1.3), Goal(overlay=1.5), Goal(fuse_overlay=10)],
    phases.WRITE_LARGE: [Goal(overlay=1.1)],
    phases.COMMIT_LARGE: [Goal(at_most=0.3)],
    phases.READ_LARGE: [Goal(overlay=1.5)],
    phases.CHANGE_LARGE: [Goal(overlay=0.02)],
    programs.CARGO: [Goal(overlay=1.15)],
    programs.NPM: [Goal(overlay=1.15)],
    programs.GIT: [Goal(overlay=1.15)],
    programs.MAKE: [Goal(overlay=1.15)],
    load.TEN_FORKS: [Goal(at_least=1.0)],
    load.P99_RATIO: [Goal(at_most=3.0)],
    load.ATTACH: [Goal(at_most=0.030)],
    load.FINISH: [Goal(at_most=0.020)],
    load.SETTLED: [Goal(at_most=1.08)],
}


@dataclass
class Row:
    """One phase: its unit, and each subject's values."""

    unit: str
    values: dict = field(default_factory=dict)

    def median(self, subject):
        found = self.values.get(subject)
        return statistics.median(found) if found else None

    def ratio(self, to):
        """Times alone are compared that way: less of them is better."""
        if self.unit != "s":
            return None
        own, other = self.median(OWN), self.median(to)
        return own / other if own is not None and other else None


@dataclass
class Verdict:
    """One goal: what was measured against what was wanted, and whether it is met."""

    text: str
    wanted: str
    measured: float
    met: bool


class Results:
    """What was measured in one state of the machine."""

    def __init__(self, state, polling):
        self.state = state
        self.polling = polling
        self.rows = {}
        self.failed = {}

    def add(self, phase, subject, value, unit="s"):
        self.rows.setdefault(phase, Row(unit)).values.setdefault(subject, []).append(value)

    def subjects(self, order):
        return [name for name in order if any(name in row.values for row in self.rows.values())]

    def verdicts(self, phase):
        """The goals of a phase that can be judged by what was measured here."""
        row = self.rows[phase]
        found = []
        for goal in GOALS.get(phase, []):
            if goal.polling and not self.polling:
                continue
            for wanted, to in ((goal.floor, FLOOR), (goal.overlay, OVERLAY)):
                ratio = row.ratio(to)
                if wanted is not None and ratio is not None:
                    found.append(Verdict(f"× {to}", f"≤ {wanted:g}", ratio, ratio <= wanted))
            ratio = row.ratio(FUSE_OVERLAY)
            if goal.fuse_overlay is not None and ratio:
                found.append(Verdict(f"× faster than {FUSE_OVERLAY}", f"≥ {goal.fuse_overlay:g}", 1 / ratio, 1 / ratio >= goal.fuse_overlay))
            own = row.median(OWN)
            if goal.at_most is not None and own is not None:
                found.append(Verdict(row.unit, f"≤ {goal.at_most:g}", own, own <= goal.at_most))
            if goal.at_least is not None and own is not None:
                found.append(Verdict(row.unit, f"≥ {goal.at_least:g}", own, own >= goal.at_least))
        return found

    def document(self):
        """The same for programs."""
        rows = []
        for phase, row in self.rows.items():
            subjects = {name: {"median": row.median(name), "values": values} for name, values in row.values.items()}
            goals = [{"of": v.text, "wanted": v.wanted, "measured": v.measured, "met": v.met} for v in self.verdicts(phase)]
            ratios = {"to_floor": row.ratio(FLOOR), "to_overlayfs": row.ratio(OVERLAY)}
            rows.append({"phase": phase, "unit": row.unit, "subjects": subjects, **ratios, "goals": goals})
        return {"state": self.state, "polling": self.polling, "phases": rows, "failed": self.failed}
