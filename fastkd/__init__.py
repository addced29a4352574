"""fastkd: distil large transformers into small ones by matching what happens inside."""
