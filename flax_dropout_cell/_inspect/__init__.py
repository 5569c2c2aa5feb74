"""Which masks are drawn, and when: as a table and as a picture."""
