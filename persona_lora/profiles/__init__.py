"""A persona from its conversations: features, representative samples, profile, judge prompt."""
