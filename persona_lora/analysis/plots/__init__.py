"""Pictures of what runs showed, each from rows on disk. Refuses to compute statistics."""
