"""The main job: real ResNets on real photographs, reference against fused against frozen.

`options` turns what was asked for into `Settings`, `job` runs them, `measure` one case of them,
`results` keeps the record, and `tables` and `chart` show it. `photos`, `networks`, `contenders`,
`peers`, `accuracy`, `memory`, `timing` and `conditions` each do one step; `terminal` is what the
command lines share, `xla` says a network again for JAX, `tune` is the command of that name. The
suite in `benchmarks/` uses the same.
"""
