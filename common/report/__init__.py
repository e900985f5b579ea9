"""Figures and page of a profile, drawn from records, claims and verdicts alone; `python -m common.report`."""
