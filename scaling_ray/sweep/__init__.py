"""A sweep: its plan, its runs under Ray, the references beside them, its results and their tracking."""
