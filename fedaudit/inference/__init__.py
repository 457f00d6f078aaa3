"""What a server infers from updates: what was trained on, and which clients have an attribute."""
