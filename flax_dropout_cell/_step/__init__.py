"""One step of a cell under dropout: the masks that it uses, and how they are applied."""
