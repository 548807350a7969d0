"""What the two Hopper families share: wide and swapped."""
