"""What scripts/bench is made of: machine and material below, subjects and phases on them, results, report and chart above."""
