"""With this steerer: ask, judge, write rows."""
