"""A repetition of a sweep: what a sweep found as one small record, two of them compared, and the history of verdicts."""
