"""Level 2: the product's own processes on one virtual event loop, over a network that loses and delays."""
