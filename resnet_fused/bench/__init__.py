"""The main job: real ResNets on real photographs, reference against fused against frozen.

`options` turns what was asked for into `Settings`, `job` runs them, `results` keeps the record, and
`tables`, `markdown` and `chart` show it. `photos`, `networks`, `contenders`, `peers`, `accuracy`,
`memory` and `timing` each do one step of the job. `tune` is the command of that name.
"""
