"""Models to train and to attack, and what builds them."""
