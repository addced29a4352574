"""Mean squared error of attention scores."""
