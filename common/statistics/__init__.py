"""Statistics: records and claims in, verdicts out. Never loads a model.

`claims` is the schema of `claims.yaml`, `records` reads what the runs left, `inference` has the tests,
`comparisons` finds what a claim compares, `verdicts` judges. `python -m common.statistics` is the command.
"""
