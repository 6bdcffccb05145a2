"""Speed and memory, measured side by side: `python -m cps_ray.bench WHAT`. Nothing here is imported by anything else."""
