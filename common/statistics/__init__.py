"""Statistics: records and claims in, verdicts out. Never loads a model.

From input to output: `claims` is the schema of `claims.yaml` and `records` reads what the runs left; `comparisons` finds
what a claim compares, `sample` gathers its seeds, `soundness` says whether they may be judged, `testing` puts them to
their test with `inference` and `flips`; `deciding` gives levels and answers, `judging` does all of this look by look,
`opening` says why a claim is open, `stability` judges again on other terms, `words` and `verdicts` write it down. The
rules stand in replications/CLAIMS.md. `python -m common.statistics` is the command; `calibrate` shows its error rates.
"""
