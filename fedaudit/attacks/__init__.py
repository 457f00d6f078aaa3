"""Attacks on intercepted updates, and the scores that judge them."""
