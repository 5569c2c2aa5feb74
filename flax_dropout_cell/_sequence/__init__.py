"""Many steps: a whole sequence under dropout, padding, and rows that start again."""
