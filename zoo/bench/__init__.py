"""`zoo bench`: ops and layers timed against their peers, in one process, on the same numbers.

A *group* is one question (this layer, forward, 2048 tokens); its *candidates* are the ways to answer it. Before
anything is timed the candidates' outputs are compared, so that only equal functions are raced. Times are wall
clock, medians over interleaved rounds (on a GPU: CUDA events).
"""
