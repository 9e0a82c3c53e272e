"""On-policy distillation with TRL, its evaluation, and grids of short trainings."""
