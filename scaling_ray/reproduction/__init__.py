"""Repetitions of a sweep: what it found as one small record, two of them compared, and the history of verdicts."""
