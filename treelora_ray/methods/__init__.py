"""How a stream is learnt: the hooks, and one file for each method. `catalogue` knows them all."""
