"""What `benchmarks/step.py` times: one module a contender, and how contenders are driven."""
