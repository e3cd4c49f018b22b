"""Data, training through torchtitan, evaluation and run folders. `zoo.train.run.train` does it all."""
