"""Many trainings: study (Optuna), trials and scheduler (Ray Tune), records, final runs, export of the best."""
