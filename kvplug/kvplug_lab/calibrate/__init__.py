"""Learning a model's keys, values and queries from text, and choosing formats by what they cost.

`collect` runs a model over a text, `statistics` makes a calibration of what was seen,
`sensitivity` measures what each candidate format loses in each layer, `solve` assigns formats to
layers under a budget of bytes, and `candidates` reads and writes the section of a deployment.
"""
