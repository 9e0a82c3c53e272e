"""The stages on a run directory, one module each: it reads files, calls a function, writes files.

The function `do` of a module is what the registry names: it takes a command at work (`stage.Job`).
`registry.STAGES` lists what each stage reads and writes. `tokens.parquet` joins scores and gains,
and is written anew whenever either changes. The settings of rollout, score, probe and train are
fixed once their files exist. Tables and report are derived: they are made again when their inputs,
or the settings that they were asked with, have changed.
"""
