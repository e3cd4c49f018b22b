"""An example of a package that brings a block to the zoo."""
