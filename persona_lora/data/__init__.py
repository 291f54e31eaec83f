"""Writing and checking the data of traits."""
