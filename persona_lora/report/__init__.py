"""Statistics, wording, figures and pages, from rows. Never touches a model."""
