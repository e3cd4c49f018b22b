"""What a model takes where it runs: time and memory of its nodes, the kernels that do the work, a trace."""
