"""Stand-ins for modules of the zoo that an exported file does without: the same names, a few lines each."""
