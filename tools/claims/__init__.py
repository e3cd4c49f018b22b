"""Small-scale evidence on the CPU for what papers claim: one file a claim. `python tools/claims` lists them."""
