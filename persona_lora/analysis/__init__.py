"""Reading runs: statistics, plots, report. Never touches a model."""
