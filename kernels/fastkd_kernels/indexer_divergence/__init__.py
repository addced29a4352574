"""KL between attention summed over heads and the scores of a lightning indexer."""
