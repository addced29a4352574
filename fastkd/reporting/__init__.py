"""What a user sees: lines and bars in a terminal, pages, pictures."""
