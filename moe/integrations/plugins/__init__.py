"""The entry points that engines load at every start: light, and asleep."""
