"""What a run on many accelerators needs, before it is started: memory of a rank, what ranks send, about how long."""
