"""From a sweep to jobs: the plan, the processes or SLURM jobs that carry it out, and what became of them."""
