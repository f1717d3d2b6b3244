"""Ask, evaluate, tell: the loop of trials."""
