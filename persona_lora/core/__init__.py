"""What things are: values, algebra, files. Knows no model and no network."""
