"""A model on several processes: what each holds, computes and exchanges. Knows torch, not torchtitan."""
