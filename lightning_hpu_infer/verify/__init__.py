"""`python -m lightning_hpu_infer verify`: whether what the plugin assumes is true of the device that is here.

`catalogue` lists the checks, `child` runs those of a mode in a process of its own, `supervise` starts it and outlives
its crashes, and `run` gathers everything into a `report`.
"""
